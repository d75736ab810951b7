"""Check the settings of an optimiser against its arguments before a run starts."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn

from detr_exp.values import Values

# Optimisers of torch.optim; each has an option in conf/optim/.
OPTIMIZERS = (
    *("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "SGD", "ASGD", "RMSprop"),
    *("Adagrad", "Adadelta", "Rprop", "Adafactor"),
)
UNFIT = {
    "LBFGS": "evaluates the loss several times per step",
    "SparseAdam": "accepts sparse gradients only",
    "Muon": "accepts matrices only; optim=muon uses AdamW for the other parameters",
}
ELSEWHERE = ("lr", "weight_decay")  # set per group


def refuse_wrong_optimizer(make: partial[torch.optim.Optimizer], optim: Values) -> None:
    """Refuse keys that are no arguments of the optimiser, and values that it does not accept.

    Args:
        make: builds the optimiser from its parameters.
        optim: the other settings of the config group `optim`.

    Raises:
        ValueError: names the override that fixes it.
    """
    name = make.func.__name__
    taken = inspect.signature(make.func).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for key in make.keywords:
        if key in ELSEWHERE:
            raise ValueError(f"optim.optimizer.{key} would be overridden by optim.{key}; set that: optim.{key}=...")
        if key not in taken and not takes_any:
            own = ", ".join(one for one in taken if one not in ("params", *ELSEWHERE))
            raise ValueError(
                f"optim.optimizer.{key} is set, but {name} has no such argument (it has: {own}); choose the optimiser "
                f"by its option, optim={name.lower()}, or remove the key: ~optim.optimizer.{key}"
            )
    rules = [rule.get("weight_decay") for rule in optim["param_groups"].values() if rule is not None]
    if "weight_decay" not in taken and not takes_any and any([optim["weight_decay"], *rules]):
        raise ValueError(
            f"optim.weight_decay is {optim['weight_decay']}, but {name} has no weight decay: optim.weight_decay=0"
        )
    parameter = nn.Parameter(torch.zeros(1, 1))
    parameter.grad = torch.zeros(1, 1)
    try:
        make([parameter]).step()
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        values = ", ".join(f"optim.optimizer.{key}={value}" for key, value in make.keywords.items())
        raise ValueError(f"{name} refuses {values}: {error}; optim={name.lower()} sets valid values") from error
