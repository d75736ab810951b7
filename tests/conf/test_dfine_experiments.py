"""The recipes of D-FINE and DEIM, each line against the tables of their authors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.data.sampler import multi_scale_sizes

OFFLINE = ("model.weights=null", "model.backbone.pretrained=false")
COCO, OBJECTS365 = ("data.root=.", "data.num_classes=80"), ("data.root=.",)

# epochs, where strong augmentation ends, images of a step, rates, weight decay, entries of the list of sizes
TRAINING = {
    "dfine_n_coco": (160, 148, 128, 8e-4, 4e-4, 1e-4, 1),
    "dfine_s_coco": (132, 120, 32, 2e-4, 1e-4, 1e-4, 30),
    "dfine_m_coco": (132, 120, 32, 2e-4, 2e-5, 1e-4, 16),
    "dfine_l_coco": (80, 72, 32, 2.5e-4, 1.25e-5, 1.25e-4, 14),
    "dfine_x_coco": (80, 72, 32, 2.5e-4, 2.5e-6, 1.25e-4, 13),
    "dfine_n_obj365": (48, None, 128, 8e-4, 4e-4, 1e-4, 1),
    "dfine_s_obj365": (36, None, 32, 2.5e-4, 1.25e-4, 1.25e-4, 30),
    "dfine_m_obj365": (36, None, 32, 2.5e-4, 2.5e-5, 1.25e-4, 16),
    "dfine_l_obj365": (24, None, 32, 2.5e-4, 1.25e-5, 1.25e-4, 14),
    "dfine_x_obj365": (24, None, 32, 2.5e-4, 2.5e-6, 1.25e-4, 13),
    "dfine_n_obj2coco": (64, 56, 128, 8e-4, 4e-4, 1e-4, 1),
    "dfine_s_obj2coco": (64, 56, 32, 2.5e-4, 1.25e-4, 1.25e-4, 20),
    "dfine_m_obj2coco": (56, 48, 32, 2.5e-4, 2.5e-5, 1.25e-4, 16),
    "dfine_l_obj2coco": (36, 30, 32, 2.5e-4, 1.25e-5, 1.25e-4, 14),
    "dfine_x_obj2coco": (36, 30, 32, 2.5e-4, 2.5e-6, 1.25e-4, 13),
    "dfine_s_custom": (220, 200, 64, 4e-4, 2e-4, 1e-4, 30),
    "deim_dfine_n_coco": (160, 148, 128, 8e-4, 4e-4, 1e-4, 1),
    "deim_dfine_s_coco": (132, 120, 32, 4e-4, 2e-4, 1e-4, 30),
    "deim_dfine_m_coco": (102, 90, 32, 4e-4, 4e-5, 1e-4, 16),
    "deim_dfine_l_coco": (58, 50, 32, 5e-4, 2.5e-5, 1.25e-4, 14),
    "deim_dfine_x_coco": (58, 50, 32, 5e-4, 5e-6, 1.25e-4, 13),
    "deim_dfine_x_obj2coco": (24, 20, 32, 2.5e-4, 2.5e-6, 1.25e-4, 13),
    "deim_rtdetrv2_r18vd": (120, 117, 16, 2e-4, None, 1e-4, 1),
    "deim_rtdetrv2_r34vd": (120, 117, 16, 2e-4, 1e-4, 1e-4, 13),
    "deim_rtdetrv2_r50vd_m": (60, 58, 16, 2e-4, 2e-5, 1e-4, 13),
    "deim_rtdetrv2_r50vd": (60, 58, 16, 2e-4, 2e-5, 1e-4, 13),
    "deim_rtdetrv2_r101vd": (60, 58, 16, 2e-4, 2e-6, 1e-4, 13),
}
# DEIM: first epoch with strong augmentation, first without mosaic and mixup; epochs at the first rate and at the last
PHASES = {
    "deim_dfine_n_coco": (4, 78, None, None),
    "deim_dfine_s_coco": (4, 64, 64, 12),
    "deim_dfine_m_coco": (4, 49, 49, 12),
    "deim_dfine_l_coco": (4, 29, 29, 8),
    "deim_dfine_x_coco": (4, 29, 29, 8),
    "deim_dfine_x_obj2coco": (2, 12, None, None),
    "deim_rtdetrv2_r18vd": (4, 64, 64, 3),
    "deim_rtdetrv2_r34vd": (4, 64, 64, 3),
    "deim_rtdetrv2_r50vd_m": (4, 34, 34, 2),
    "deim_rtdetrv2_r50vd": (4, 34, 34, 2),
    "deim_rtdetrv2_r101vd": (4, 34, 34, 2),
}
EMA = {"dfine": 1000, "deim_dfine": 1000, "deim_rtdetrv2": 2000}

# Parameters with 80 classes; of each group, by rate and decay, tensors and parameters
L_DECODED, X_DECODED = (274, 17_696_534), (277, 29_333_142)
GROUPS = {
    "dfine_n_coco": (
        3_782_691,
        {(4e-4, 1e-4): (186, 1_850_396), (8e-4, 0): (151, 16_015), (8e-4, 1e-4): (91, 1_916_280)},
    ),
    "dfine_s_coco": (
        10_321_875,
        {(1e-4, 1e-4): (186, 1_850_396), (2e-4, 0): (191, 38_135), (2e-4, 1e-4): (111, 8_433_344)},
    ),
    "dfine_m_coco": (
        19_590_062,
        {(2e-5, 1e-4): (262, 6_026_626), (2e-4, 0): (242, 52_780), (2e-4, 1e-4): (140, 13_510_656)},
    ),
    "dfine_l_coco": (
        31_219_222,
        {(1.25e-5, 1.25e-4): (75, 13_482_752), (2.5e-4, 0): (220, 39_936), (2.5e-4, 1.25e-4): L_DECODED},
    ),
    "dfine_x_coco": (
        62_596_118,
        {(2.5e-6, 1.25e-4): (125, 33_206_400), (2.5e-4, 0): (226, 56_576), (2.5e-4, 1.25e-4): X_DECODED},
    ),
    "deim_dfine_s_coco": (
        10_321_875,
        {(2e-4, 1e-4): (102, 1_838_124), (4e-4, 0): (222, 34_288), (4e-4, 1e-4): (164, 8_449_463)},
    ),
    "deim_dfine_m_coco": (
        19_590_062,
        {(4e-5, 1e-4): (142, 5_999_930), (4e-4, 0): (296, 59_464), (4e-4, 1e-4): (206, 13_530_668)},
    ),
    "deim_dfine_l_coco": (
        31_289_846,
        {(2.5e-5, 1.25e-4): (240, 13_553_376), (5e-4, 0): (220, 39_936), (5e-4, 1.25e-4): L_DECODED},
    ),
    "deim_dfine_x_coco": (
        62_715_478,
        {(5e-6, 1.25e-4): (390, 33_325_760), (5e-4, 0): (226, 56_576), (5e-4, 1.25e-4): X_DECODED},
    ),
    "deim_rtdetrv2_r18vd": (20_183_440, {(2e-4, 0): (162, 31_360), (2e-4, 1e-4): (166, 20_152_080)}),
    "deim_rtdetrv2_r34vd": (
        31_440_644,
        {(1e-4, 1e-4): (39, 21_290_848), (2e-4, 0): (200, 40_320), (2e-4, 1e-4): (167, 10_109_476)},
    ),
    "deim_rtdetrv2_r50vd_m": (
        33_198_864,
        {(2e-5, 1e-4): (55, 23_474_016), (2e-4, 0): (226, 74_752), (2e-4, 1e-4): (143, 9_650_096)},
    ),
    "deim_rtdetrv2_r50vd": (
        42_943_596,
        {(2e-5, 1e-4): (55, 23_474_016), (2e-4, 0): (236, 85_504), (2e-4, 1e-4): (211, 19_384_076)},
    ),
    "deim_rtdetrv2_r101vd": (
        76_660_716,
        {(2e-6, 1e-4): (106, 42_413_920), (2e-4, 0): (338, 148_224), (2e-4, 1e-4): (211, 34_098_572)},
    ),
}
FAST = ("dfine_n_coco", "deim_dfine_s_coco", "deim_rtdetrv2_r50vd_m")


def test_every_recipe_is_in_the_table() -> None:
    found = {path.stem for path in (CONF_DIR / "experiment").glob("*.yaml")}
    assert {name for name in found if name.startswith(("dfine", "deim_"))} == set(TRAINING)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TRAINING])
def test_a_recipe_trains_as_its_authors_did(name: str) -> None:
    epochs, stop, batch_size, lr, lr_backbone, weight_decay, sizes = TRAINING[name]
    cfg = compose([f"experiment={name}", *COCO])
    trainer, optim, data = cfg.trainer, cfg.optim, cfg.data
    assert (trainer.epochs, trainer.batch_size) == (epochs, batch_size)
    assert (data.stop_epoch, trainer.restart_epoch) == (stop, stop)
    assert (optim.lr, optim.lr_backbone, optim.weight_decay) == (lr, lr_backbone, weight_decay)
    assert len(multi_scale_sizes(data.multi_scale, (640, 640), 32)) == sizes
    assert (trainer.clip_max_norm, trainer.ema_decay, trainer.ema_copy_first) == (0.1, 0.9999, False)
    tau = next(tau for family, tau in EMA.items() if name.startswith(family))
    assert trainer.ema_tau == (0 if "obj2coco" in name else tau)
    assert cfg.model.eval_idx == -1
    if not name.startswith("deim"):
        assert build.schedule(cfg)(1000, 1000 * epochs)(0) == (1.0 if "obj2coco" in name else 1 / 500)
        assert optim.scheduler._target_.endswith("constant")
        assert (cfg.model.ffn_activation, cfg.model.head_activation) == ("relu", "relu")
        return
    start, middle, flat, final = PHASES[name]
    assert data.phases == {
        "strong": [start, stop],
        "mosaic": [start, middle],
        "mixup": [start, middle],
        "multi_scale": None,
    }
    assert (data.augment.mosaic, data.augment.mixup) == (0.5, 0.5)
    relu = "relu" if name.endswith("obj2coco") else "silu"
    assert (cfg.model.ffn_activation, cfg.model.head_activation) == (relu, relu)
    if "rtdetrv2" in name:
        assert (cfg.model.position_layers, cfg.model.box_noise_fold) == (3, True)
        assert cfg.loss.terms.giou.get("pairs", "own") == "own"
    factor = build.schedule(cfg)(1000, 1000 * epochs)
    assert factor(1000) == (1.0 if "obj2coco" in name else 0.25), "a quadratic warm-up of 2000 steps, or none"
    assert factor(0) == (1.0 if "obj2coco" in name else 0.0)
    if flat is None:
        assert factor(1000 * epochs - 1) == 1.0
    else:
        assert factor(1000 * flat) == 1.0
        assert factor(1000 * flat + 2000) < 1.0
        assert factor(1000 * (epochs - final)) == 0.5 == factor(1000 * epochs - 1)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in GROUPS])
def test_parameters_and_their_groups(name: str) -> None:
    cfg = compose([f"experiment={name}", *OFFLINE, *COCO])
    with torch.device("meta"):
        network = build.network(cfg)
    total, groups = GROUPS[name]
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == total
    tensors, parameters = Counter(), Counter()
    for group in build.optimizer(cfg)(network).param_groups:
        where = group["lr"], group["weight_decay"]
        tensors[where] += len(group["params"])
        parameters[where] += sum(parameter.numel() for parameter in group["params"])
    assert {where: (tensors[where], parameters[where]) for where in tensors} == groups
