import pytest
import torch
from torch.nn import functional as F

from detr_exp.model.neck.projector import Projector


def projector(levels=("P4",), **changes):
    settings = dict(channels=[16] * 3, strides=[16] * 3, hidden_dim=8, levels=list(levels), num_bottlenecks=3)
    return Projector(**settings | changes)


def maps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 16, 6, 10, generator=generator) for _ in range(3)]


def test_levels_have_their_resolutions():
    neck = projector(("P3", "P4", "P5"))
    assert [level.shape for level in neck(maps())] == [(2, 8, 12, 20), (2, 8, 6, 10), (2, 8, 3, 5)]
    assert neck.out_strides == [8, 16, 32]
    assert neck.out_channels == [8] * 3


def test_a_level_is_normalised_at_every_pixel():
    (level,) = projector()(maps())
    torch.testing.assert_close(level.mean(1), torch.zeros(2, 6, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(level.var(1, unbiased=False), torch.ones(2, 6, 10), atol=2e-2, rtol=0)


@torch.no_grad()
def test_c2f_keeps_every_bottleneck_without_shortcuts():
    mix = projector().levels[0].mix
    joined = torch.cat(maps(), dim=1)

    def step(sequence, features):
        conv, norm, _ = sequence
        features = conv(features).permute(0, 2, 3, 1)
        normal = F.layer_norm(features, features.shape[-1:], norm.weight, norm.bias, 1e-6)
        return F.silu(normal).permute(0, 3, 1, 2)

    entered = step(mix.enter, joined)
    parts = [entered[:, :4], entered[:, 4:]]
    for first, second in mix.bottlenecks:
        parts.append(step(second, step(first, parts[-1])))
    torch.testing.assert_close(mix(joined), step(mix.leave, torch.cat(parts, dim=1)))


def test_memory_layout_changes_no_number():
    neck = projector(("P3", "P5"))
    for plain, last in zip(neck(maps()), neck([m.to(memory_format=torch.channels_last) for m in maps()])):
        torch.testing.assert_close(plain, last, atol=1e-4, rtol=1e-4)


def test_every_weight_is_used():
    neck = projector(("P3", "P4", "P5"))
    sum((level * torch.randn_like(level)).sum() for level in neck(maps())).backward()
    assert [name for name, p in neck.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_errors_name_the_override():
    with pytest.raises(ValueError, match=r"model.neck.levels=\[P4\]"):
        projector(("P5", "P4"))
    with pytest.raises(ValueError, match="model/backbone=dinov2_windowed_small"):
        projector(strides=[8, 16, 32])
