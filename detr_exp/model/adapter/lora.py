"""Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), by the formula of PEFT.

A weight W of an attention or a linear layer is used as `W + (alpha / r) B A`, and only A and B are trained. The product
is added to the weight, not to the output of the layer. So packed projections, which have no layer of their own, are
adapted like all others, and a merged network computes the same as before, in every precision.

Legend: O outputs, I inputs, r rank; layers stacked into one weight have a leading G.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from detr_exp.model.layer.group_queries import GroupLinear

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of `nn.MultiheadAttention`


class LowRank(nn.Module):
    """A weight `[..., O, I]` -> `weight + scale * lora_B @ lora_A`; equal to the weight before training.

    Args:
        weight: the parameters get its shape, type and device.
        rank: r.
        scale: of the product.
        dropout: probability of dropping an input of the product; the same inputs for all tokens of a forward pass.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        *stacked, outputs, inputs = weight.shape
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_(a=sqrt(5))
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(weight.new_empty(*stacked, rank, inputs).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(weight.new_zeros(*stacked, outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        lora_A: Tensor = self.lora_A
        if self.dropout and self.training:
            lora_A = lora_A * F.dropout(torch.ones_like(lora_A[..., :1, :]), self.dropout)
        with torch.autocast(weight.device.type, enabled=False):  # the sum is rounded once, as a merged weight is
            return weight + self.scale * (self.lora_B @ lora_A)


class LoRA:
    """Adapts the attention and linear layers of a network.

    Args:
        rank: r.
        alpha: the product is scaled by alpha / r.
        dropout: of the product's inputs, in [0, 1).
        target_modules: regular expressions, searched in the names of weights; matching weights are adapted. None:
            all attention and linear layers.
        modules_to_save: regular expressions for parameters that are trained in full, besides newly initialised ones.
            None: no others.

    Raises:
        ValueError: a pattern is no regular expression.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        target_modules: list[str] | None,
        modules_to_save: list[str] | None,
    ) -> None:
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.targets = _parsed("target_modules", target_modules)
        self.saved = _parsed("modules_to_save", modules_to_save) or []

    def adapt(self, network: nn.Module, anew: Collection[str]) -> None:
        """Freeze the network except newly initialised parameters, and add low-rank products to its weights; in place.

        Parameters that the network itself has frozen are not adapted.

        Args:
            network: with its starting weights.
            anew: names of the parameters that these weights do not determine.

        Raises:
            ValueError: a pattern matches no parameter, or there is nothing to adapt.
        """
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        whole = {*anew, *_matching("modules_to_save", self.saved, trained)}
        linear = {id(weight) for weight in _linear_weights(network)}
        candidates = [name for name, weight in trained.items() if id(weight) in linear]
        matching = candidates if self.targets is None else _matching("target_modules", self.targets, candidates)
        chosen = [name for name in matching if name not in whole]
        if not chosen:
            raise ValueError(
                f"model.adapter finds no trainable attention or linear layer in a {type(network).__name__}; unfreeze "
                "some of it, or train without: model/adapter=none"
            )
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in whole)
        for weight in [trained[name] for name in chosen]:
            low_rank = LowRank(weight, self.rank, self.scale, self.dropout)
            for module, kind in _locations(network, weight):  # a weight that several layers share stays shared
                parametrize.register_parametrization(module, kind, low_rank)


def _linear_weights(network: nn.Module) -> Iterable[Tensor]:
    for module in network.modules():
        kinds = ("weight",) if isinstance(module, nn.Linear | GroupLinear) else PROJECTIONS
        yield from (tensor for kind, tensor in module.named_parameters(recurse=False) if kind in kinds)


def _locations(network: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    return [
        (module, kind)
        for module in network.modules()
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter is weight
    ]


def _parsed(key: str, patterns: list[str] | None) -> list[re.Pattern[str]] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, list):
        raise ValueError(f"model.adapter.{key} is {patterns!r}; it is a list: model.adapter.{key}=[{patterns}]")
    parsed = []
    for pattern in patterns:
        try:
            parsed.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"model.adapter.{key} has {pattern!r}, which is no regular expression ({error}); give parts of names: "
                f"model.adapter.{key}=[attn]"
            ) from error
    return parsed


def _matching(key: str, patterns: list[re.Pattern[str]], names: Collection[str]) -> list[str]:
    """Names that match one of the patterns.

    Raises:
        ValueError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(map(pattern.search, names)):
            raise ValueError(
                f"model.adapter.{key} has {pattern.pattern!r}, which matches no name; it is "
                f"searched in names such as {', '.join(sorted(names)[:: max(1, len(names) // 6)][:6])}: "
                f"model.adapter.{key}=[...]"
            )
    return [name for name in names if any(pattern.search(name) for pattern in patterns)]
