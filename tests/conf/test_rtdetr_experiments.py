"""The published RT-DETR recipes: sizes, learning rates, and that each of them takes steps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.optim.param_groups import parameter_groups
from detr_exp.structures import Target, Targets

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("rtdetr*.yaml"))
OFFLINE = ("model.weights=null", "model.backbone.pretrained=false")

# Parameters of the network with 80 classes, and tensors per (learning rate, weight decay).
R18 = (20_184_464, {(1e-4, 0): 162, (1e-4, 1e-4): 164})
R34 = (31_441_668, {(5e-5, 1e-4): 39, (5e-5, 0): 78, (1e-4, 0): 181, (1e-4, 1e-4): 106})
R50_M = (36_593_772, {(1e-5, 1e-4): 52, (1e-4, 0): 134, (1e-4, 1e-4): 213})
R50 = (42_891_372, {(1e-5, 1e-4): 52, (1e-4, 0): 126, (1e-4, 1e-4): 209})
PUBLISHED = {
    "rtdetrv2_r18vd_120e_coco": R18,
    "rtdetrv2_r18vd_120e_voc": R18,
    "rtdetrv2_r34vd_120e_coco": R34,
    "rtdetrv2_r50vd_m_7x_coco": R50_M,
    "rtdetrv2_r50vd_6x_coco": R50,
    "rtdetrv2_r101vd_6x_coco": (76_556_268, {(1e-6, 1e-4): 103, (1e-4, 0): 126, (1e-4, 1e-4): 209}),
    "rtdetrv2_hgnetv2_l_6x_coco": (32_925_036, {(5e-6, 1e-4): 75, (1e-4, 0): 126, (1e-4, 1e-4): 209}),
    "rtdetrv2_hgnetv2_x_6x_coco": (67_374_188, {(1e-6, 1e-4): 125, (1e-4, 0): 126, (1e-4, 1e-4): 209}),
    "rtdetrv2_hgnetv2_h_6x_coco": (125_584_348, {(5e-6, 1e-4): 169, (1e-4, 0): 130, (1e-4, 1e-4): 217}),
    "rtdetr_r101vd_6x_coco": (76_556_268, {(1e-6, 1e-4): 103, (1e-4, 1e-4): 335}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_their_groups(name):
    cfg = compose([f"experiment={name}", *OFFLINE, "data.num_classes=80"])
    with torch.device("meta"):
        network = build.network(cfg)
    total, groups = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    optim = cfg.optim
    found = parameter_groups(
        network, optim.param_groups, lr=optim.lr, lr_backbone=optim.lr_backbone, weight_decay=optim.weight_decay
    )
    counted: Counter = Counter()
    for group in found:
        counted[group["lr"], group["weight_decay"]] += len(group["params"])
    assert counted == groups


@pytest.mark.parametrize("name", ["r18vd", "r34vd", "r50vd_m", "r50vd"])
def test_rtdetr_decays_the_four_norms_that_its_source_does_not_find_by_name(name):
    """There they are called `encoder.input_proj.0.1` and `decoder.enc_output.1`; their biases are found."""
    cfg = compose([f"experiment=rtdetr_{name}_6x_coco", *OFFLINE, "data.num_classes=80"])
    with torch.device("meta"):
        network = build.network(cfg)
    groups = build.optimizer(cfg)(network).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    norms = {f"encoder.input_proj.{i}.norm.weight" for i in range(3)} | {"decoder.enc_output.norm.weight"}
    for parameter_name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = "norm" in parameter_name and parameter_name not in norms
        spared |= parameter_name.startswith(("encoder.", "decoder.")) and parameter_name.endswith("bias")
        assert (id(parameter) in decayed) is not spared, parameter_name


@pytest.mark.parametrize(
    ("name", "on_cuda", "on_cpu"),
    [("rtdetr_r50vd_6x_coco", None, None), ("rtdetrv2_r50vd_6x_coco", torch.float16, "auto")],
)
def test_the_precision_is_that_of_the_source_where_the_device_has_it(name, on_cuda, on_cpu, monkeypatch):
    words = [f"experiment={name}", "data.num_classes=80"]
    auto = build.hardware(compose(["trainer/hardware=cpu"])).amp_dtype
    here = build.hardware(compose([*words, "trainer.hardware.device=cpu"]))
    assert here.amp_dtype is (auto if on_cpu == "auto" else on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert build.hardware(compose([*words, "trainer.hardware.device=cuda"])).amp_dtype is on_cuda
    parts = build.hardware(compose([*words, "trainer.hardware.device=cuda", "trainer.hardware.strategy=fsdp"]))
    assert parts.amp_dtype is (None if on_cuda is None else torch.bfloat16)  # where loss scaling does not work


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_says_what_one_has_to_know(name):
    lines = (CONF_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    told = ["# Published: ", "# Ours: ", "# Cost: ", f"# python -m detr_exp.train experiment={name} "]
    assert all(line.startswith(beginning) for line, beginning in zip(lines[2:], told))


FAST = ("rtdetrv2_r18vd_120e_coco",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS])
def test_two_steps_and_an_evaluation(name):
    """Only the pictures are smaller and fewer."""
    cfg = compose([f"experiment={name}", *OFFLINE, "data.num_classes=80", "model.image_size=[128,128]"])
    torch.manual_seed(0)
    network, criterion = build.network(cfg).train(), build.criterion(cfg)
    optimizer = build.optimizer(cfg)(network)
    targets = Targets.pack(
        [
            Target(torch.tensor([3, 70]), torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]])),
            Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)),
        ]
    )
    images = torch.rand(2, 3, 128, 128)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        terms = criterion(network(images, targets), targets, num_boxes=2.0)
        terms["total"].backward()
        assert terms["total"].isfinite()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.trainer.clip_max_norm)
        optimizer.step()
    moved = [name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 100
    with torch.no_grad():
        outputs = network.eval()(images)
    found = network.postprocess(outputs, torch.tensor([[480, 640], [100, 100]]))
    assert [len(one) for one in found] == [300, 300]
