"""Self-attention against torch's own."""

import pytest
import torch
from torch import nn

from detr_exp.model.layer.attention import SelfAttention, attend


def test_equals_torchs_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    nn.init.normal_(ours.in_proj_bias)
    theirs.in_proj_bias.data.copy_(ours.in_proj_bias)
    tokens, position = torch.randn(2, 5, 8).double(), torch.randn(5, 8).double()
    allowed = torch.rand(5, 5) < 0.6
    allowed |= torch.eye(5, dtype=torch.bool)
    placed = tokens + position
    expected, _ = theirs(placed, placed, tokens, attn_mask=~allowed)
    torch.testing.assert_close(ours(tokens, position, allowed), expected, rtol=0, atol=1e-12)
    expected, _ = theirs(tokens, tokens, tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("tokens", [torch.randn(2, 128, 9).mT, torch.randn(1, 9, 128).expand(2, -1, -1)])
def test_frozen_weights_give_the_same_bits(tokens, placed):
    torch.manual_seed(0)
    layer, position = SelfAttention(128, 4), torch.randn(9, 128) if placed else None
    trained = layer(tokens, position)
    assert torch.equal(layer.requires_grad_(False)(tokens, position), trained)


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_on_cpu_stays_close_to_float32(masked):
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 20, 8) for _ in range(3)]
    allowed = (torch.rand(20, 20) < 0.5) | torch.eye(20, dtype=torch.bool) if masked else None
    exact = attend(*parts, allowed, 0.0, like=nn.Linear(8, 8))
    rounded = attend(*(part.bfloat16() for part in parts), allowed, 0.0, like=nn.Linear(8, 8))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"8 channels.*3 heads.*model\.num_heads"):
        SelfAttention(8, 3)
