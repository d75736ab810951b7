"""Our training beside that of transformers, from the same weights in float64: the script's own comparison."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SMALL = [
    "model=rtdetrv2_tiny",
    "model.backbone.widths=[8,12,16,24]",
    "model.image_size=[96,96]",
    *(f"model.{key}=32" for key in ("hidden_dim", "neck.hidden_dim", "dim_feedforward", "neck.dim_feedforward")),
    "model.num_queries=20",
    "data.source.size=96",
    "data=shapes",
    "data.train=16",
    "trainer.batch_size=4",
    "trainer.epochs=3",
    "optim.lr=1e-3",
    "optim.warmup=3",
    "optim.warmup_unit=steps",
]


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    import step_by_step

    yield step_by_step.steps
    for name in ("step_by_step", "training_step"):
        sys.modules.pop(name, None)


def test_losses_agree_to_the_last_digits(steps):
    taken = list(islice(steps(SMALL), 8))
    assert [pair.flipped for pair in taken] == [""] * 8
    assert max(pair.difference for pair in taken) < 1e-12
    assert taken[0].ours != taken[-1].ours


@pytest.mark.parametrize(
    ("override", "first"),
    [("loss.weight_giou=2.1", 1), ("optim.weight_decay=0.3", 2), ("trainer.clip_max_norm=0", 2)],
)
def test_what_differs_is_seen(steps, override, first, monkeypatch):
    """A setting that only our side takes moves the losses from the step on which it can act."""
    import step_by_step

    theirs, base = step_by_step.their_step, step_by_step.build.compose([*step_by_step.SAME, *SMALL])
    monkeypatch.setattr(
        step_by_step, "their_step", lambda peer, network, cfg, length: theirs(peer, network, base, length)
    )
    taken = list(islice(steps([*SMALL, override]), 2))
    assert next(pair.step for pair in taken if pair.difference > 1e-9) == first


def test_the_first_flipped_match_ends_it_and_is_named(steps):
    *_, last = islice(steps([*SMALL, "matcher.cost_bbox=0"]), 4)
    assert last.flipped
    assert "query" in last.flipped
