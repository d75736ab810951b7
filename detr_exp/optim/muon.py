"""Muon for matrices, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the momentum of a matrix orthogonal before
it is subtracted. It applies only to the matrices of hidden layers: embeddings, class heads, and parameters that do not
have two dimensions (convolutions, norms, biases) are trained by AdamW, as its authors and torch recommend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from detr_exp.protocols import Network
from detr_exp.values import Values


class Muon(torch.optim.Optimizer):
    """torch's Muon and AdamW over one list of groups; this object holds their state and groups, for checkpoints.

    Args:
        params: groups made by `split`, or plain ones, whose matrices Muon trains.
        lr: of groups without one.
        weight_decay: of groups without one; decoupled in both.
        momentum: of Muon, in [0, 1).
        nesterov: Nesterov's form of it.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: how the rate depends on a matrix's shape: `match_rms_adamw` or `original`.
        betas: of AdamW.

    Raises:
        ValueError: a value out of its range, or a torch without Muon.
    """

    def __init__(
        self,
        params: Iterable[Tensor | Values],
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.999),
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"torch {torch.__version__} has no Muon, which needs torch >= 2.9; use optim=adamw")
        unused = [nn.Parameter(torch.zeros(1, 1))]  # neither optimiser accepts an empty list
        self.muon = torch.optim.Muon(
            unused, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
        )
        self.adamw = torch.optim.AdamW(unused, betas=(betas[0], betas[1]))
        given = list(params)
        groups = [item for item in given if isinstance(item, dict)] or [{"params": given}]
        whole = [part for group in groups for part in ([group] if "muon" in group else _parts(group, set()))]
        own: dict[bool, Values] = {True: self.muon.defaults, False: self.adamw.defaults}
        rates = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([{**own[group["muon"]], **rates, **group} for group in whole], rates)

    @staticmethod
    def split(groups: list[Values], network: Network) -> list[Values]:
        """Split each group into its matrices of hidden layers and its other parameters."""
        heads = network.class_tensors()
        others = {id(parameter) for name, parameter in network.named_parameters() if name in heads}
        others |= {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
        return [part for group in groups for part in _parts(group, others)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both. Loading a state replaces the groups, so they are passed on at every step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer, takes_matrices in ((self.muon, True), (self.adamw, False)):
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] is takes_matrices]
            optimizer.state = self.state
            optimizer.step()
        return loss


def _parts(group: Values, others: set[int]) -> list[Values]:
    """A group's matrices, except `others` (by id), and its other parameters; without empty groups."""
    matrices = [p for p in group["params"] if p.ndim == 2 and id(p) not in others]
    chosen = {id(p) for p in matrices}
    rest = [p for p in group["params"] if id(p) not in chosen]
    name = group.get("name", "group")
    parts = [
        {**group, "name": f"{name}_matrices", "params": matrices, "muon": True},
        {**group, "name": name, "params": rest, "muon": False},
    ]
    return [part for part in parts if part["params"]]
