"""The hybrid encoder (its numbers are compared in tests/model/test_rtdetrv2_parity.py)."""

import pytest
import torch

from detr_exp.model.layer.fusion import RepVggBlock
from detr_exp.model.neck.hybrid_encoder import HybridEncoder

SETTINGS = {
    "channels": [4, 6, 8],
    "strides": [8, 16, 32],
    "in_channels": None,
    "feat_strides": None,
    "hidden_dim": 16,
    "use_encoder_idx": [2],
    "num_encoder_layers": 1,
    "num_heads": 2,
    "dim_feedforward": 16,
    "dropout": 0.0,
    "enc_act": "gelu",
    "pe_temperature": 10000,
    "expansion": 0.5,
    "depth_mult": 1.0,
    "act": "silu",
}


def maps(height=4, width=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, c, height * s, width * s, generator=generator) for c, s in zip([4, 6, 8], [4, 2, 1])]


def test_maps_keep_their_sizes_and_every_parameter_trains():
    encoder = HybridEncoder(**SETTINGS)
    outputs = encoder(maps())
    assert [tuple(level.shape) for level in outputs] == [(2, 16, 16, 24), (2, 16, 8, 12), (2, 16, 4, 6)]
    assert encoder.out_channels == [16, 16, 16]
    sum(level.square().sum() for level in outputs).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("change", "same"), [({}, True), ({"in_channels": [4, 6, 8], "feat_strides": [8, 16, 32]}, True)]
)
def test_channels_and_strides_may_be_said_if_they_are_right(change, same):
    assert len(HybridEncoder(**SETTINGS | change).input_proj) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": [4, 6, 9]}, r"in_channels is \[4, 6, 9\] but the backbone has \[4, 6, 8\]; drop"),
        ({"feat_strides": [4, 8, 16]}, r"feat_strides is \[4, 8, 16\] but the backbone has \[8, 16, 32\]"),
        ({"strides": [4, 16, 32]}, r"strides are \[4, 16, 32\].*out_strides"),
    ],
)
def test_contradictions_name_both_sides(change, message):
    with pytest.raises(ValueError, match=message):
        HybridEncoder(**SETTINGS | change)


def test_attention_can_be_left_out():
    assert not HybridEncoder(**SETTINGS | {"num_encoder_layers": 0}).encoder


def test_padded_cells_are_not_looked_at():
    encoder = HybridEncoder(**SETTINGS).eval()
    attention = encoder.encoder[0]
    cells = torch.rand(2, 16, 4, 6)
    padding = torch.zeros(2, 4, 6, dtype=torch.bool)
    padding[0, :, 3:] = True
    padding[1] = True  # an image too small for a cell
    changed = torch.where(padding[:, None], cells + 1, cells)
    seen = ~padding[0].expand(16, -1, -1)
    assert torch.allclose(attention(cells, padding)[0][seen], attention(changed, padding)[0][seen], atol=1e-6)
    assert attention(cells, padding).isfinite().all()
    assert not torch.allclose(attention(cells, None)[0][seen], attention(changed, None)[0][seen], atol=1e-6)


def test_repvgg_folds_into_one_convolution(randomise):
    block = randomise(RepVggBlock(6, "silu").double()).eval()
    image = torch.rand(1, 6, 5, 7).double()
    expected = block(image)
    block.fold()
    assert len(list(block.parameters())) == 2
    torch.testing.assert_close(block(image), expected, rtol=0, atol=1e-12)


def test_checkpointing_gives_equal_gradients():
    encoder = HybridEncoder(**SETTINGS).double().train()
    gradients = []
    for enabled in (False, True):
        encoder.gradient_checkpointing = enabled
        encoder.zero_grad()
        sum(level.square().sum() for level in encoder([level.double() for level in maps()])).backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for plain, saving in zip(*gradients):
        torch.testing.assert_close(plain, saving, rtol=0, atol=1e-12)
