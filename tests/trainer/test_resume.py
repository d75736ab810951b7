"""Interrupted runs, and how they resume."""

import csv
import json
import logging
import shutil
import signal
from logging.handlers import MemoryHandler

import kill_and_resume as rehearsal
import pytest
import torch
from filelock import FileLock

from detr_exp import build
from detr_exp.data.loader import WorkerError
from detr_exp.signals import Interrupted
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import origin, trainer, validation
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

FEW = ("data.train=4", "data.val=2", "data.test=2", "trainer.num_pictures=0")
EXACT = (*FEW, "trainer.deterministic=true", "trainer.log_every_steps=3", "trainer.resume=auto")


def newest(folder):
    return files.load(folder / files.NEWEST)


def identity(folder):
    return json.loads((folder / "run.json").read_text())["id"]


def steps(folder, name):
    return [line["step"] for line in rehearsal.metrics(folder) if name in line]


@pytest.fixture
def ended(small, monkeypatch):
    """Train in a folder until the given method of the trainer is called for the n-th time, and die there."""

    def run(folder, *words, at, calls=1, where=Trainer):
        left = [calls]
        original = getattr(where, at)

        def die(*args, **settings):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(where, at, die)
            with pytest.raises(KeyboardInterrupt):
                train_in(folder, small(*words))
        return folder

    return run


def rows(folder):
    """The rows of `results.csv` without what depends on the machine."""
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "memory_gib")} for row in found]


@pytest.fixture(scope="module")
def one_step(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_step")
    train_in(folder, small(*FEW, "trainer.max_steps=1"))
    return folder


@pytest.fixture
def stopped(one_step, tmp_path):
    """The folder of a run of one step."""
    return shutil.copytree(one_step, tmp_path / "stopped")


# ------------------------------------------------------------------------------------------------------------- SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_reproduces_the_uninterrupted_one_bit_for_bit(
    small, small_words, family, fit, tmp_path, monkeypatch
):
    """Before its first checkpoint and inside of one; leaving out position or random streams is noticed."""
    words = (*EXACT, "trainer.checkpoint_every_steps=2", "data.multi_scale=[64,96]", "trainer.grad_accum_steps=2")
    words = (*family, *words, "data.train=12", "trainer.hardware.products=torch")  # in the processes as here
    of_process = tuple(dict.fromkeys((*(word for word in small_words if not word.startswith("model.")), *words)))
    undisturbed = fit(*words, folder="undisturbed")
    folder = tmp_path / "killed"
    kill = lambda moment: rehearsal.start(folder, of_process, moment)  # noqa: E731
    assert kill("step:2:0") == -signal.SIGKILL
    assert not (folder / files.NEWEST).exists()
    first = identity(folder)
    assert kill("write:3:0.5") == -signal.SIGKILL
    assert newest(folder)["step"] == 2, "the one before is whole"
    assert list(folder.glob(".checkpoint*.part"))

    for name in ("position", "random streams"):
        shutil.copytree(folder, tmp_path / name)
    state = newest(folder)
    files.save(state | {"batch": 0}, tmp_path / "position" / files.NEWEST)
    train_in(tmp_path / "position", small(*words))
    assert rehearsal.compare(undisturbed, tmp_path / "position")
    with monkeypatch.context() as patch:
        patch.setattr("detr_exp.trainer.trainer.seed_step", lambda *_: None)
        train_in(tmp_path / "random streams", small(*words))
    assert rehearsal.compare(undisturbed, tmp_path / "random streams")

    train_in(folder, small(*words))
    assert rehearsal.compare(undisturbed, folder) == []
    assert rows(undisturbed) == rows(folder), "the mean losses of the epoch that was cut are those of all its steps"
    assert len(rows(folder)) == 2
    assert identity(folder) == first
    assert not list(folder.glob(".checkpoint*.part"))


# ------------------------------------------------------------------------------- where and as which run it resumes


