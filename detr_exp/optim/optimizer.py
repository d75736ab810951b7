"""Whether what a config says of an optimiser is what that optimiser takes; asked before anything starts."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import nn

from detr_exp.values import Values

# Of torch.optim; each has an option in conf/optim/.
OPTIMIZERS = (
    *("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "SGD", "ASGD", "RMSprop"),
    *("Adagrad", "Adadelta", "Rprop", "Adafactor"),
)
UNFIT = {
    "LBFGS": "asks for the loss several times a step",
    "SparseAdam": "takes sparse gradients only",
    "Muon": "takes matrices only; optim=muon gives it those, and the rest to AdamW",
}
ELSEWHERE = ("lr", "weight_decay")  # every group has its own


def refuse_wrong_optimizer(make: partial[torch.optim.Optimizer], optim: Values) -> None:
    """Refuse keys that the optimiser does not take, and values that it refuses.

    Args:
        make: the optimiser, waiting for its parameters.
        optim: the group's other settings.

    Raises:
        ValueError: with the key that fixes it.
    """
    name = make.func.__name__
    taken = inspect.signature(make.func).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for key in make.keywords:
        if key in ELSEWHERE:
            raise ValueError(f"optim.optimizer.{key} would be overruled by optim.{key}; set that: optim.{key}=...")
        if key not in taken and not takes_any:
            own = ", ".join(one for one in taken if one not in ("params", *ELSEWHERE))
            raise ValueError(
                f"optim.optimizer.{key} is set, which {name} does not take (it takes: {own}); choose the optimiser by "
                f"its option, optim={name.lower()}, or take the key out: ~optim.optimizer.{key}"
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
        raise ValueError(f"{name} refuses {values}: {error}; optim={name.lower()} brings values that fit it") from error
