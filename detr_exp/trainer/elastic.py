"""Members of a network that are trained together: each step computes some of them, with the same weights.

Which ones is a function of (seed, step): the same on all ranks, and in a resumed run. The gradient of a step is the
mean of those of its members (Yu et al. 2020, BigNAS, arXiv 2003.11142, section 3). Parameters that no member of a step
uses have a gradient of zero: the optimiser decays them and moves them by their momentum, and the average includes them,
as all others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr_exp.data.dataset import DataSet
from detr_exp.data.fit import sizes_of, written
from detr_exp.loss.criterion import SetCriterion
from detr_exp.model.member import Elastic, Member
from detr_exp.protocols import Network
from detr_exp.trainer.teaching import Keeping, Teaching

T = TypeVar("T")
WHOLE = Member()
STREAM = 1 << 31  # of random numbers: no micro-batch has this number
SUFFIX = re.compile(r"(_aux_\d+|_pre|_enc|_dn_\d+|_dn_pre)?")


@dataclass(frozen=True)
class Members:
    """The members that are trained.

    Attributes:
        layers, queries, image_sizes: to sample from, ascending, some more than once; the last is None, as the network
            has it.
        sandwich: each step computes the largest and the smallest one as well.
        num_random: sampled ones of a step.
        names: of the losses in the log, which do not depend on the member.
    """

    layers: Sequence[int | None]
    queries: Sequence[int | None]
    image_sizes: Sequence[tuple[int, int] | None]
    sandwich: bool
    num_random: int
    names: Sequence[str]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Member]:
        found = product(self.layers, self.queries, self.image_sizes)
        return iter(dict.fromkeys(Member(*parts) for parts in found))

    @property
    def smallest(self) -> Member:
        return Member(self.layers[0], self.queries[0], self.image_sizes[0])

    def of_step(self, seed: int, step: int) -> list[Member]:
        """Those that a step computes, without repeats; the largest one, if it is among them by rule, is the first."""
        rng = np.random.default_rng((seed, step, STREAM))
        sampled = [self._sampled(rng) for _ in range(self.num_random)]
        return list(dict.fromkeys([WHOLE, *sampled, self.smallest] if self.sandwich else sampled))

    def _sampled(self, rng: np.random.Generator) -> Member:
        layers, queries, size = (int(rng.integers(len(axis))) for axis in (self.layers, self.queries, self.image_sizes))
        return Member(self.layers[layers], self.queries[queries], self.image_sizes[size])

    def share_of_mean(self, losses: Mapping[str, Tensor], count: int, waiting: nn.Module | None) -> dict[str, Tensor]:
        """The losses of a member as a share of the mean over a step's members.

        Terms are summed over layers and parts, so that all members have the same; one that is absent is zero.

        Args:
            losses: of the criterion.
            count: members of the step.
            waiting: a module that exchanges gradients after this pass: all of its parameters need one.
        """
        total = losses["total"] / count
        found = {}
        for name in self.names:
            parts = [value for key, value in losses.items() if key.startswith(name) and _is_part(key, name)]
            found[name] = torch.stack(parts).sum() / count if parts else torch.zeros_like(total)
        if isinstance(waiting, DistributedDataParallel):
            total = total + 0 * torch.stack([p.sum() for p in waiting.parameters() if p.requires_grad]).sum()
        return {**found, "total": total}


@dataclass(frozen=True, kw_only=True)
class ElasticTraining:
    """The values of `conf/trainer/elastic/`, which documents their meaning.

    Raises:
        ValueError: no member would be trained.
    """

    layers: Sequence[float]
    queries: Sequence[float]
    image_size: Sequence[float]
    sandwich: bool
    num_random: int

    def __post_init__(self) -> None:
        if not self.sandwich and not self.num_random:
            raise ValueError(
                "trainer.elastic.num_random is 0 and trainer.elastic.sandwich is false, so that no step would train "
                "anything: trainer.elastic.num_random=1"
            )
        for name in ("layers", "queries", "image_size"):
            if not getattr(self, name):
                raise ValueError(f"trainer.elastic.{name} is empty; 1 stands for all: trainer.elastic.{name}=[1.0]")

    def members(self, network: Network, data: DataSet, criterion: SetCriterion, compiled: bool) -> Members:
        """The members of a network.

        Args:
            network: to be trained.
            data: of the training; must not choose image sizes, too.
            criterion: of the training.
            compiled: whether there is a graph for each of them.

        Raises:
            ValueError: the network has no such members.
        """
        if not isinstance(network, Elastic):
            raise ValueError(
                f"trainer.elastic trains members of a network, but {type(network).__name__} has none: it needs what "
                "detr_exp.model.member.Elastic lists; train it alone: trainer/elastic=none"
            )
        own = network.own
        sizes = _values(self.image_size, lambda share: _size(share, own.image_size, network.stride))
        image_sizes = [None if size == own.image_size else size for size in sizes]
        if data.multi_scale is not None and set(image_sizes) != {None}:
            raise ValueError(
                f"data.multi_scale is {data.multi_scale}, and trainer.elastic.image_size is {list(self.image_size)}; "
                "one of them chooses the sizes: data.multi_scale=null, or trainer.elastic.image_size=[1.0]"
            )
        if data.fit == "short_side" and set(image_sizes) != {None}:
            raise ValueError(
                f"data.fit is short_side, and trainer.elastic.image_size is {list(self.image_size)}; one of them "
                "chooses the sizes: data.fit=letterbox, or trainer.elastic.image_size=[1.0]"
            )
        if sizes_of(network) and set(image_sizes) != {None}:
            raise ValueError(
                f"model.image_size has several sizes, and trainer.elastic.image_size is {list(self.image_size)}; one "
                f"of them chooses the sizes: model.image_size={written([own.image_size])}, or "
                "trainer.elastic.image_size=[1.0]"
            )
        made = Members(
            layers=_numbers(self.layers, network.most_layers),
            queries=_numbers(self.queries, own.queries),
            image_sizes=image_sizes,
            sandwich=self.sandwich,
            num_random=self.num_random,
            names=[*(f"loss_{name}" for name in criterion.names(network.tasks)), *_of_teacher(criterion)],
        )
        for member in made:
            try:
                network.set_member(member)
            except ValueError as error:
                said = re.sub(r"\bat\.", "trainer.elastic.", str(error))
                raise ValueError(f"trainer.elastic has a member that this network has not: {said}") from error
            finally:
                network.set_member(WHOLE)
        if compiled:  # a graph for each, of the network and of the losses
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, 2 * len(made))
        return made


def trained_members(
    elastic: ElasticTraining | None,
    network: Network,
    data: DataSet,
    criterion: SetCriterion,
    teaching: Teaching | None,
    compiled: bool,
) -> Members | None:
    """The members that a training computes; None: it trains the network alone.

    Args:
        elastic: the setting.
        network, data, criterion, compiled: see `ElasticTraining.members`.
        teaching: by a teacher, or None.

    Raises:
        ValueError: the network has no such members, or the largest one is to teach the others without being computed.
    """
    if teaching is not None and isinstance(teaching.teacher, Keeping) and (elastic is None or not elastic.sandwich):
        raise ValueError(
            "teacher=largest lets the largest member of each step teach the others, but "
            f"{'trainer/elastic is none' if elastic is None else 'trainer.elastic.sandwich is false'}, so that a step "
            "need not have it: trainer/elastic=depth_queries trainer.elastic.sandwich=true"
        )
    return None if elastic is None else elastic.members(network, data, criterion, compiled)


@contextmanager
def as_member(network: Network, member: Member) -> Iterator[None]:
    """A network that computes as a member inside, and whole afterwards."""
    if member == WHOLE:
        yield
        return
    assert isinstance(network, Elastic)
    network.set_member(member)
    try:
        yield
    finally:
        network.set_member(WHOLE)


def complete_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Zeros for the parameters that no member of a step has used."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _is_part(key: str, name: str) -> bool:
    return SUFFIX.fullmatch(key.removeprefix(name)) is not None


def _of_teacher(criterion: SetCriterion) -> list[str]:
    return [f"loss_{name}" for name in criterion.of("teacher")]


def _values(shares: Sequence[float], value: Callable[[float], T]) -> list[T]:
    """What shares stand for, ascending, as often as a share is listed; several shares of one value count once."""
    times: dict[T, int] = {}
    for share, count in sorted(Counter(shares).items()):
        times[value(share)] = max(count, times.get(value(share), 0))
    return [found for found, count in times.items() for _ in range(count)]


def _numbers(shares: Sequence[float], most: int) -> list[int | None]:
    """Shares of a number, in whole numbers; None for all."""
    return [None if count >= most else count for count in _values(shares, lambda share: max(1, round(share * most)))]


def _size(share: float, size: tuple[int, int], stride: int) -> tuple[int, int]:
    """A share of an image size, in multiples of the stride."""
    height, width = (max(stride, round(share * side / stride) * stride) for side in size)
    return height, width
