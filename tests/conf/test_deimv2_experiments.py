"""The recipes of DEIMv2, each line against the tables of their authors."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.data.sampler import multi_scale_sizes

COCO = ("model.weights=null", "model.backbone.pretrained=false", "data.root=.", "data.num_classes=80")


class Recipe(NamedTuple):
    """A column of the table; `late` is the first epoch with the other matching, `flat` the epochs at the first rate."""

    side: int
    epochs: int
    stop: int
    strong: tuple[int, int]
    mosaic: tuple[int, int]
    flat: int | None
    final: int
    warmup: int
    batch: int
    lr: float
    lr_backbone: float
    decay: float
    late: int
    least_side: float
    mosaics: float
    sizes: int


LITE = {"epochs": 500, "stop": 468, "strong": (4, 400), "mosaic": (4, 250), "flat": 250, "final": 32, "warmup": 4000}
LITE |= {"batch": 128, "decay": 1e-4, "late": 450, "sizes": 1}
RECIPES = {
    "atto": Recipe(side=320, lr=2e-3, lr_backbone=1e-3, least_side=12, mosaics=0.3, **LITE),
    "femto": Recipe(side=416, lr=1.6e-3, lr_backbone=8e-4, least_side=10, mosaics=0.5, **LITE),
    "pico": Recipe(side=640, lr=1.6e-3, lr_backbone=8e-4, least_side=8, mosaics=0.5, **LITE),
    "n": Recipe(640, 160, 148, (4, 148), (4, 78), None, 12, 2000, 32, 8e-4, 4e-4, 1e-4, 136, 1, 0.5, 1),
    "s": Recipe(640, 132, 120, (4, 120), (4, 64), 64, 12, 2000, 32, 5e-4, 2.5e-5, 1e-4, 100, 1, 0.5, 30),
    "m": Recipe(640, 102, 90, (4, 90), (4, 49), 49, 12, 2000, 32, 5e-4, 2.5e-5, 1e-4, 80, 1, 0.5, 16),
    "l": Recipe(640, 68, 60, (4, 60), (4, 34), 34, 8, 2000, 32, 5e-4, 1.25e-5, 1.25e-4, 50, 1, 0.5, 13),
    "x": Recipe(640, 58, 50, (4, 50), (4, 29), 29, 8, 2000, 32, 5e-4, 1e-5, 1.25e-4, 45, 1, 0.5, 13),
}
LITES = ("atto", "femto", "pico")
# parameters by rate and decay: tensors
GROUPS = {
    "atto": {(1e-3, 1e-4): 115, (2e-3, 0): 69, (2e-3, 1e-4): 117},
    "pico": {(8e-4, 1e-4): 149, (1.6e-3, 0): 111, (1.6e-3, 1e-4): 75},
    "n": {(4e-4, 1e-4): 186, (8e-4, 0): 132, (8e-4, 1e-4): 87},
    "s": {(2.5e-5, 1e-4): 50, (2.5e-5, 0): 97, (5e-4, 0): 194, (5e-4, 1e-4): 138},
    # of timm's DINOv3, with two biases for one of three parts, and without a token that is not used
    "l": {(1.25e-5, 1.25e-4): 76 - 1, (1.25e-5, 0): 99 + 12, (5e-4, 0): 226, (5e-4, 1.25e-4): 154},
}


def test_every_recipe_is_in_the_table() -> None:
    found = {path.stem for path in (CONF_DIR / "experiment").glob("deimv2_*.yaml")}
    assert found == {f"deimv2_{size}_coco" for size in RECIPES}


@pytest.mark.parametrize("size", RECIPES)
def test_a_recipe_trains_as_its_authors_did(size: str) -> None:
    cfg, recipe = compose([f"experiment=deimv2_{size}_coco", *COCO]), RECIPES[size]
    trainer, optim, data = cfg.trainer, cfg.optim, cfg.data
    assert list(cfg.model.image_size) == [recipe.side] * 2
    assert (trainer.epochs, trainer.batch_size, trainer.restart_epoch) == (recipe.epochs, recipe.batch, recipe.stop)
    assert (optim.lr, optim.lr_backbone, optim.weight_decay) == (recipe.lr, recipe.lr_backbone, recipe.decay)
    assert (trainer.clip_max_norm, trainer.ema_decay, trainer.ema_tau) == (0.1, 0.9999, 1000)
    assert len(multi_scale_sizes(data.multi_scale, (recipe.side,) * 2, 32)) == recipe.sizes
    is_lite = size in LITES
    assert data.stop_epoch == recipe.stop
    assert (tuple(data.phases.strong), tuple(data.phases.mosaic)) == (recipe.strong, recipe.mosaic)
    assert data.phases.mixup == (None if is_lite else list(recipe.mosaic))
    augment = data.augment
    assert (augment.mosaic, augment.mixup) == (recipe.mosaics, 0.0 if is_lite else 0.5)
    assert (augment.least_side, augment.photometric, augment.zoom_out, augment.iou_crop) == (
        recipe.least_side,
        0.5,
        0.5,
        0.8,
    )
    blends = [] if is_lite or size == "n" else [("detr_exp.data.copy_blend.CopyBlend", 0.5, 3)]
    assert [(one["_target_"], one.chance, one.most) for one in augment.get("operations", [])] == blends
    assert (cfg.matcher.late_epoch, cfg.matcher.late_power) == (recipe.late, 4.0)
    assert (cfg.model.ffn_activation, cfg.model.head_activation) == ("swiglu", "silu")
    assert (cfg.loss.focal_gamma, "fgl" in cfg.loss.terms) == (1.5, not is_lite)
    factor = build.schedule(cfg)(1000, 1000 * recipe.epochs)
    assert (factor(0), factor(recipe.warmup // 2)) == (0.0, 0.25), "a quadratic warm-up"
    if recipe.flat is None:
        assert factor(1000 * recipe.epochs - 1) == 1.0
    else:
        assert factor(1000 * recipe.flat) == 1.0
        assert factor(1000 * recipe.flat + 2000) < 1.0
        assert factor(1000 * (recipe.epochs - recipe.final)) == 0.5 == factor(1000 * recipe.epochs - 1)


@pytest.mark.parametrize("size", GROUPS)
def test_groups_of_parameters(size: str) -> None:
    cfg = compose([f"experiment=deimv2_{size}_coco", *COCO])
    with torch.device("meta"):
        network = build.network(cfg)
    tensors: Counter[tuple[float, float]] = Counter()
    for group in build.optimizer(cfg)(network).param_groups:
        tensors[group["lr"], group["weight_decay"]] += len(group["params"])
    assert tensors == GROUPS[size]
