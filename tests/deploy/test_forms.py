"""Networks in the forms that are measured: the same outputs in all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detr_exp.build import network
from detr_exp.config.compose import compose
from detr_exp.deploy.forms import in_form
from detr_exp.deploy.program import differences
from detr_exp.ops import products


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rtdetrv2_tiny", "rfdetr_seg_tiny"])
def test_compiled_networks_compute_by_onednn_what_the_network_does(model: str, tmp_path: Path) -> None:
    """With code that is generated: other backends of the compiler do not ask what oneDNN's operators need."""
    torch.manual_seed(0)
    made = network(compose([f"model={model}", "data.num_classes=3"])).eval()
    products.use(made.modules(), "onednn")
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*made.image_size, 3), dtype=np.uint8) for _ in range(2)]
    sizes = np.array([made.image_size] * 2)
    right = in_form(made, "eager", tmp_path).outputs(images)
    for form in ("folded", "compiled"):
        gaps = differences(right, in_form(made, form, tmp_path).outputs(images), sizes)
        assert all(np.median(gap) < 1e-4 for gap in gaps.values()), form
    # half as many digits select other cells of a network with random weights, so that boxes cannot be compared
    program = in_form(made, "compiled_bf16", tmp_path)
    outputs = program.outputs(images)
    gaps = differences(right, outputs, sizes)
    assert 0 < np.median(gaps["logits"]) < 0.1
    for module in program.graph.network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.detach().zero_()
    kept = program.outputs(images)
    assert all(np.array_equal(kept[name], outputs[name]) for name in outputs), "weights are constants of the code"