def test_auto_resumes_in_the_folder_of_the_unfinished_run(small, ended, tmp_path, capsys):
    old = ended(tmp_path / "day" / "old", "trainer.checkpoint_every_steps=3", at="train_step", calls=6)
    before, written = identity(old), len(rehearsal.metrics(old))
    made = tmp_path / "day" / "new"
    made.mkdir()
    file = logging.FileHandler(made / "run.log", delay=True)
    file.setLevel(logging.ERROR)  # whatever level earlier tests have left to the package's loggers
    held = MemoryHandler(1000, flushLevel=100, target=file, flushOnClose=False)
    held.setLevel(logging.ERROR)
    logging.getLogger().addHandler(held)
    try:
        logging.getLogger().error("held back")
        train_in(made, small("trainer.resume=auto", "trainer.checkpoint_every_steps=3"))
        logging.getLogger().error("still there")
    finally:
        logging.getLogger().removeHandler(file)
        file.close()
    assert f"resuming in {old}" in capsys.readouterr().out
    assert not made.exists()
    assert (old / "run.log").read_text().split("\n") == ["held back", "still there", ""]
    assert (identity(old), written) == (before, 6), "five steps and an evaluation"
    assert steps(old, "train/loss") == list(range(1, 9)), "cut back to step 3, then logged again"
    assert steps(old, "val/mAP") == [4, 8]


def test_auto_leaves_finished_busy_and_other_runs_alone(small, fit, ended, tmp_path, capsys):
    fit("trainer.max_steps=1", folder="finished")
    ended(tmp_path / "other", "trainer.max_steps=1", "optim.lr=1e-4", at="end_epoch")
    busy = ended(tmp_path / "busy", "trainer.max_steps=1", "trainer.checkpoint_every_steps=1", at="end_epoch")
    with FileLock(busy / ".lock"):
        train_in(tmp_path / "new", small("trainer.max_steps=1", "trainer.resume=auto"))
    assert "found no unfinished run with this config" in capsys.readouterr().out
    assert (tmp_path / "new" / files.BEST_TOTAL).exists()


def test_a_random_seed_is_chosen_once(small, ended, tmp_path):
    folder = ended(tmp_path, "seed=null", "trainer.checkpoint_every_steps=1", at="train_step", calls=3)
    seed = newest(folder)["config"]["seed"]
    train_in(folder, small("seed=null", "trainer.resume=auto", "trainer.max_steps=3"))
    assert (newest(folder)["config"]["seed"], newest(folder)["step"]) == (seed, 3)


# ----------------------------------------------------------------------------------------------- moments without a step


@pytest.mark.slow
@pytest.mark.parametrize("which", ["raw", "ema"])
def test_a_signal_during_an_evaluation_ends_it(small, fit, tmp_path, monkeypatch, which):
    words = (*EXACT, "trainer.evaluate_weights=both", "trainer.early_stopping=true")
    undisturbed = fit(*words, folder="undisturbed")
    evaluated = []
    evaluate = validation.evaluate

    def evaluate_and_signal(*args, on_batch, **settings):
        def signal_then_note(*found):
            evaluated.append(1)
            if len(evaluated) == {"raw": 1, "ema": 2}[which]:
                signal.raise_signal(signal.SIGTERM)
            on_batch(*found)

        return evaluate(*args, on_batch=signal_then_note, **settings)

    folder = tmp_path / "ended"
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", evaluate_and_signal)
        with pytest.raises(Interrupted):
            train_in(folder, small(*words))
    assert (newest(folder)["epoch"], newest(folder)["closed"]) == (1, 0)
    train_in(folder, small(*words))
    assert rehearsal.compare(undisturbed, folder) == []


