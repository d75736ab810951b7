"""Gradient checkpointing."""

import copy

import pytest
import torch
from torch import nn

from detr_exp.build import compose, criterion, network
from detr_exp.model.layer.checkpoint import checkpointed
from detr_exp.structures import Targets


def test_gradients_and_batch_statistics_are_those_of_a_plain_pass():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ).double()
    saving = copy.deepcopy(plain)
    images = torch.rand(2, 3, 6, 6).double()
    for _ in range(2):
        plain(images).square().sum().backward()
        checkpointed(saving, images).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "words",
    [
        ("model=rtdetrv2_tiny",),
        ("model=dfine_tiny", "loss=dfine", "model/backbone=hgnetv2_b0"),
        ("model=deimv2_atto", "loss=mal"),
        (
            *("model=lwdetr_tiny", "loss=ia_bce", "model.backbone.width=48", "model.backbone.num_heads=2"),
            *("model.backbone.num_windows=2", "model.backbone.drop_path=0.5", "model.num_groups=2"),
        ),
        ("model=rfdetr_seg_tiny", "loss=ia_bce"),
    ],
    ids=lambda words: words[0],
)
def test_a_network_of_each_family_learns_the_same_with_it(words):
    cfg = compose([*words, "data.num_classes=2", "model.image_size=[96,96]", "model.num_queries=10"])
    torch.manual_seed(0)
    plain = network(cfg).train()
    saving, losses = copy.deepcopy(plain), criterion(cfg)
    saving.set_gradient_checkpointing(True)
    images, masks = torch.rand(2, 3, 96, 96), torch.zeros(3, 96, 96, dtype=torch.bool)
    masks[:, 20:50, 30:60] = True
    targets = Targets(
        torch.tensor([0, 1, 1]), torch.rand(3, 4) * 0.3 + 0.2, (2, 1), masks if len(plain.tasks) else None
    )
    for one in (plain, saving):
        torch.manual_seed(1)
        losses(one(images, targets), targets, num_boxes=3.0)["total"].backward()
    gradients = [
        {name: parameter.grad for name, parameter in one.named_parameters() if parameter.grad is not None}
        for one in (plain, saving)
    ]
    assert gradients[0]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(dict(one.named_buffers()) for one in (plain, saving)), rtol=0, atol=0)
