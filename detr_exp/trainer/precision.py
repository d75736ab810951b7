"""Mixed precision and the optimiser step, without synchronising with the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from detr_exp.trainer.sharding import full_tensor


class Precision:
    """Autocast for the forward pass; loss scaling, clipping and a guarded step for the backward pass.

    Args:
        device: where the network is.
        dtype: autocast type; None computes in float32.
        memory_format: of the network's weights; images use the same, because activations follow them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None, memory_format: torch.memory_format) -> None:
        self.device = device
        self.dtype = dtype
        self.memory_format = memory_format
        # bf16 has float32's range; only fp16 gradients vanish without scaling
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.scales = self.scaler.is_enabled()  # asked once: torch.compile refuses to ask it

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        clip_max_norm: float | None,
        loss: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Clip the gradients and step, unless loss or gradients are not finite.

        The decision stays on the device: fused optimisers read `found_inf` inside their kernel and leave weights and
        moments unchanged.

        Args:
            optimizer: a fused optimiser, or any other (which costs one read from the device per step).
            parameters: all trainable parameters.
            clip_max_norm: largest global gradient norm; None or 0: no clipping.
            loss: the step's loss, summed over its micro-batches.

        Returns:
            gradient norm before clipping `[]`, and whether the step was not finite `[]` (1.0 or 0.0). The scaler
            finds its scale by overflows of scaled fp16 gradients: such a step is skipped but not reported.
        """
        if self.scales:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        skipped = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        if clip_max_norm:
            factor = (clip_max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)
        if self.scales:
            self.scaler.step(optimizer)
            self.scaler.update()
            skipped = (~torch.isfinite(loss)).float()
        elif all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
        elif not skipped.item():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, skipped
