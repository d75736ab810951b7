"""Products and convolutions that are faster on a CPU than torch's own.

For products of float32 matrices torch asks MKL, which keeps AVX-512 for Intel's processors; on AMD's, oneDNN, by which
torch convolves, takes half the time. Sums are rounded differently, so the library is a setting of a run. Depthwise
convolutions are trained in float32 whatever the library, see `Depthwise`.

Legend: N tokens, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

LIBRARIES = ("torch", "onednn")
SMALL = 1 << 21  # multiplications; for fewer the time goes into the call, and torch's is the shorter one
# activations that oneDNN computes while it writes a product, by its names
FUSED: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish", nn.GELU: "gelu"}
# weights as oneDNN wants them, of layers in use, by type; not in the layers, because such tensors cannot be copied or
# saved
_packed: WeakKeyDictionary[nn.Module, dict[torch.dtype, Tensor]] = WeakKeyDictionary()


def is_there() -> bool:
    """Whether this build of torch can ask oneDNN for a product, by an operator that is not public."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fastest() -> str:
    """The library that is faster on this kind of processor; not measured, because load would decide."""
    info = Path("/proc/cpuinfo")
    make = info.read_text(encoding="utf-8", errors="replace") if info.exists() else platform.processor()
    is_slow = "AuthenticAMD" in make and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if is_slow and is_there() else "torch"


def use(modules: Iterable[nn.Module], library: str) -> None:
    """Let the linear layers and 1 x 1 convolutions among modules compute by one of `LIBRARIES`, in place.

    Depthwise convolutions become `Depthwise` with either. Only classes of modules change: names, tensors and all that
    is registered stay as they are.
    """
    swaps: dict[type, type] = {nn.Linear: Linear, nn.Conv2d: Pointwise}
    if library == "torch":
        swaps = {ours: plain for plain, ours in swaps.items()}
    for module in modules:
        own = type(module)
        kind = own.__bases__[0] if parametrize.is_parametrized(module) else own  # a class of its own over the layer's
        if isinstance(module, nn.Conv2d) and not _is_pointwise(module):
            if module.groups == module.in_channels > 1 and kind is own and not isinstance(module, Depthwise):
                module.__class__ = _depthwise(type(module))
        elif kind in swaps and kind is own:
            module.__class__ = swaps[kind]
        elif kind in swaps:
            own.__bases__ = (swaps[kind],)


def pack(modules: Iterable[nn.Module]) -> None:
    """Let layers that compute by oneDNN lay their weights out for it once, at their first use, and not in every call.

    For inference, in float32 and under autocast in bfloat16: weights must not change from then on. They stay in the
    module, too, for all other uses.
    """
    found = list(modules)
    if any(isinstance(module, Linear | Pointwise) for module in found):
        for module in found:
            if type(module) in (nn.Conv2d, Pointwise, Depthwise) and _has_plain_padding(module):
                module.__class__ = Packed
            elif isinstance(module, Linear):
                module.is_packed = True


def activated(layer: nn.Module, act: nn.Module, input: Tensor) -> Tensor:
    """`act(layer(input))`; of a packed layer in one pass over memory, where oneDNN knows the activation."""
    name = None if getattr(act, "approximate", "none") != "none" else FUSED.get(type(act))
    if name is None or not isinstance(layer, Linear | Packed) or layer.packs(input) is None:
        return act(layer(input))
    return layer(input, name)


def linear_like(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`F.linear`, computed by the library of a linear layer."""
    return linear if isinstance(layer, Linear) else F.linear


def are_worth_it(query: Tensor, key: Tensor, layer: nn.Module) -> bool:
    """Whether products of matrices in `[B, heads, N, d]` are faster one by one, by the library of a linear layer."""
    return (
        isinstance(layer, Linear)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _fits(query, key)
        and query.shape[-2] * key.shape[-2] * key.shape[-1] >= SMALL
    )


class Linear(nn.Linear):
    """A linear layer by oneDNN.

    Attributes:
        is_packed: see `pack`.
    """

    is_packed = False

    def forward(self, input: Tensor, act: str = "none") -> Tensor:
        dtype = self.packs(input)
        if dtype is None:
            return linear(input, self.weight, self.bias)
        rows = input.reshape(-1, input.shape[-1]).to(dtype)
        kept = _packed.setdefault(self, {})
        if dtype not in kept:
            weight = self.weight.detach().to(dtype).contiguous()
            kept[dtype] = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        made = torch.ops.mkldnn._linear_pointwise(rows, kept[dtype], bias, act, [], "none")
        return made.view(*input.shape[:-1], -1)

    def packs(self, input: Tensor) -> torch.dtype | None:
        """The type of the product of packed weights; None: they are not used."""
        return _packing(input, self.weight) if self.is_packed and input.numel() * self.out_features >= SMALL else None


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution of stride 1 by oneDNN, forward and backward."""

    def forward(self, input: Tensor) -> Tensor:
        if not _fits(input, self.weight):
            return super().forward(input)
        # a dilation changes nothing in a kernel of one cell, but with it torch does not replace the convolution by its
        # own product, as it would with one thread and less than 16 images
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, dilation=2)


