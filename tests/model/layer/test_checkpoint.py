"""Gradient checkpointing."""

import copy

import torch
from torch import nn

from detr_exp.model.layer.checkpoint import checkpointed


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
