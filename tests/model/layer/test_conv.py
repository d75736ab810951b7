"""Frozen norms, and norms folded into convolutions."""

import pytest
import torch
from torch import nn

from detr_exp.model.layer.conv import ConvNorm, FrozenBatchNorm2d, freeze_batch_norms, freeze_stages


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


def test_frozen_norms_take_weights_of_trained_ones(layer):
    """Trained norms count batches; a file with that number still fits exactly."""
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert "norm.num_batches_tracked" in stored
    freeze_batch_norms(layer)
    layer.load_state_dict(stored)


@pytest.mark.parametrize("freeze_at", [-2, 3, 99])
def test_no_more_stages_are_frozen_than_there_are(freeze_at):
    with pytest.raises(ValueError, match=rf"freeze_at is {freeze_at}, .*has 2 stages.*model\.backbone\.freeze_at=2"):
        freeze_stages(nn.Identity(), [nn.Identity(), nn.Identity()], freeze_at)
