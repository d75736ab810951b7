"""Evaluations within an epoch: where they are, that they change no step, and that a resumed run repeats none."""

import pytest

from detr_exp import build
from detr_exp.signals import Interrupted
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import trainer, trial, validation
from detr_exp.training import train_in
from tests.trainer.test_resume import EXACT, rehearsal, rows, steps

EVERY = (*EXACT, "data.train=12", "trainer.eval_every_steps=4", "trainer.evaluate_weights=both")  # an epoch: 6 steps


@pytest.fixture(scope="module")
def shown():
    """The epochs that a pruner is shown."""
    return []


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory, shown):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "pruning_check", lambda: lambda epoch, value: bool(shown.append(epoch)))
        train_in(folder, small(*EVERY))
    return folder


def test_evaluations_are_at_steps_and_at_ends_of_epochs(undisturbed, shown):
    assert steps(undisturbed, "val/mAP") == [4, 6, 8, 12]
    assert [float(row["epoch"]) for row in rows(undisturbed)] == [0.6667, 1, 1.3333, 2]
    assert [int(row["step"]) for row in rows(undisturbed)] == [4, 6, 8, 12]
    assert shown == [1, 2], "pruners compare trials by epochs"


def test_they_change_no_step(small, undisturbed, tmp_path):
    train_in(tmp_path, small(*(word for word in EVERY if "eval_every" not in word)))
    assert steps(tmp_path, "val/mAP") == [6, 12]
    one, two = (files.load(folder / files.NEWEST) for folder in (undisturbed, tmp_path))
    for name in ("model", "ema", "optimizer"):
        assert rehearsal.differences(one[name], two[name]) == []
    losses = [
        [line["train/loss"] for line in rehearsal.metrics(folder) if "train/loss" in line]
        for folder in (undisturbed, tmp_path)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before", marks=pytest.mark.slow),
        "in the second of two",
        pytest.param("after", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_repeats_no_step_and_no_evaluation(small, undisturbed, tmp_path, monkeypatch, moment):
    def interrupted(*args, **settings):
        raise Interrupted(15)

    words = (*EVERY, "trainer.checkpoint_every_steps=4")
    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(trainer, "evaluate_epoch", interrupted)
        elif moment == "in the second of two":
            evaluate_split = validation.evaluate_split
            patch.setattr(
                validation,
                "evaluate_split",
                lambda *args, **settings: (interrupted if args[5] == "ema" else evaluate_split)(*args, **settings),
            )
        else:
            patch.setattr(trainer, "print_epoch", interrupted)
        with pytest.raises(Interrupted):
            train_in(tmp_path, small(*words))
    assert files.load(tmp_path / files.NEWEST)["step"] == 4
    train_in(tmp_path, small(*words))
    found = rehearsal.compare(undisturbed, tmp_path)
    assert [one for one in found if "config" not in one] == []
    assert rows(tmp_path) == rows(undisturbed)


def test_a_part_of_an_epoch_is_the_length_of_a_run_and_a_larger_part_goes_on(small, tmp_path):
    words = (*EXACT, "data.train=12")
    train_in(tmp_path, small(*words, "trainer.epochs=0.5"))
    assert steps(tmp_path, "val/mAP") == [3]
    train_in(tmp_path, small(*words, "trainer.epochs=1.5", "trainer.resume=auto"))
    assert steps(tmp_path, "val/mAP")[-2:] == [6, 9]
    assert files.load(tmp_path / files.NEWEST)["step"] == 9


def test_early_stopping_counts_them_and_ends_within_an_epoch(small, tmp_path):
    words = ("trainer.early_stopping=true", "trainer.early_stopping_min_delta=2", "trainer.early_stopping_patience=1")
    train_in(tmp_path, small(*EVERY, *words, "trainer.eval_every_steps=2"))
    assert steps(tmp_path, "val/mAP") == [2, 4]
    assert (tmp_path / files.BEST_TOTAL).exists()
    newest = files.load(tmp_path / files.NEWEST)
    assert (newest["step"], newest["epoch"]) == (4, 0)
    train_in(tmp_path, small(*EVERY, *words, "trainer.eval_every_steps=2"))
    assert files.load(tmp_path / files.NEWEST)["step"] == 4, "it had ended"


def test_the_second_stage_needs_ends_of_epochs(small):
    with pytest.raises(ValueError, match=r"trainer\.eval_every_steps is 4, but trainer\.restart_epoch.*=null"):
        build.trainer(small(*EVERY, "trainer.restart_epoch=1"))