def test_a_signal_during_the_test_run_ends_it(small, tmp_path, monkeypatch):
    words, folder = (*EXACT, "trainer.run_test=true", "trainer.epochs=1"), tmp_path / "ended"
    evaluate = validation.evaluate_split

    def evaluate_and_signal(settings, console, run, state, split, *args, **named):
        if split == "test":
            signal.raise_signal(signal.SIGTERM)
        return evaluate(settings, console, run, state, split, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate_split", evaluate_and_signal)
        with pytest.raises(Interrupted):
            train_in(folder, small(*words))
    assert newest(folder)["closed"] == newest(folder)["step"]
    assert train_in(folder, small(*words)) is not None


def test_a_worker_that_is_lost_costs_nothing(small, fit, tmp_path, monkeypatch):
    """Between the first step and the second, with a step that is in no checkpoint yet."""
    undisturbed = fit(*EXACT, folder="undisturbed")
    batches = trainer.batches

    def lost(loader):
        yield next(batches(loader))
        raise WorkerError("gone")

    folder = tmp_path / "ended"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batches", lost)
        with pytest.raises(WorkerError, match=r"gone\. The state is saved; to resume: trainer\.resume=auto"):
            train_in(folder, small(*EXACT))
    assert newest(folder)["step"] == 1
    train_in(folder, small(*EXACT))
    assert rehearsal.compare(undisturbed, folder) == []


@pytest.mark.parametrize(
    ("words", "at", "where", "calls"),
    [
        ("trainer.max_steps=3", "evaluate_epoch", trainer, 1),
        pytest.param("trainer.max_steps=4", "evaluate_epoch", trainer, 1, marks=pytest.mark.slow),
        pytest.param("trainer.run_test=true", "evaluate_split", validation, 2, marks=pytest.mark.slow),
        pytest.param("trainer.run_test=true", "print_result", validation, 1, marks=pytest.mark.slow),
        pytest.param("trainer.checkpoint_interval=2", "copy_as_numbered", trainer, 1, marks=pytest.mark.slow),
    ],
    ids=["within an epoch", "at the end of one", "in the test run", "when all was logged", "before it was numbered"],
)
def test_evaluation_after_the_last_step_is_repeated(small, fit, ended, tmp_path, words, at, where, calls):
    words = (*EXACT, words, "trainer.checkpoint_every_steps=1", "trainer.eval_interval=2")
    undisturbed = fit(*words, folder="undisturbed")
    folder = ended(tmp_path / "ended", *words, at=at, where=where, calls=calls)
    assert newest(folder)["step"] == newest(undisturbed)["step"]
    train_in(folder, small(*words))
    assert rehearsal.compare(undisturbed, folder) == []


def test_a_run_that_had_stopped_early_does_not_train_on(small, fit, ended, tmp_path):
    words = (*EXACT, "trainer.epochs=4", "trainer.early_stopping=true", "trainer.early_stopping_min_delta=2")
    words = (*words, "trainer.early_stopping_patience=1")
    undisturbed = fit(*words, folder="undisturbed")
    assert newest(undisturbed)["epoch"] == 2
    folder = ended(tmp_path / "ended", *words, at="finish", where=trainer)
    train_in(folder, small(*words))
    assert rehearsal.compare(undisturbed, folder) == []


# ------------------------------------------------------------------------------------------------ what is said about it


def test_files_of_other_versions_are_named(small, stopped):
    state = newest(stopped)
    again = small(*FEW, "trainer.max_steps=2", f"trainer.resume={stopped}")
    files.save({name: value for name, value in state.items() if name != "closed"}, stopped / files.NEWEST)
    with pytest.raises(ValueError, match=r"another version.*it has no closed.*model\.weights="):
        train_in(stopped, again)
    renamed = {name.replace("backbone", "body"): tensor for name, tensor in state["model"].items()}
    files.save(state | {"model": renamed}, stopped / files.NEWEST)
    with pytest.raises(ValueError, match=r"does not fit this network.*Missing key.*model\.weights="):
        train_in(stopped, small(*FEW, "trainer.max_steps=2", f"trainer.resume={stopped}"))


def test_settings_that_an_older_version_did_not_know_do_not_matter(small, stopped, capsys):
    state = newest(stopped)
    del state["config"]["model"]["num_denoising"]
    files.save(state, stopped / files.NEWEST)
    train_in(stopped, small(*FEW, "trainer.max_steps=2", f"trainer.resume={stopped}"))
    assert "resumed with model.num_denoising=10 (was not set)" in capsys.readouterr().out


def test_what_checkpoints_no_longer_hold_may_stand_in_them(small, stopped, capsys):
    state = newest(stopped)
    assert "left_out" not in state
    files.save(state | {"left_out": 0}, stopped / files.NEWEST)
    train_in(stopped, small(*FEW, "trainer.max_steps=2", f"trainer.resume={stopped}"))
    assert "resumed" in capsys.readouterr().out


def test_a_single_checkpoint_resumes_and_searches_its_best_again(small, stopped, tmp_path, capsys):
    alone = tmp_path / "alone" / files.NEWEST
    alone.parent.mkdir()
    alone.write_bytes((stopped / files.NEWEST).read_bytes())
    assert newest(stopped)["best"]["ema"]["best_raw"] is not None
    words = (*FEW, "trainer.max_steps=2", f"trainer.resume={alone}")
    train_in(tmp_path / "without", small(*words))
    assert f"resumed without {files.BEST['ema']}" in capsys.readouterr().out
    assert files.load(tmp_path / "without" / files.BEST_TOTAL)["step"] == 2
    (alone.parent / files.BEST["ema"]).write_bytes((stopped / files.BEST["ema"]).read_bytes())
    train_in(tmp_path / "with", small(*words))
    assert "resumed without" not in capsys.readouterr().out
    assert (tmp_path / "with" / files.BEST_TOTAL).is_file()


def test_differences_are_reported(small, stopped, capsys):
    state = newest(stopped)
    files.save(state | {"data_fingerprint": "of other data"}, stopped / files.NEWEST)
    train_in(stopped, small(*FEW, "trainer.max_steps=2", "optim.lr=5e-4", f"trainer.resume={stopped}"))
    said = capsys.readouterr().out
    assert "resumed with optim.lr=0.0005 (was 0.001)" in said
    assert "resumed with trainer.max_steps=2 (was 1)" in said
    assert "changed data" in said


def test_weights_for_inference_cannot_be_resumed(small, stopped):
    with pytest.raises(ValueError, match=r"holds weights only and cannot be resumed.*model\.weights="):
        train_in(stopped, small(f"trainer.resume={stopped / files.BEST_TOTAL}"))
    with pytest.raises(ValueError, match=r"there is no such checkpoint; use trainer\.resume=auto or null"):
        train_in(stopped, small("trainer.resume='~/absent.pth'"))


def test_identity_ignores_what_changes_no_number(small):
    def identity_of(*words):
        return origin.identity(build.plain(small(*words)))

    free = ("trainer.progress_bar=tqdm", "tracker=mlflow", "data.num_workers=3", "trainer.run_test=true")
    assert identity_of() == identity_of(*free)
    assert len({identity_of(), identity_of("optim.lr=2e-3"), identity_of("seed=1"), identity_of("seed=null")}) == 4


# ------------------------------------------------------------------------------------------ numbers that are no numbers


def test_weights_that_are_not_finite_replace_no_file(small, fit, monkeypatch):
    folder = fit("trainer.max_steps=2", "trainer.checkpoint_every_steps=1")
    before = {name: (folder / name).read_bytes() for name in (files.NEWEST, files.BEST["ema"])}
    step = Trainer.train_step

    def poison(self, run, state, window):
        found = step(self, run, state, window)
        state.parameters[0].data[:] = float("inf")
        return found

    monkeypatch.setattr(Trainer, "train_step", poison)
    with pytest.raises(RuntimeError, match=r"checkpoint\.pth was not written, because weights are not finite"):
        train_in(folder, small("trainer.max_steps=4", "trainer.checkpoint_every_steps=1", f"trainer.resume={folder}"))
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_batch_statistics_of_a_bad_first_step_are_undone(small, tmp_path, monkeypatch):
    step = Trainer.train_step

    def poison(self, run, state, window):
        if state.step == 0:
            window[0].pixels = lambda *_: torch.full((2, 3, 64, 64), float("nan"))
            window[0].to = lambda *_, **__: window[0]
        return step(self, run, state, window)

    monkeypatch.setattr(Trainer, "train_step", poison)
    train_in(tmp_path, small("trainer.max_steps=3"))
    assert all(torch.isfinite(tensor).all() for tensor in newest(tmp_path)["model"].values())
    logged = [line for line in rehearsal.metrics(tmp_path) if "train/loss" in line]
    assert [line["train/nonfinite_steps"] for line in logged] == [1, 0, 0]
    assert len({line["train/nonfinite_costs"] for line in logged} - {0}) == 1, "matched once, counted from the start"


def test_a_run_that_ends_before_its_first_step_does_not_say_that_it_is_saved(small, tmp_path, monkeypatch, capsys):
    def end(*_):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(trainer, "save_training_samples", end)
    with pytest.raises(Interrupted):
        train_in(tmp_path, small())
    assert f"ended before the first step; {tmp_path} holds nothing to go on from" in capsys.readouterr().out
