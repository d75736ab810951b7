"""The recipes of EdgeCrafter, each line against the tables of its authors."""

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
    """A column of the table; `dense` is the last epoch of mosaic and mixup and of the first rate."""

    epochs: int
    stop: int
    dense: int
    share: float
    lr_backbone: float
    decay: float


RECIPES = {
    "ecdet_s": Recipe(74, 72, 36, 0.75, 2.5e-5, 1e-4),
    "ecdet_m": Recipe(62, 60, 30, 0.75, 2.5e-5, 1e-4),
    "ecdet_l": Recipe(50, 48, 24, 1.0, 5e-6, 1.25e-4),
    "ecdet_x": Recipe(50, 48, 24, 1.0, 2.5e-6, 1.25e-4),
    "ecseg_s": Recipe(74, 72, 36, 0.75, 2.5e-5, 1e-4),
    "ecseg_m": Recipe(74, 72, 36, 0.75, 2.5e-5, 1e-4),
    "ecseg_l": Recipe(50, 48, 24, 1.0, 2.5e-6, 1.25e-4),
    "ecseg_x": Recipe(50, 48, 24, 1.0, 2.5e-6, 1.25e-4),
}
# of poses; batch and accumulation
POSES = {
    "ecpose_s": (Recipe(92, 90, 45, 0.5, 2.5e-5, 1e-4), 32, 1),
    "ecpose_m": (Recipe(92, 90, 45, 0.5, 2.5e-5, 1e-4), 32, 1),
    "ecpose_l": (Recipe(74, 72, 48, 0.5, 2.5e-6, 1.25e-4), 16, 2),
    "ecpose_x": (Recipe(74, 72, 48, 0.5, 2.5e-6, 1.25e-4), 16, 2),
}


def test_every_recipe_is_in_the_table() -> None:
    found = {path.stem for path in (CONF_DIR / "experiment").glob("ec*.yaml")}
    assert found == {f"{name}_coco" for name in (*RECIPES, *POSES)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_as_its_authors_did(name: str) -> None:
    cfg, recipe = compose([f"experiment={name}_coco", *COCO]), RECIPES[name]
    trainer, optim, data, loss = cfg.trainer, cfg.optim, cfg.data, cfg.loss
    assert list(cfg.model.image_size) == [640, 640]
    assert (trainer.epochs, trainer.batch_size, trainer.restart_epoch) == (recipe.epochs, 32, recipe.stop)
    assert (trainer.clip_max_norm, trainer.ema_decay, trainer.ema_tau) == (0.1, 0.9999, 1000)
    assert (optim.lr, optim.lr_backbone, optim.weight_decay) == (5e-4, recipe.lr_backbone, recipe.decay)
    assert len(multi_scale_sizes(data.multi_scale, (640, 640), 32)) == 1
    assert data.stop_epoch == recipe.stop
    dense = [0, recipe.dense]
    assert (data.phases.strong, data.phases.mosaic, data.phases.mixup) == ([0, recipe.stop], dense, dense)
    assert (data.augment.mosaic, data.augment.mixup) == (recipe.share, recipe.share)
    masks = name.startswith("ecseg")
    assert (loss.weight_class, loss.weight_bbox, loss.weight_giou) == ((2, 1, 1) if masks else (1, 5, 2))
    assert (cfg.matcher.cost_class, cfg.matcher.cost_bbox, cfg.matcher.cost_giou) == ((2, 1, 1) if masks else (2, 5, 2))
    assert (loss.focal_gamma, loss.weight_fgl, loss.weight_ddf) == (1.5, 0.15, 1.5)
    assert (loss.weight_mask_ce, loss.weight_mask_dice) == (5, 5)
    places = ["layers", "initial", "denoising"] if masks else ["layers", "encoder"]
    assert loss.terms.mask_ce.at == loss.terms.mask_dice.at == places
    assert (cfg.model.ffn_activation, cfg.model.head_activation, cfg.model.norm_type) == ("silu", "silu", "layer")
    factor = build.schedule(cfg)(1000, 1000 * recipe.epochs)
    assert (factor(0), factor(1000)) == (0.0, 0.25), "a quadratic warm-up of 2000 steps"
    assert factor(1000 * recipe.dense) == 1.0 > factor(1000 * recipe.dense + 2000)
    assert factor(1000 * recipe.stop) == 0.5 == factor(1000 * recipe.epochs - 1)


@pytest.mark.parametrize("name", POSES)
def test_a_recipe_of_poses_trains_as_its_authors_did(name: str) -> None:
    cfg, (recipe, batch, parts) = compose([f"experiment={name}_coco", *COCO]), POSES[name]
    trainer, optim, data, loss = cfg.trainer, cfg.optim, cfg.data, cfg.loss
    assert list(cfg.model.image_size) == [640, 640]
    assert (trainer.epochs, trainer.batch_size, trainer.grad_accum_steps) == (recipe.epochs, batch, parts)
    assert (trainer.clip_max_norm, trainer.ema_decay, trainer.ema_tau) == (0.1, 0.9999, 2000)
    assert trainer.restart_epoch is None
    assert (optim.lr, optim.lr_backbone, optim.weight_decay) == (5e-4, recipe.lr_backbone, recipe.decay)
    assert (data.category_ids, data.multi_scale, data.stop_epoch) == ("raw", None, recipe.stop)
    dense = [4, recipe.dense]
    assert (data.phases.strong, data.phases.mosaic, data.phases.mixup) == ([4, recipe.stop], dense, dense)
    augment = data.augment
    assert (augment.mosaic, augment.mixup, augment.photometric, augment.flip) == (recipe.share, recipe.share, 0.5, 0.5)
    assert (augment.zoom_out, augment.zoom_out_max, augment.iou_crop) == (0.5, 2.5, 0)
    assert (loss.weight_class, loss.weight_keypoint_distance, loss.weight_keypoint_oks) == (2, 10, 4)
    assert (loss.class_loss.alpha, loss.class_loss.gamma) == (0.25, 2)
    assert (cfg.matcher.cost_class, cfg.matcher.cost_bbox, cfg.matcher.cost_giou) == (2, 0, 0)
    factor = build.schedule(cfg)(1000, 1000 * recipe.epochs)
    assert (factor(249), factor(499), factor(1000 * recipe.epochs - 1)) == (0.5, 1.0, 1.0), "a linear warm-up"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ecdet_s", {(2.5e-5, 1e-4): 53, (2.5e-5, 0): 103, (5e-4, 0): 204, (5e-4, 1e-4): 122}),
        ("ecpose_s", {(2.5e-5, 1e-4): 53, (2.5e-5, 0): 103, (5e-4, 0): 200, (5e-4, 1e-4): 120}),
    ],
)
def test_groups_of_parameters(name: str, counts: dict[tuple[float, float], int]) -> None:
    """By rate and decay: tensors. What is beside the transformer learns as the encoder does."""
    cfg = compose([f"experiment={name}_coco", *COCO, *(["model.keypoint_counts=[0,17]"] if "pose" in name else [])])
    with torch.device("meta"):
        network = build.network(cfg)
    tensors: Counter[tuple[float, float]] = Counter()
    for group in build.optimizer(cfg)(network).param_groups:
        tensors[group["lr"], group["weight_decay"]] += len(group["params"])
    assert tensors == counts
