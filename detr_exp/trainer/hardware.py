"""Hardware of a run: device, precision, memory layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from detr_exp.ops import products
from detr_exp.protocols import Network
from detr_exp.terminal import counted
from detr_exp.trainer import distributed
from detr_exp.trainer.memory import keep_freed_memory
from detr_exp.trainer.precision import Precision

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OFF = (None, False, "null", "off", "none", "false")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Hardware settings, and the values that follow from them on this machine.

    Args:
        device: `auto` (CUDA, then MPS, then CPU) or a torch device such as `cuda:1`.
        amp: autocast precision in training: `auto`, `bf16`, `fp16`, `fp16_or_auto` (fp16 if it is fast and its loss
            scaling works: CUDA without FSDP), or null for float32.
        eval_amp: the same for evaluation.
        channels_last: store activations and weights as NHWC; `auto` follows `amp` and `products` on a CPU (bf16
            convolutions are slow without it) and is on for CUDA.
        products: library of the float32 matrix products on a CPU: `torch`, `onednn` or `auto`; see `ops.products`.
        gradient_checkpointing: recompute backbone and encoder activations in the backward pass.
        compile: `torch.compile` the network and, in training, the matching cost and the losses.
        threads: CPU threads; null: one per core, shared by the ranks of this machine.
        devices: ranks on this machine, one per device: a number, or `auto` for all CUDA devices. Under `torchrun` its
            number of ranks is used.
        strategy: `ddp`, every rank has the whole network, or `fsdp`, each rank has a part of every tensor.
        sync_bn: compute batch statistics over all ranks: true, false, or `auto`, on CUDA.
        timeout: seconds without a heartbeat of another rank after which this rank ends; > 0.

    Raises:
        ValueError: for a device that does not exist or a precision that it does not support.
    """

    device: str
    amp: str | bool | None
    eval_amp: str | bool | None
    channels_last: str | bool
    gradient_checkpointing: bool
    compile: bool
    threads: int | None
    devices: int | str = 1
    strategy: str = "ddp"
    sync_bn: bool | str = "auto"
    timeout: float = 300.0
    products: str = "auto"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(
                f"trainer.hardware.threads is {self.threads}; it must be >= 1 or null: trainer.hardware.threads=null"
            )
        self.torch_device, self.amp_dtype, self.eval_amp_dtype  # noqa: B018 - report wrong values early
        if self.strategy not in ("ddp", "fsdp"):
            raise ValueError(f"trainer.hardware.strategy is {self.strategy!r}; use ddp or fsdp")
        if self.sync_bn not in (True, False, "auto"):
            raise ValueError(f"trainer.hardware.sync_bn is {self.sync_bn!r}; use true, false or auto")
        if self.products not in ("auto", *products.LIBRARIES):
            raise ValueError(f"trainer.hardware.products is {self.products!r}; use auto, torch or onednn")
        self.refuse_absent_library()
        if self.strategy == "fsdp" and self.amp_dtype is torch.float16:
            raise ValueError(
                "trainer.hardware.amp is fp16, whose loss scaling does not work on parts of tensors; use "
                "trainer.hardware.amp=bf16, trainer.hardware.amp=null or trainer.hardware.strategy=ddp"
            )

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
    def num_ranks(self) -> int:
        """Number of processes to start on this machine.

        Raises:
            ValueError: there are fewer devices.
        """
        device = self.torch_device
        there = torch.cuda.device_count() if device.type == "cuda" else 1
        if self.devices == "auto":
            return there if device.index is None else 1
        if not isinstance(self.devices, int) or self.devices < 1:
            raise ValueError(
                f"trainer.hardware.devices is {self.devices!r}; use a number >= 1 or auto: trainer.hardware.devices=1"
            )
        if self.devices > 1 and (device.type == "mps" or device.index is not None):
            raise ValueError(
                f"trainer.hardware.devices is {self.devices} but trainer.hardware.device is {device}, which is one; "
                "use trainer.hardware.devices=1 or trainer/hardware=cuda"
            )
        if device.type == "cuda" and self.devices > there:
            raise ValueError(
                f"trainer.hardware.devices is {self.devices} but torch sees {there} CUDA devices; use "
                "trainer.hardware.devices=auto"
            )
        if self.sync_bn is True and self.devices > 1 and self.torch_device.type != "cuda":
            raise ValueError(
                "trainer.hardware.sync_bn is true, but torch synchronises batch norms on CUDA only; use "
                "trainer.hardware.sync_bn=false, or norms that do not see the batch: model.backbone.freeze_norm=true"
            )
        return self.devices

    def refuse_ranks(self, started: int) -> None:
        """Under `torchrun`: refuse a number of devices other than the number of started ranks."""
        if self.devices not in (1, "auto", started):
            raise ValueError(
                f"trainer.hardware.devices is {self.devices}, but torchrun has started {started} ranks on this "
                f"machine; leave trainer.hardware.devices out, or use torchrun --nproc-per-node={self.devices}"
            )

    @property
    def library(self) -> str:
        """Of the matrix products: `torch` or `onednn`."""
        if self.torch_device.type != "cpu":
            return "torch"
        return products.fastest() if self.products == "auto" else self.products

    def decided(self, before: str | None) -> Hardware:
        """These settings with one library on all ranks.

        Args:
            before: the library of the run that is resumed, which `auto` keeps; None: a new run, for which `auto` takes
                the choice of the first rank.

        Raises:
            ValueError: this build of torch lacks the library.
        """
        if self.products != "auto" or self.torch_device.type != "cpu":
            return self
        return replace(self, products=before or distributed.on_first_rank(products.fastest))

    def refuse_absent_library(self) -> None:
        """Raises: ValueError when this build of torch lacks the library."""
        if self.library == "onednn" and not products.is_there():
            raise ValueError(
                "trainer.hardware.products is onednn, in the config or in the run that is resumed, but this build of "
                "torch cannot ask oneDNN for a product; other last digits are possible: trainer.hardware.products=torch"
            )

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return self._dtype("amp", self.amp)

    @property
    def eval_amp_dtype(self) -> torch.dtype | None:
        return self._dtype("eval_amp", self.eval_amp)

    def _dtype(self, key: str, value: str | bool | None) -> torch.dtype | None:
        if value in OFF:
            return None
        if value == "fp16_or_auto":
            value = "fp16" if self.torch_device.type == "cuda" and self.strategy == "ddp" else "auto"
        if value == "auto":
            return _fastest_dtype(self.torch_device)
        if value not in AMP_DTYPES:
            raise ValueError(f"trainer.hardware.{key} is {value!r}; use bf16, fp16, fp16_or_auto, auto or null")
        if value == "fp16" and self.torch_device.type == "cpu":
            raise ValueError(
                f"trainer.hardware.{key} is fp16, which is slow on a CPU; "
                f"use trainer.hardware.{key}=bf16 or trainer.hardware.{key}=null"
            )
        return AMP_DTYPES[str(value)]

    @property
    def memory_format(self) -> torch.memory_format:
        channels_last = self.channels_last
        if channels_last == "auto":
            # on a CPU bf16 convolutions are up to 3x slower than fp32 in NCHW and up to 7x faster in NHWC
            in_onednn = self.amp_dtype is not None or self.library == "onednn"
            channels_last = self.torch_device.type == "cuda" or in_onednn
        return torch.channels_last if channels_last else torch.contiguous_format

    def precision(self, evaluating: bool = False) -> Precision:
        """Type and memory layout of the computation in training or evaluation."""
        return Precision(self.torch_device, self.eval_amp_dtype if evaluating else self.amp_dtype, self.memory_format)

    def place(self, network: Network) -> Network:
        """The network on the device, in the memory layout, with checkpointing and compilation as configured."""
        ranks = distributed.local_world_size()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        elif ranks > 1 and self.torch_device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        if self.sync_bn is not False and distributed.world_size() > 1 and self.torch_device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if self.torch_device.type == "cpu":
            keep_freed_memory()
        products.use(network.modules(), self.library)
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
            else counted(self.threads or torch.get_num_threads(), "thread")
        )
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        layout = "channels-last" if self.memory_format is torch.channels_last else "channels-first"
        ranks = f"{distributed.world_size()} ranks ({self.strategy}) x " if distributed.world_size() > 1 else ""
        products = ", products by oneDNN" if self.library == "onednn" else ""
        is_slow = device.type == "cpu" and self.amp_dtype is torch.bfloat16 and not cpu_has_bf16()
        slow = " (not in this processor: trainer.hardware.amp=null is faster)" if is_slow else ""
        return f"{ranks}{device} ({name}), {names[self.amp_dtype]}{slow}, {layout}{products}"


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
