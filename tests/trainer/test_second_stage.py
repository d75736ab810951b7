"""Going back to the best of the first stage; what an epoch reaches is prescribed."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from detr_exp import build
from detr_exp.signals import Interrupted
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import trainer, validation
from detr_exp.training import train_in

# Epochs from 1. The second stage begins after the third one, at the state after the second; the fifth is worse than the
# fourth, so the sixth starts from there again.
REACHED = {1: 0.2, 2: 0.5, 3: 0.3, 4: 0.4, 5: 0.35, 6: 0.3, 7: 0.6}
WORDS = ["trainer.epochs=7", "trainer.restart_epoch=3", "trainer.checkpoint_interval=1", "trainer.keep_checkpoints=9"]
WORDS += [
    "data.train=4",
    "data.val=2",
    "data.test=0",
    "model.num_layers=1",
    "model.num_denoising=0",
    "trainer.num_pictures=0",
]
STEPS = 2  # of an epoch


@pytest.fixture
def prescribed(monkeypatch):
    measure = validation.evaluate_split

    def evaluate(settings, console, run, state, *words, **how):
        return measure(settings, console, run, state, *words, **how) | {"mAP": REACHED[state.epoch_number]}

    monkeypatch.setattr(validation, "evaluate_split", evaluate)


def learnt(folder, epoch: int) -> dict:
    state = files.load(folder / f"checkpoint_{epoch}.pth")
    return {"model": state["model"], "ema": state["ema"], "moments": state["optimizer"]["state"]}


def returns(folder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/returned_to_epoch"]) for line in lines if "train/returned_to_epoch" in line]


def assert_same(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rtdetrv2_tiny", "dfine_tiny"], indirect=True)
def test_it_goes_back_and_a_run_that_is_stopped_there_too(
    prescribed, fit, small, family, tmp_path, monkeypatch
) -> None:
    words = (*family, *WORDS)
    whole = fit(*words)
    assert returns(whole) == [(3 * STEPS, 2.0), (5 * STEPS, 2.0)]
    for epoch in (3, 5):
        assert_same(learnt(whole, epoch), learnt(whole, 2))
        assert files.load(whole / f"checkpoint_{epoch}.pth")["epoch"] == epoch
    weight = "decoder.enc_output.proj.weight"
    kept = {epoch: learnt(whole, epoch)["model"][weight] for epoch in (2, 4, 6, 7)}
    assert not any(torch.equal(kept[2], kept[epoch]) for epoch in (4, 6, 7))
    assert files.load(whole / files.BEST_TOTAL)["epoch"] == 7

    step, save = trainer.Trainer.train_step, trainer.save_training

    def stopped(self, run, state, window):
        if state.step == 5 * STEPS - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, run, state, window)

    def killed(run, state, *name, **thread):
        if state.closed == 3 * STEPS:  # went back, and did not write it any more
            raise KeyboardInterrupt
        save(run, state, *name, **thread)

    for how, ending in ((stopped, Interrupted), (killed, KeyboardInterrupt)):
        folder = tmp_path / how.__name__
        with monkeypatch.context() as patch:
            if how is stopped:
                patch.setattr(trainer.Trainer, "train_step", how)
            else:
                patch.setattr(trainer, "save_training", how)
            with pytest.raises(ending):
                train_in(folder, small(*words))
        train_in(folder, small(*words, "trainer.resume=auto"))
        assert_same(learnt(folder, 7), learnt(whole, 7))
        assert returns(folder) == returns(whole)


def test_without_the_best_of_the_first_stage_it_goes_on_and_says_so(prescribed, fit, small, tmp_path, capsys) -> None:
    folder = fit(*WORDS, "trainer.max_steps=4")
    (folder / files.FIRST_STAGE).unlink()
    train_in(folder, small(*WORDS, "trainer.max_steps=7", "trainer.resume=auto"))
    assert "has not the best of the first stage" in capsys.readouterr().out
    assert returns(folder) == []


def test_a_second_stage_after_the_end_is_pointed_out(small) -> None:
    with pytest.warns(UserWarning, match="no second stage: trainer.restart_epoch=1"):
        build.trainer(small("trainer.restart_epoch=9"))
