"""The programs that train: what they write is of the right images, classes and pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp.contest.job import Facts, Job
from detr_exp.contest.scores import scored
from detr_exp.contest.sets import read_set, write_fold
from detr_exp.data.part import restricted
from detr_exp.values import Values

Program = Callable[[Job], tuple[list[Values], Facts]]
SMALL = [
    *("model=rtdetrv2_tiny", "model.num_queries=20", "data/augment=none", "trainer.hardware.amp=null", "optim.lr=1e-3"),
    *("trainer.ema_decay=0.5", "trainer.hardware.channels_last=false"),
]


def contend(program: Program, squares: Path, tmp_path: Path, epochs: int, **options: object) -> tuple[Facts, Values]:
    data = read_set("squares", str(squares), 2)
    write_fold(data.content, data.folds[0], tmp_path / "given")
    (tmp_path / "job").mkdir()
    job = Job(str(tmp_path / "given"), str(tmp_path / "job"), 0, epochs, 64, 2, None, options)
    found, facts = program(job)
    assert {one["image_id"] for one in found} == set(data.folds[0].held_out)
    assert {one["category_id"] for one in found} == {3}
    return facts, scored(restricted(data.truth, data.folds[0].held_out), found, 30)


@pytest.mark.slow
def test_ours_finds_what_it_was_trained_on(squares: Path, tmp_path: Path) -> None:
    """Every image has the same square, so that a network that is read and written rightly finds it at once."""
    from detr_exp.contest.ours import contend as ours

    facts, scores = contend(ours, squares, tmp_path, 15, overrides=SMALL)
    assert facts.steps == 15 * 2
    assert facts.cpu_seconds > 0
    assert scores["AP50"] > 0.5


def test_transformers_is_given_the_same_images_and_classes(squares: Path, tmp_path: Path) -> None:
    pytest.importorskip("albumentations")
    pytest.importorskip("accelerate")
    from detr_exp.contest.with_transformers import contend as theirs

    sizes = {"encoder_hidden_dim": 32, "encoder_ffn_dim": 64, "encoder_attention_heads": 2, "d_model": 32}
    sizes |= {"decoder_in_channels": [32] * 3, "decoder_ffn_dim": 64, "decoder_attention_heads": 2, "decoder_layers": 2}
    sizes |= {"num_queries": 20, "freeze_backbone_batch_norms": False}
    options = {"backbone": "resnet10t", "network": sizes, "training": {"learning_rate": 1e-3, "max_grad_norm": 0.1}}
    facts, _ = contend(theirs, squares, tmp_path, 2, **options)
    assert facts.steps == 2 * 3
