"""Parameter groups: the learning rate and weight decay of each parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from detr_exp.protocols import Network
from detr_exp.values import Values

BACKBONE = "backbone."
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
NORM_NAME = re.compile(r"Norm(?![a-z])")  # RMSNorm, LayerNorm2d, GlobalResponseNorm; not Normalise


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of `optim.param_groups`.

    Attributes:
        match: regular expression, searched in the parameter's name; None: every name.
        norms: only parameters of normalisation layers, recognised by the type of the layer.
        lr: base learning rate; None: `optim.lr_backbone` for the backbone, else `optim.lr`.
        lr_factor: multiplies the rate.
        weight_decay: None: `optim.weight_decay`.
        no_weight_decay: regular expression; parameters whose name matches are not decayed.
        layer_decay: multiplies the rate once per layer between a parameter and the end of its stack (ELECTRA,
            https://arxiv.org/abs/2003.10555, section 3): `layer_decay ** (num_layers + 1 - id)`, where id is 0 for
            `stem`, i + 1 for block i and `num_layers + 1` for what comes after the blocks.
        num_layers: depth of that stack, needed with `layer_decay`.
        block: regular expression whose first group is the index of a block.
        stem: regular expression of the parameters before the first block.
    """

    match: str | None = None
    norms: bool = False
    lr: float | None = None
    lr_factor: float = 1.0
    weight_decay: float | None = None
    no_weight_decay: str | None = None
    layer_decay: float | None = None
    num_layers: int | None = None
    block: str = r"(?:blocks?|layers?)\.(\d+)\."
    stem: str = r"embed"

    def applies(self, name: str, is_norm: bool) -> bool:
        """Whether the rule matches the parameter `name`."""
        return (is_norm or not self.norms) and (self.match is None or re.search(self.match, name) is not None)

    def hyperparameters(self, name: str, lr: float, weight_decay: float) -> tuple[float, float]:
        """Learning rate and weight decay of the parameter `name`, given those without this rule."""
        lr = (lr if self.lr is None else self.lr) * self.lr_factor
        if self.layer_decay is not None and self.num_layers is not None:
            lr *= self.layer_decay ** (self.num_layers + 1 - self.depth(name))
        if self.weight_decay is not None:
            weight_decay = self.weight_decay
        if self.no_weight_decay is not None and re.search(self.no_weight_decay, name):
            weight_decay = 0.0
        return lr, weight_decay

    def depth(self, name: str) -> int:
        """The layer id of a parameter, 0 for the stem."""
        assert self.num_layers is not None
        if found := re.search(self.block, name):
            return int(found.group(1)) + 1
        return 0 if re.search(self.stem, name) else self.num_layers + 1


