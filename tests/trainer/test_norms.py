"""Statistics of batch norms, estimated anew."""

import pytest
import torch
from torch import nn

from detr_exp.structures import Batch, Targets
from detr_exp.trainer.norms import reestimate
from detr_exp.trainer.precision import Precision

FLOAT32 = Precision(torch.device("cpu"), None, torch.contiguous_format)


class Tiny(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, images, targets=None, padding_mask=None):
        return self.norm(images)


def batches(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (0, 0))
    sizes = torch.tensor([[8, 8]] * 2)
    return [
        Batch(torch.randint(0, 255, (2, 8, 8, 3), generator=g, dtype=torch.uint8), nothing, sizes) for _ in range(count)
    ]


def test_statistics_are_the_means_over_the_batches():
    network = Tiny(nn.BatchNorm2d(3)).eval()
    network.norm.running_mean += 7
    given = batches(3)
    reestimate(network, given, FLOAT32, 2)
    pixels = [batch.pixels(torch.contiguous_format) for batch in given]
    for name, of in (("running_mean", torch.mean), ("running_var", torch.var)):
        wanted = torch.stack([of(part, dim=(0, 2, 3)) for part in pixels[:2]]).mean(0)
        torch.testing.assert_close(getattr(network.norm, name), wanted, msg=name)
    assert network.norm.momentum == 0.1
    assert not network.norm.training


def test_a_network_without_statistics_is_refused():
    for norm in (nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(ValueError, match="norm_batches=0"):
            reestimate(Tiny(norm), batches(1), FLOAT32, 1)
