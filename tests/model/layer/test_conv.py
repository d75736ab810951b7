"""Frozen norms, and norms folded into convolutions."""

import pytest
import torch
from torch import nn

from detr_exp.model.layer.conv import ConvNorm, FrozenBatchNorm2d, freeze_batch_norms


@pytest.fixture
def layer(randomise):
    torch.manual_seed(0)
    return randomise(ConvNorm(3, 4, 3, 2, act="silu").double())


def test_a_frozen_norm_does_what_the_norm_did_in_evaluation_and_has_no_parameters(layer):
    images = torch.rand(2, 3, 8, 8).double()
    expected = layer.eval()(images)
    holder = nn.Sequential(layer)
    freeze_batch_norms(holder)
    assert isinstance(layer.norm, FrozenBatchNorm2d)
    assert list(layer.norm.parameters()) == []
    torch.testing.assert_close(holder.train()(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_folding_keeps_the_result(layer, frozen):
    images = torch.rand(2, 3, 8, 8).double()
    expected = layer.eval()(images)
    if frozen:
        freeze_batch_norms(layer)
    layer.fold()
    assert not any(isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)) for module in layer.modules())
    torch.testing.assert_close(layer(images), expected, rtol=0, atol=1e-12)


def test_an_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'swish'.*relu, silu, gelu or null"):
        ConvNorm(3, 4, 1, act="swish")