class Depthwise(nn.Conv2d):
    """A convolution with a kernel per channel, trained in float32 under autocast on a CPU.

    In bfloat16 oneDNN computes the gradients of stride 2 and of kernels of 5 cells by programs for whole convolutions,
    which take up to ten times as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(input)
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(dtype)

    def __reduce__(self) -> str | tuple[Any, ...]:
        if parametrize.is_parametrized(self):
            return super().__reduce__()  # torch refuses it in a sentence
        # by the kind of convolution, because its own class may have no name by which another process could find it
        return _blank_depthwise, (type(self).__bases__[-1],), self.__dict__


def _blank_depthwise(kind: type[nn.Conv2d]) -> nn.Conv2d:
    made = _depthwise(kind)
    return made.__new__(made)


def _depthwise(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """`Depthwise` for a convolution of some kind, e.g. one of timm's that pads by itself."""
    if kind not in _depthwise_kinds:
        _depthwise_kinds[kind] = type(kind.__name__, (Depthwise, kind), {})
    return _depthwise_kinds[kind]


_depthwise_kinds: dict[type, type[nn.Conv2d]] = {nn.Conv2d: Depthwise}


class Packed(nn.Conv2d):
    """A convolution for inference; see `pack`."""

    def forward(self, input: Tensor, act: str = "none") -> Tensor:
        dtype = self.packs(input)
        if dtype is None:
            return super().forward(input)
        shape = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
        kept = _packed.setdefault(self, {})
        if dtype not in kept:
            weight = self.weight.detach().to(dtype).contiguous()
            kept[dtype] = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, list(input.shape))
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        return torch.ops.mkldnn._convolution_pointwise(input.to(dtype), kept[dtype], bias, *shape, act, [], "none")

    def packs(self, input: Tensor) -> torch.dtype | None:
        """The type of the product of packed weights; None: they are not used."""
        return _packing(input, self.weight) if input.dim() == 4 else None


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by oneDNN where it can: `[..., I]` and `[O, I]` -> `[..., O]`."""
    if not _fits(tokens, weight) or tokens.numel() * weight.shape[0] < SMALL:
        return F.linear(tokens, weight, bias)
    rows = tokens.reshape(-1, tokens.shape[-1])
    product = _Linear.apply if torch.is_grad_enabled() else _product
    # not a view for autograd, as in `F.linear`: the hooks of FSDP would be lost if it were changed in place
    return torch.ops.aten._unsafe_view(product(rows, weight, bias), (*tokens.shape[:-1], len(weight)))


class _Linear(torch.autograd.Function):
    """`[N, I]` -> `[N, O]`; its backward pass are products by oneDNN as well, so that it has further derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _Linear.apply(grad, weight.t(), None) if of_rows else None,
            _outer(grad, rows) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _outer(grad: Tensor, rows: Tensor) -> Tensor:
    """`[N, O]` and `[N, I]` -> `[O, I]`, the sum of their outer products; the narrower one is transposed by a copy."""
    if grad.shape[1] > rows.shape[1]:
        return _Linear.apply(rows.t(), grad.t(), None).t()
    return _Linear.apply(grad.t(), rows.t(), None)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Inductor takes oneDNN's operator with weights that are constants only, so it is not shown what this one does
    return (_opaque if torch.compiler.is_compiling() else _computed)(rows, weight, bias)


def _computed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN reads a matrix row by row or column by column
    weight = weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # and a bias without asking for its stride
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


_opaque = torch.library.custom_op("detr_exp::product", _computed, mutates_args=())
_opaque.register_fake(lambda rows, weight, bias: rows.new_empty(rows.shape[0], weight.shape[0]))


def _fits(tokens: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN has this product: of plain float32 tensors on the CPU, neither traced nor under autocast."""
    return (
        _is_plain(tokens)
        and _is_plain(weight)
        and tokens.dtype is weight.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _packing(tokens: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type of a product of packed weights; None where there is none."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (_is_plain(tokens) and _is_plain(weight)):
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if tokens.dtype is weight.dtype is torch.float32 else None
    is_half = torch.get_autocast_dtype("cpu") is torch.bfloat16 and weight.dtype is torch.float32
    return torch.bfloat16 if is_half and tokens.dtype in (torch.float32, torch.bfloat16) else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own on the CPU, with numbers in it, and not traced."""
    return (
        not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
    )


def _has_plain_padding(layer: nn.Module) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _is_pointwise(layer: nn.Conv2d) -> bool:
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.groups, layer.padding_mode)
    return shape == ((1, 1), (1, 1), (0, 0), 1, "zeros")