def parameter_groups(
    network: Network,
    rules: Mapping[str, Values | None],
    *,
    lr: float,
    lr_backbone: float | None = None,
    weight_decay: float = 0.0,
    may_idle: bool = False,
    beside: Sequence[nn.Parameter] = (),
) -> list[Values]:
    """Trainable parameters sorted into optimiser groups.

    The first matching rule applies; parameters that match none are in a last group, `rest`. Parameters of one rule with
    the same rate and decay share a group; if a rule gives several groups, they are numbered.

    Args:
        network: its backbone is what is named `backbone.*`.
        rules: name -> fields of a `Rule`; None removes a rule of an option or experiment.
        lr: base learning rate.
        lr_backbone: base learning rate of the backbone; None: `lr`.
        weight_decay: for parameters whose rule does not set it.
        may_idle: whether rules and rates may apply to frozen parameters only, since an adapter has frozen them.
        beside: parameters that are trained but not part of the network, as a last group `beside`.

    Returns:
        groups for a `torch.optim.Optimizer`: `name`, `params`, `lr`, `initial_lr`, `weight_decay`.

    Raises:
        ValueError: for an unknown field, an invalid pattern, a rule without parameters, or a `lr_backbone` that no
            parameter is trained with.
    """
    parsed = {name: _parse(name, entry) for name, entry in rules.items() if entry is not None}
    sorted_: dict[str, dict[tuple[float, float], list[nn.Parameter]]] = {name: {} for name in parsed}
    first_match: dict[str, str] = {}
    base_used = False
    norms = norm_parameters(network)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = lr_backbone is not None and name.startswith(BACKBONE)
        base = lr_backbone if in_backbone and lr_backbone is not None else lr
        matching = [key for key, rule in parsed.items() if rule.applies(name, name in norms)]
        owner = matching[0] if matching else None
        for key in matching:
            first_match.setdefault(key, matching[0])
        if owner is None:
            owner, values = ("rest_backbone" if in_backbone else "rest"), (base, weight_decay)
        else:
            values = parsed[owner].hyperparameters(name, base, weight_decay)
        base_used |= in_backbone and (owner not in parsed or parsed[owner].lr is None)
        sorted_.setdefault(owner, {}).setdefault(values, []).append(parameter)
    frozen = [name for name, parameter in network.named_parameters() if may_idle and not parameter.requires_grad]
    idle = {key for key, rule in parsed.items() if any(rule.applies(name, name in norms) for name in frozen)}
    _refuse_unused({key: rule for key, rule in parsed.items() if key not in idle}, sorted_, first_match)
    if lr_backbone is not None and not base_used and not may_idle:
        raise ValueError(
            f"optim.lr_backbone is {lr_backbone}, but no trainable parameter named {BACKBONE}* uses it; it needs one "
            "whose rule sets no lr of its own: optim.lr_backbone=null"
        )
    order = [*parsed, "rest_backbone", "rest"]
    groups = [
        {
            "name": name if len(sorted_[name]) == 1 else f"{name}_{i}",
            "params": parameters,
            "lr": values[0],
            "initial_lr": values[0],
            "weight_decay": values[1],
        }
        for name in order
        if name in sorted_
        for i, (values, parameters) in enumerate(sorted_[name].items())
    ]
    own = {"name": "beside", "params": list(beside), "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}
    return [*groups, own] if beside else groups


def norm_parameters(network: Network) -> set[str]:
    """Names of the parameters of normalisation layers: torch's own, those made of them, and layers named as one.

    A layer of another library counts if its class name contains Norm and it has no submodules.
    """
    return {
        f"{place}.{name}".removeprefix(".")
        for place, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, NORMS) or (NORM_NAME.search(type(module).__name__) and not list(module.children()))
        for name, _ in module.named_parameters(recurse=False)
    }


def _parse(name: str, entry: Values) -> Rule:
    where = f"optim.param_groups.{name}"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {entry!r}; it must be a rule: {where}.match='head' {where}.lr=1e-4")
    known = {field.name for field in fields(Rule)}
    if unknown := set(entry) - known:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}; a rule knows {', '.join(sorted(known))}")
    rule = Rule(**entry)
    if not isinstance(rule.norms, bool):
        raise ValueError(f"{where}.norms is {rule.norms!r}; it must be true or false: {where}.norms=true")
    if rule.match is None and not rule.norms:
        raise ValueError(
            f"{where} has no match; it needs a regular expression, {where}.match='head', or {where}.norms=true"
        )
    if (rule.layer_decay is None) != (rule.num_layers is None):
        raise ValueError(
            f"{where} sets one of layer_decay ({rule.layer_decay}) and num_layers ({rule.num_layers}); "
            f"it needs both or neither: {where}.layer_decay=null {where}.num_layers=null"
        )
    for key in ("match", "no_weight_decay", "block", "stem"):
        pattern = getattr(rule, key)
        try:
            re.compile("" if pattern is None and key in ("match", "no_weight_decay") else pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{where}.{key} is {pattern!r}, no regular expression ({error}): {where}=null") from error
    return rule


def _refuse_unused(parsed: dict[str, Rule], sorted_: Values, first_match: dict[str, str]) -> None:
    """Refuse a rule without parameters: a wrong network, a typing error, or an earlier rule that matches all."""
    for name, rule in parsed.items():
        if sorted_[name]:
            continue
        if name in first_match:
            why = f"optim.param_groups.{first_match[name]} comes first and matches all of them"
        else:
            why = "no trainable parameter matches"
        kind = "norms" if rule.norms else "parameters"
        what = kind if rule.match is None else f"{kind} that match {rule.match!r}"
        raise ValueError(
            f"optim.param_groups.{name} is for {what}: {why}; it must match at least one parameter: "
            f"optim.param_groups.{name}=null removes it"
        )
