"""Exponential moving average of a network's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detr_exp.ops.transfer import to_device
from detr_exp.protocols import Network
from detr_exp.tensor_files import Stored
from detr_exp.trainer.sharding import from_local_part, is_sharded, local_part


class EMA:
    """Average of the trainable parameters and the floating-point buffers of a network.

    After update u the average is `d(u) * average + (1 - d(u)) * weights` with `d(u) = decay * (1 - exp(-u / tau))`
    and u counted from 1 (the ModelEMA of RT-DETR and YOLOv5): early averages forget the initialisation quickly.

    Where ranks hold parts of the parameters (FSDP), each rank averages its own parts. The formula is elementwise, so
    together they are the average of the whole network, and no rank ever holds all of it.

    Args:
        network: its current weights are the initial average; later updates read it again.
        decay: limit of d(u), in [0, 1); averages over about `1 / (1 - decay)` updates.
        tau: updates until d(u) has reached 63 % of `decay`; 0 uses `decay` from the start.
        update_interval: number of calls of `update` per change of the average.
        copy_first: the first update copies the weights and the second one uses d(2), as in RF-DETR.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(
        self, network: Network, *, decay: float, tau: float, update_interval: int = 1, copy_first: bool = False
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"trainer.ema_decay is {decay}; it must be in [0, 1): trainer.ema_decay=0.999")
        self.decay, self.tau = decay, tau
        self.update_interval, self.copy_first = update_interval, copy_first
        self.calls = 0
        self.updates = 0
        live = averaged_tensors(network)
        self.names = list(live)
        self.tensors = list(live.values())
        self.live = [local_part(tensor) for tensor in self.tensors]
        self.average = [tensor.detach().clone() for tensor in self.live]
        self.num_parameters = sum(isinstance(tensor, nn.Parameter) for tensor in self.tensors)

    def decay_at(self, update: int) -> float:
        """d(u) of the u-th update, u from 1."""
        if update == 1 and self.copy_first:
            return 0.0
        if self.tau <= 0:
            return self.decay
        return self.decay * (1 - math.exp(-update / self.tau))

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Add the current weights of the network to the average.

        Args:
            skipped: `[]`; if it is not zero, the average is not changed, because the step was not applied. It is not
                read on devices where reading would synchronise. The update is counted in any case.
        """
        self.calls += 1
        if self.calls % self.update_interval:
            return
        self.updates += 1
        weight = 1 - self.decay_at(self.updates)
        if skipped is not None and skipped.device.type != "cpu":
            self._update_where(skipped == 0, to_device(torch.tensor(weight), skipped.device))
        elif skipped is None or not skipped:
            torch._foreach_lerp_(self.average, self.live, weight)

    def _update_where(self, applied: Tensor, weight: float | Tensor) -> None:
        """Update the average by `weight` `[]` only if the step was `applied` `[]`; neither is read from the device.

        Parameters of a skipped step are finite, so a weight of zero leaves their average unchanged. Buffers are not
        protected by the optimiser: batch statistics may hold NaN, and NaN times zero is NaN; they are selected.
        """
        n = self.num_parameters
        difference = torch._foreach_sub(self.live[:n], self.average[:n])
        torch._foreach_mul_(difference, applied * weight)
        torch._foreach_add_(self.average[:n], difference)
        for average, buffer in zip(self.average[n:], self.live[n:]):
            average.lerp_(torch.where(applied, buffer, average), weight)

    @contextmanager
    def swapped(self, network: Network) -> Iterator[None]:
        """`network` has the averaged weights inside the `with` block and its original weights after it.

        Storage is exchanged and nothing is copied, so compiled and wrapped forms of the network see the averages, too.

        Args:
            network: the network that is averaged, or another one of the same architecture.
        """
        live = list(averaged_tensors(network).values())
        self._exchange(live)
        try:
            yield
        finally:
            self._exchange(live)

    def _exchange(self, live: list[Tensor]) -> None:
        for i, tensor in enumerate(live):
            if is_sharded(tensor):  # FSDP computes from its own storage, so values are exchanged
                part = local_part(tensor)
                values = part.clone()
                part.copy_(self.average[i])
                self.average[i].copy_(values)
            else:
                tensor.data, self.average[i] = self.average[i], tensor.data

    def state_dict(self) -> Stored:
        average = [from_local_part(tensor, part) for tensor, part in zip(self.tensors, self.average)]
        return {"average": dict(zip(self.names, average)), "updates": self.updates, "calls": self.calls}

    def load_state_dict(self, state: Stored) -> None:
        """Restore averages and counters; the settings remain those of the constructor.

        Raises:
            ValueError: when the saved tensors do not have the names of this network.
        """
        if unlike := set(self.names) ^ set(state["average"]):
            raise ValueError(
                f"saved average and network differ in {len(unlike)} tensors ({', '.join(sorted(unlike)[:5])}); "
                "resume with the configuration of the run, or start a new run: trainer.resume=null"
            )
        for average, name in zip(self.average, self.names):
            average.copy_(local_part(state["average"][name]))
        self.updates, self.calls = state["updates"], state["calls"]


def averaged_tensors(network: Network) -> dict[str, Tensor]:
    """Trainable parameters, then the floating-point buffers that are saved with the network, each once, by name."""
    saved = network.state_dict().keys()
    parameters: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    buffers = {name: b for name, b in network.named_buffers() if name in saved and b.is_floating_point()}
    return parameters | buffers
