"""Networks for tests, and the same networks as transformers builds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from rtdetr_peer import SMALL
from torch import nn

from detr_exp.build import compose, network
from detr_exp.ops import products
from detr_exp.structures import Target, Targets


@pytest.fixture(scope="session")
def make() -> Callable[..., nn.Module]:
    """Words of the command line -> network, seeded."""
    composed = lru_cache(lambda *overrides: compose(overrides))

    def build(*overrides: str, num_classes: int = 7) -> nn.Module:
        cfg = composed(f"data.num_classes={num_classes}", *overrides)
        torch.manual_seed(0)
        made = network(cfg)
        products.use(made.modules(), products.fastest())
        return made

    return build


@pytest.fixture(scope="session")
def small(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Words on top of a small network -> network, seeded."""
    return lambda *overrides, num_classes=7: make(*SMALL, *overrides, num_classes=num_classes)


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter and statistic a value of its own, so that nothing is hidden by zeros and ones."""

    def run(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                # sampled in float64, like the networks that are compared
                if name.endswith("running_mean"):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1)
                elif tensor.dim() == 1 and name.endswith(("weight", "running_var")):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.4 + 0.8)
                elif isinstance(tensor, nn.Parameter):
                    tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.02)
        return module

    return run


@pytest.fixture
def targets() -> Targets:
    """Three images with two, no and one object of seven classes."""
    return Targets.pack(
        [
            Target(torch.tensor([1, 4]), torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]])),
            Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)),
            Target(torch.tensor([6]), torch.tensor([[0.5, 0.5, 0.6, 0.4]])),
        ]
    )


@pytest.fixture
def no_objects() -> Targets:
    """Three images without objects."""
    return Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), (0, 0, 0))
