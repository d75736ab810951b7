"""The recipes of LW-DETR, each line against the scripts of their authors."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.data.sampler import multi_scale_sizes
from detr_exp.model.pretrained_lwdetr import NAMES
from detr_exp.model.pretrained_rtdetr import renamed_by

COCO = ("model.weights=null", "model.backbone.pretrained=false", "data.root=.", "data.num_classes=91")


class Recipe(NamedTuple):
    """Arguments of a script; `component` is the decay from the heads to the decoder, and from there to the backbone."""

    batch: int
    blocks: int
    layer: float
    component: float
    drop_path: float
    decay: float


RECIPES = {
    "tiny": Recipe(32, 6, 0.8, 0.7, 0.0, 1e-4),
    "small": Recipe(32, 10, 0.8, 0.7, 0.0, 1e-4),
    "medium": Recipe(16, 10, 0.7, 0.7, 0.0, 1e-4),
    "large": Recipe(16, 10, 0.7, 0.5, 0.1, 1e-4),
    "xlarge": Recipe(16, 10, 0.75, 0.5, 0.1, 1e-3),
}


def test_every_recipe_is_in_the_table() -> None:
    found = {path.stem for path in (CONF_DIR / "experiment").glob("lwdetr_*.yaml")}
    assert found == {f"lwdetr_{size}_coco" for size in RECIPES}


@pytest.mark.parametrize("size", RECIPES)
def test_a_recipe_trains_as_its_authors_did(size: str) -> None:
    cfg, recipe = compose([f"experiment=lwdetr_{size}_coco", *COCO]), RECIPES[size]
    given = compose([f"experiment=lwdetr_{size}_coco"])
    assert given.model.weights == f"lwdetr_{size}_objects365"
    trainer, data, backbone = cfg.trainer, cfg.data, cfg.model.backbone
    assert (trainer.epochs, trainer.batch_size, trainer.grad_accum_steps) == (60, recipe.batch, 1)
    assert (trainer.clip_max_norm, trainer.ema_decay, trainer.ema_tau, trainer.hardware.amp) == (0.1, 0.9997, 0, None)
    assert multi_scale_sizes(data.multi_scale, (640, 640), 64) == [(side, side) for side in range(448, 897, 64)]
    augment = {name for name, value in data.augment.items() if value and not name.startswith(("_", "zoom_out_max"))}
    assert {name: data.augment[name] for name in augment} == {"flip": 0.5, "resize_crop": 0.5}
    assert data.category_ids == "raw"
    assert (backbone.depth, backbone.drop_path) == (recipe.blocks, recipe.drop_path)
    factor = build.schedule(cfg)(1000, 60_000)
    assert {factor(step) for step in (0, 1, 30_000, 59_999)} == {1.0}
    assert (cfg.loss.weight_class, cfg.loss.weight_bbox, cfg.loss.weight_giou) == (1, 5, 2)


@pytest.mark.parametrize("size", ["tiny", "xlarge"])
def test_rates_and_decays_of_parameters(size: str) -> None:
    cfg, recipe = compose([f"experiment=lwdetr_{size}_coco", *COCO]), RECIPES[size]
    with torch.device("meta"):
        network = build.network(cfg)
    ours = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {
        ours[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in build.optimizer(cfg)(network).param_groups
        for parameter in group["params"]
    }
    for name, theirs in zip(found, renamed_by(found, NAMES)):
        rate, decay = 1e-4, recipe.decay
        if theirs.startswith("backbone.0.encoder."):
            parts = theirs.split(".")
            depth = int(parts[4]) + 1 if parts[3] == "blocks" else 0
            rate = 1.5e-4 * recipe.component**2 * recipe.layer ** (recipe.blocks + 1 - depth)
            decay = 0 if any(word in theirs for word in ("gamma", "pos_embed", "bias", "norm")) else decay
        elif name.startswith(("layers.", "norm.", "queries.position_mlp.")):
            rate *= recipe.component
        assert found[name] == pytest.approx((rate, decay)), name
