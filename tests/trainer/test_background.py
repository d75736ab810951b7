"""Checkpoints that a thread writes: the same ones, whole at any time, and with errors that are raised."""

import os
import signal
import threading
import time

import pytest
import torch

from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import checkpoint_content
from detr_exp.trainer.background import Background
from detr_exp.trainer.sharding import copied
from detr_exp.training import train_in

STATE = {"format": files.FORMAT, "kind": "training", "model": {"weight": torch.zeros(1000)}}


def test_what_is_copied_does_not_change_any_more():
    state = {"a": [torch.zeros(2), {"b": torch.ones(1)}], "n": 3}
    made = copied(state)
    state["a"][0] += 1
    state["a"][1]["b"] += 1
    assert (made["a"][0].tolist(), made["a"][1]["b"].tolist(), made["n"]) == ([0, 0], [1], 3)


def test_jobs_run_one_after_another_while_the_caller_goes_on():
    free, done = threading.Event(), []
    with Background() as background:
        background.add(lambda: (free.wait(10), done.append(1)))
        background.add(lambda: done.append(2))
        assert done == [], "the caller has not waited"
        free.set()
        background.wait()
        assert done == [1, 2]


def test_an_error_of_the_thread_is_raised_at_the_next_wait_and_at_the_end():
    def fail():
        raise ValueError("disk full")

    with Background() as background:
        background.add(fail)
        with pytest.raises(ValueError, match="disk full"):
            background.wait()
        background.wait()  # it was reported
    with pytest.raises(ValueError, match="disk full"), Background() as background:
        background.add(fail)
    with pytest.raises(KeyError):
        _end_in_the_middle(fail)  # the error that ended the run is not replaced


def _end_in_the_middle(job):
    with Background() as background:
        background.add(job)
        raise KeyError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_kill_while_the_thread_writes_leaves_the_older_one(tmp_path):
    path = tmp_path / files.NEWEST
    files.save(STATE | {"step": 1}, path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save = torch.save

        def save_half(state, file):
            save(state, file)
            file.truncate(file.tell() // 2)
            file.flush()
            os.write(writing, b"!")
            time.sleep(60)

        torch.save = save_half
        Background().add(lambda: files.save(STATE | {"step": 2}, path))
        time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(tmp_path.glob(".checkpoint*.part")), "it was in the middle of it"
    assert files.load(path)["step"] == 1


@pytest.mark.slow
def test_the_same_checkpoints_are_written(small, fit, tmp_path, monkeypatch):
    """Of the step at which they were begun, although training goes on while they are written."""
    words = (
        "trainer.epochs=1",
        "data.train=4",
        "data.val=1",
        "trainer.checkpoint_every_steps=1",
        "trainer.checkpoint_interval=1",
    )
    usual = fit(*words, folder="usual")
    threads, save = set(), files.save

    def late(state, path):
        threads.add((path.name, threading.current_thread() is threading.main_thread()))
        time.sleep(0.05)
        save(state, path)

    monkeypatch.setattr(checkpoint_content.files, "save", late)
    made = fit(*words, "trainer.checkpoint_in_background=true", folder="made")
    assert (files.NEWEST, False) in threads
    assert (files.NEWEST, True) not in threads
    assert sorted(path.name for path in usual.glob("*.pth")) == sorted(path.name for path in made.glob("*.pth"))
    for name in (files.NEWEST, "checkpoint_1.pth"):
        one, two = files.load(usual / name), files.load(made / name)
        assert (one["step"], one["logged_lines"]) == (two["step"], two["logged_lines"])
        assert all(torch.equal(tensor, two["model"][key]) for key, tensor in one["model"].items())
        moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (one, two)]
        assert torch.equal(*moments)


@pytest.mark.slow
def test_a_file_that_cannot_be_written_ends_the_run_with_the_reason(small, tmp_path, monkeypatch):
    words = ("trainer.checkpoint_every_steps=1", "trainer.checkpoint_in_background=true", "trainer.epochs=3")
    save = files.save

    def full(state, path):
        if path.name == files.NEWEST and state["step"] == 2:
            raise ValueError("checkpoint.pth could not be written (No space left on device)")
        save(state, path)

    monkeypatch.setattr(checkpoint_content.files, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        train_in(tmp_path / "full", small(*words))
    assert files.load(tmp_path / "full" / files.NEWEST)["step"] == 1
