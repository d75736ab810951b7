"""Where a run computes: device, precision, memory layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OFF = (None, False, "null", "off", "none", "false")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Hardware settings, and the answers that follow from them on this machine.

    Args:
        device: `auto` (CUDA, then MPS, then CPU) or a torch device such as `cuda:1`.
        amp: autocast precision in training: `auto`, `bf16`, `fp16`, or null for float32.
        eval_amp: the same for evaluation.
        channels_last: lay activations and weights out as NHWC; `auto` follows `amp` on a CPU (where bf16
            convolutions are slow without it) and is on for CUDA.
        gradient_checkpointing: recompute backbone and encoder activations in the backward pass.
        compile: `torch.compile` the network.
        threads: of a CPU; null leaves the number to torch.

    Raises:
        ValueError: for a device that is not there or a precision it cannot compute in.
    """

    device: str
    amp: str | bool | None
    eval_amp: str | bool | None
    channels_last: str | bool
    gradient_checkpointing: bool
    compile: bool
    threads: int | None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(
                f"trainer.hardware.threads is {self.threads}; it must be >= 1 or null: trainer.hardware.threads=null"
            )
        self.torch_device, self.amp_dtype, self.eval_amp_dtype  # noqa: B018 - a wrong word is an error now, not later

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            if torch.cuda.is_available():
                return torch.device("cuda")
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(
                f"trainer.hardware.device is {self.device!r}, which torch does not know; "
                "use trainer.hardware.device=auto, cpu, cuda, cuda:<n> or mps"
            ) from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"trainer.hardware.device is {self.device!r} but torch sees no CUDA device; "
                "use trainer/hardware=auto or trainer/hardware=cpu"
            )
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError("trainer.hardware.device is mps but this machine has none; use trainer/hardware=auto")
        return device

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return self._dtype("amp", self.amp)

    @property
    def eval_amp_dtype(self) -> torch.dtype | None:
        return self._dtype("eval_amp", self.eval_amp)

    def _dtype(self, key: str, word: str | bool | None) -> torch.dtype | None:
        if word in OFF:
            return None
        if word == "auto":
            return _fastest_dtype(self.torch_device)
        if word not in AMP_DTYPES:
            raise ValueError(f"trainer.hardware.{key} is {word!r}; use bf16, fp16, auto or null")
        if word == "fp16" and self.torch_device.type == "cpu":
            raise ValueError(
                f"trainer.hardware.{key} is fp16, for which a CPU has no fast arithmetic; "
                f"use trainer.hardware.{key}=bf16 or trainer.hardware.{key}=null"
            )
        return AMP_DTYPES[str(word)]

    @property
    def memory_format(self) -> torch.memory_format:
        wanted = self.channels_last
        if wanted == "auto":
            # on a CPU bf16 convolutions are up to 3x slower than fp32 in NCHW and up to 7x faster in NHWC
            wanted = self.torch_device.type == "cuda" or self.amp_dtype is not None
        return torch.channels_last if wanted else torch.contiguous_format

    def place(self, network: Any) -> Any:
        """The network on the device, in the memory layout, with checkpointing and compilation as asked for."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        network.to(self.torch_device).to(memory_format=self.memory_format)
        if self.gradient_checkpointing:
            network.set_gradient_checkpointing(True)
        if self.compile:
            network.compile()
        return network

    def describe(self) -> str:
        device = self.torch_device
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{self.threads or torch.get_num_threads()} threads"
        )
        words = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        layout = "channels-last" if self.memory_format is torch.channels_last else "channels-first"
        return f"{device} ({name}), {words[self.amp_dtype]}, {layout}"


def _fastest_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return None


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (AMX or AVX512-BF16)."""
    answers = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return any(answer() for answer in answers if answer is not None)
