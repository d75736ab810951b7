"""Deformable attention: initial values and what is trained."""

import pytest
import torch

from detr_exp.model.layer.deformable_attention import DeformableAttention
from detr_exp.model.layer.memory import Memory


def test_heads_start_in_directions_of_their_own_and_points_go_outwards():
    offsets = DeformableAttention(16, 8, [4, 2]).sampling_offsets
    assert not offsets.weight.any()
    start = offsets.bias.view(8, 6, 2)
    torch.testing.assert_close(start[0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0], [1, 0], [2, 0]]))
    torch.testing.assert_close(start[1, :2], torch.tensor([[1.0, 1], [2, 2]]))
    torch.testing.assert_close(start[6, 5], torch.tensor([0.0, -2]), atol=1e-6, rtol=0)


def test_an_offset_of_all_points_reaches_offset_scale_boxes():
    """With a constant offset the sampled place is `centre + offset / points * scale * size` on a linear map."""
    attention = DeformableAttention(4, 1, [2], offset_scale=0.25).double()
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([2.0, 0, 2, 0]))
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(4))
    width = 32
    ramp = ((torch.arange(width).double() + 0.5) / width).expand(8, width).reshape(1, -1, 1).expand(-1, -1, 4)
    reference = torch.tensor([[[0.5, 0.5, 0.4, 0.2]]]).double()
    read = attention(torch.zeros(1, 1, 4).double(), reference, Memory(ramp, [(8, width)], None))
    torch.testing.assert_close(read, torch.full((1, 1, 4), 0.5 + 2 / 2 * 0.25 * 0.4).double())


def test_discrete_sampling_freezes_the_offsets():
    attention = DeformableAttention(8, 2, [4], "discrete")
    assert not attention.sampling_offsets.weight.requires_grad
    assert attention.attention_weights.weight.requires_grad


def test_padding_reads_zero():
    torch.manual_seed(0)
    attention = DeformableAttention(8, 2, [2])
    query, memory, reference = torch.randn(1, 3, 8), torch.randn(1, 6, 8), torch.rand(1, 3, 4)
    padding = torch.tensor([[[False, False, True], [False, False, True]]])
    changed = torch.where(padding.flatten(1)[..., None], 99.0, memory)
    read, again = (attention(query, reference, Memory(cells, [(2, 3)], [padding])) for cells in (memory, changed))
    torch.testing.assert_close(read, again)


@pytest.mark.parametrize(
    ("arguments", "message"), [((8, 3, [4]), "8 cannot be split into 3"), ((8, 2, [4], "x"), "'x'")]
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformableAttention(*arguments)
