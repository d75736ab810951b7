"""Products by oneDNN give those of torch, in every use of a layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from detr_exp.model.adapter.lora import LowRank
from detr_exp.model.layer.attention import SelfAttention, attend
from detr_exp.model.layer.conv import ConvNorm
from detr_exp.ops import products

pytestmark = pytest.mark.skipif(not products.is_there(), reason="this build of torch cannot ask oneDNN")

FASTEST = products.fastest.__wrapped__
CLOSE = dict(rtol=1e-4, atol=1e-4)


class Small(nn.Module):
    """Linear layers, an activation in place, a packed projection, a 1 x 1 convolution and a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.act, self.back = nn.Linear(64, 256), nn.ReLU(inplace=True), nn.Linear(256, 64, bias=False)
        self.attention = SelfAttention(64, 4)
        self.mix, self.blur = ConvNorm(64, 64, 1, act="relu"), ConvNorm(64, 64, 3)

    def forward(self, tokens):
        """`[B, 256, 64]` -> `[B, 64, 16, 16]`."""
        tokens = self.attention(self.back(self.act(self.wide(tokens))), tokens[0])
        return self.blur(self.mix(tokens.transpose(1, 2).unflatten(-1, (16, 16))))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    plain = Small().eval()
    fast = copy.deepcopy(plain)
    products.use(fast.modules(), "onednn")
    return plain, fast, torch.randn(2, 256, 64)


class Products(TorchDispatchMode):
    """Counts the products by oneDNN, and collects the programs by which torch convolves."""

    def __init__(self):
        super().__init__()
        self.count, self.convolutions, self.names, self.converted = 0, set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.mkldnn._linear_pointwise.default
        self.names.add(str(func))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
            self.converted.add(args[0].shape)
        if func is torch.ops.aten.convolution.default:
            self.convolutions.add(torch._C._select_conv_backend(*args).name)
        return func(*args, **(kwargs or {}))


def seen(network, tokens):
    with Products() as found:
        gradients(network, tokens)
    return found.count, found.convolutions


def gradients(network, tokens):
    tokens = tokens.clone().requires_grad_()
    network.zero_grad()
    out = network(tokens)
    out.square().mean().backward()
    return [out, tokens.grad, *(parameter.grad for parameter in network.parameters())]


def test_forward_and_backward_are_those_of_torch(pair):
    plain, fast, tokens = pair
    for network in pair[:2]:
        network.train()
    torch.testing.assert_close(gradients(fast, tokens), gradients(plain, tokens), **CLOSE)
    assert seen(fast, tokens) == (5 * 3, {"Mkldnn"}), "of five products: forward, and two backward"
    assert seen(plain, tokens) == (0, {"Mkldnn", "Slow2d"})
    assert not fast.wide(tokens)._is_view(), "which may be changed in place, under hooks"
    one, other = gradients(fast, tokens), gradients(fast, tokens)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("library", products.LIBRARIES)
def test_names_and_tensors_stay(pair, library):
    plain, fast, _ = pair
    products.use(fast.modules(), library)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    kinds = {"torch": [nn.Linear] * 3, "onednn": [products.Linear] * 3}
    assert [type(part) for part in fast.modules() if isinstance(part, nn.Linear)] == kinds[library]
    assert type(fast.blur.conv) is nn.Conv2d, "is by oneDNN in any case"
    again = pickle.loads(pickle.dumps(fast))
    assert type(again.wide) is type(fast.wide)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:0],
        lambda x: x[:, :5],
        lambda x: x[0, 0],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1, :1].expand(2, 300, -1),
        lambda x: x.flip(-1) * 1e-41,
        lambda x: torch.where(x > 3, torch.nan, x),
        lambda x: torch.where(x > 3, torch.inf, x),
        lambda x: x.double(),
        lambda x: x.bfloat16(),
    ],
    ids=[
        *("empty", "short", "vector", "transposed", "strided", "expanded", "subnormal", "nan", "infinite"),
        *("double", "bfloat16"),
    ],
)
def test_inputs_of_every_kind(pair, change):
    tokens = change(pair[2])
    for out in (256, 31):
        weight, bias = torch.randn(out, 64).to(tokens.dtype), torch.randn(out).to(tokens.dtype)
        for one in (weight, weight.t().contiguous().t(), torch.randn(2 * out, 128).to(tokens.dtype)[::2, ::2]):
            found, right = products.linear(tokens, one, bias), F.linear(tokens, one, bias)
            torch.testing.assert_close(found, right, equal_nan=True, **(CLOSE if tokens.dtype is torch.float32 else {}))


def rounding(layer, inputs, grad):
    """Largest errors of a layer's output and of its three gradients, in units of the sums of absolute products."""

    def of(layer, inputs, grad):
        inputs = inputs.clone().requires_grad_()
        out = layer(inputs)
        return [out.detach(), *torch.autograd.grad(out, [inputs, layer.weight, layer.bias], grad)]

    exact, sums = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in sums.parameters():
            parameter.abs_()
    right = of(exact, inputs.double(), grad.double())
    sizes = of(sums, inputs.double().abs(), grad.double().abs())
    return [((a - b).abs() / size).max() for a, b, size in zip(of(layer, inputs, grad), right, sizes)]


def scaled(length, span):
    return torch.logspace(-span, span, length)[torch.randperm(length)]


@pytest.mark.parametrize("kind", ["normal", "positive", "cancelling", "scaled", "subnormal"])
@pytest.mark.parametrize("shape", [(997, 251, 131), (300, 256, 1024), (1160, 384, 96), (8400, 64, 36)])
@pytest.mark.parametrize("convolves", [False, True])
def test_products_are_as_exact_as_torchs(shape, convolves, kind):
    torch.manual_seed(0)
    tokens, inner, outer = shape
    plain = nn.Conv2d(inner, outer, 1) if convolves else nn.Linear(inner, outer)
    inputs, grad = torch.randn(tokens, inner), torch.randn(tokens, outer)
    if kind == "positive":
        inputs, grad = inputs.abs() + 1, grad.abs() + 1
    if kind == "cancelling":  # sums that end near zero, after large ones
        inputs[:, 1::2] = -inputs[:, : inner // 2 * 2 : 2]
        grad[1::2] = -grad[: tokens // 2 * 2 : 2]
    if kind == "scaled":
        inputs, grad = inputs * scaled(inner, 6), grad * scaled(tokens, 6)[:, None]
    if kind == "subnormal":  # the products, not what they are made of
        inputs, grad = inputs * 1e-20, grad * 1e-20
        plain.weight.data.mul_(1e-20)
    if convolves:
        inputs, grad = (part.t().reshape(1, -1, 1, tokens) for part in (inputs, grad))
    fast = copy.deepcopy(plain)
    products.use([fast], "onednn")
    with Products() as found:
        errors = rounding(fast, inputs, grad)
    assert found.count == (0 if convolves else 3)
    assert ("Mkldnn" in found.convolutions) == convolves
    # convolutions by oneDNN, torch's own of other kernels too, sum the gradient of a bias in one long chain
    for ours, torchs, limit in zip(errors, rounding(plain, inputs, grad), (4, 4, 6, 50 if convolves else 2)):
        assert ours <= limit * torchs


def test_second_derivatives(pair):
    def of(linear):
        tokens, weight = pair[2].clone().requires_grad_(), pair[0].wide.weight
        (slope,) = torch.autograd.grad(linear(tokens, weight, None).pow(3).mean(), tokens, create_graph=True)
        return torch.autograd.grad(slope.square().sum() * 1e3, [tokens, weight])

    torch.testing.assert_close(of(products.linear), of(F.linear), **CLOSE)
    double = nn.Linear(8, 8).double()
    double.__class__ = products.Linear
    assert torch.autograd.gradcheck(
        double, torch.randn(300, 8, dtype=torch.float64, requires_grad=True), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_first(pair, dtype):
    plain, fast, tokens = pair
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert torch.equal(fast.wide(tokens), plain.wide(tokens))
        assert torch.equal(fast.mix.conv(tokens.view(2, 64, 16, 16)), plain.mix.conv(tokens.view(2, 64, 16, 16)))


def test_what_is_no_memory_here_stays_with_torch(pair):
    fast, tokens = pair[1:]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(tokens)).shape == (2, 64, 16, 16)
    assert fast.to("meta")(tokens.to("meta")).device.type == "meta"


def test_exported_graphs_hold_torchs_operators(pair):
    plain, fast, tokens = pair
    graphs = [str(torch.export.export(network, (tokens,), strict=False).graph) for network in (plain, fast)]
    assert graphs[0] == graphs[1]
    traced = torch.jit.trace(fast, tokens)
    assert "mkldnn" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(tokens), fast(tokens), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_network_is_one_graph_for_the_compiler(pair, backend):
    fast, tokens = pair[1:]
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(compiled, tokens)[:2], gradients(fast, tokens)[:2], **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), fast(tokens), **CLOSE)


def test_the_compiler_is_not_shown_operators_that_need_constants(pair):
    fast, tokens = pair[1:]
    seen = []
    with torch.no_grad():
        made = torch.compile(fast, fullgraph=True, backend=lambda graph, _: seen.append(graph.code) or graph)(tokens)
        assert "detr_exp.product" in seen[0]
        assert "mkldnn" not in seen[0]
        assert torch.equal(made, fast(tokens))


def test_adapted_layers_can_be_merged(pair):
    plain, _, tokens = pair
    networks = [plain, copy.deepcopy(plain)]
    for network in networks:
        torch.manual_seed(1)
        for layer, name in ((network.wide, "weight"), (network.attention, "in_proj_weight")):
            parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), 2, 1.0, 0.0))
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    products.use(networks[1].modules(), "onednn")
    networks[1].load_state_dict(plain.state_dict())
    torch.testing.assert_close(gradients(networks[1], tokens), gradients(plain, tokens), **CLOSE)
    parametrize.remove_parametrizations(networks[1].wide, "weight")
    assert type(networks[1].wide) is products.Linear
    products.use(networks[1].modules(), "torch")
    assert type(networks[1].wide) is nn.Linear


def test_a_folded_convolution_stays_with_its_library(pair):
    plain, fast, tokens = pair
    maps = tokens.view(2, 64, 16, 16)
    right = plain.mix(maps)
    fast.mix.fold()
    assert isinstance(fast.mix.conv, products.Pointwise)
    torch.testing.assert_close(fast.mix(maps), right, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [torch.arange(512.0)[::2], torch.ones(1).expand(256)])
@pytest.mark.parametrize("layer", [nn.Linear(64, 256), nn.Conv2d(64, 256, 1), nn.Conv2d(64, 256, 3)])
def test_a_bias_may_lie_scattered_in_memory(layer, bias):
    layer = copy.deepcopy(layer)
    layer.bias = nn.Parameter(bias)
    inputs = torch.randn(2, 64, 32, 64)
    right, both = layer(inputs), [layer, nn.Linear(1, 1)]
    products.use(both, "onednn")
    torch.testing.assert_close(layer(inputs), right, **CLOSE)
    products.pack(both)
    torch.testing.assert_close(layer(inputs), right, **CLOSE)


@torch.inference_mode()
def test_what_cannot_be_packed_is_computed_all_the_same():
    layers = [nn.Conv2d(16, 16, 3, padding="same"), nn.Conv2d(16, 16, 3), nn.Linear(64, 256)]
    inputs = [torch.randn(1, 16, 9, 9), torch.randn(16, 9, 9), torch.randn(9, 64)]
    right = [layer(one) for layer, one in zip(layers, inputs)]
    products.use(layers, "onednn")
    products.pack(layers)
    for layer, one, wanted in zip(layers, inputs, right):
        torch.testing.assert_close(layer(one), wanted, **CLOSE)
    with pytest.raises(RuntimeError):
        layers[2](torch.randn(2, 600, 128))  # and not as if it were 2,400 rows of 64


@torch.inference_mode()
def test_packed_weights_give_the_same_in_every_use(pair):
    plain, fast, tokens = pair
    right = plain(tokens)
    fast.mix.fold()
    fast.to(memory_format=torch.channels_last)
    products.pack(fast.modules())
    for network in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for _ in range(2):
            torch.testing.assert_close(network(tokens), right, **CLOSE)
    assert all(layer in products._packed for layer in (fast.wide, fast.back, fast.mix.conv, fast.blur.conv))
    torch.testing.assert_close(fast.blur(right[:1, :, :5, :9]), plain.blur(right[:1, :, :5, :9]), **CLOSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast.blur.conv(right), plain.blur.conv(right))
    assert fast.double()(tokens.double()).dtype is torch.float64


@torch.inference_mode()
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Identity()])
@pytest.mark.parametrize("layer", [nn.Linear(64, 256), nn.Conv2d(64, 96, 3, bias=False), nn.Conv2d(64, 32, 1)])
def test_packed_layers_compute_activations_on_the_way(layer, act):
    layer, inputs = copy.deepcopy(layer), torch.randn(1, 64, 256, 64)
    right = act(layer(inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = act(layer(inputs))
    both = [layer, nn.Linear(1, 1)]
    products.use(both, "onednn")
    products.pack(both)
    with Products() as found:
        torch.testing.assert_close(products.activated(layer, act, inputs), right, **CLOSE)
    passes = {"aten.relu.default", "aten.silu.default", "aten.gelu.default"} & found.names
    assert bool(passes) == (isinstance(act, nn.GELU) and act.approximate == "tanh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = products.activated(layer, act, inputs)
    assert found.dtype is rounded.dtype
    torch.testing.assert_close(found, rounded, rtol=0.02, atol=0.02)


@torch.inference_mode()
def test_a_packed_network_in_bfloat16_converts_its_weights_once(pair):
    plain, fast, tokens = pair
    products.pack(fast.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = plain(tokens)
        fast(tokens)
        with Products() as found:
            torch.testing.assert_close(fast(tokens), right, rtol=0.02, atol=0.02)
    assert {kept for layer in (fast.wide, fast.blur.conv) for kept in products._packed[layer]} == {torch.bfloat16}
    assert fast.wide.weight.shape not in found.converted
    torch.testing.assert_close(fast(tokens), plain(tokens), **CLOSE)
    assert set(products._packed[fast.wide]) == {torch.bfloat16, torch.float32}


def test_long_attention_is_computed_head_by_head_without_gradients():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 260, 3, 4, 32).permute(2, 0, 3, 1, 4)
    layer, ours = nn.Linear(8, 8), nn.Linear(8, 8)
    products.use([ours], "onednn")
    right = attend(query, key, value, None, 0.0, like=layer)
    for like, length, count in ((layer, 260, 0), (ours, 260, 16), (ours, 100, 0)):
        with Products() as found, torch.no_grad():
            made = attend(query[:, :, :length], key[:, :, :length], value[:, :, :length], None, 0.0, like=like)
        assert found.count == count
        if length == 260:
            torch.testing.assert_close(made, right, **CLOSE)
    query.requires_grad_()
    with Products() as found:
        attend(query, key, value, None, 0.0, like=ours).sum().backward()
    assert found.count == 0
    assert query.grad is not None


def test_only_networks_by_onednn_are_packed_and_they_still_train(pair):
    plain, fast, tokens = pair
    for network in (plain, fast):
        products.pack(network.modules())
    assert type(plain.blur.conv) is nn.Conv2d
    assert type(fast.blur.conv) is products.Packed
    torch.testing.assert_close(gradients(fast, tokens), gradients(plain, tokens), **CLOSE)


@pytest.mark.parametrize(
    ("make", "capability", "right"),
    [
        ("AuthenticAMD", "AVX512", "onednn"),
        ("AuthenticAMD", "AVX2", "torch"),
        ("GenuineIntel", "AVX512", "torch"),
        ("", "DEFAULT", "torch"),
    ],
)
def test_the_processor_decides(monkeypatch, make, capability, right):
    monkeypatch.setattr(products.Path, "read_text", lambda *_, **__: f"vendor_id : {make}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert FASTEST() == right
    monkeypatch.setattr(products, "is_there", lambda: False)
    assert FASTEST() == "torch"


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as timm has some."""

    def forward(self, input):
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, groups=self.groups)


@pytest.mark.parametrize("kind", [nn.Conv2d, Padded])
def test_depthwise_convolutions_are_trained_in_float32_and_used_in_any_type(kind):
    torch.manual_seed(0)
    plain = kind(8, 8, 3, stride=2, groups=8)
    ours = copy.deepcopy(plain)
    products.use([ours], "torch")
    products.use([ours], "torch")  # again changes nothing
    assert ours.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.randn(2, 8, 9, 9)
    for one in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(one) is type(ours)
        assert isinstance(one, kind)
        assert one(pixels).equal(plain(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        trained = ours(pixels.bfloat16())
        with torch.no_grad():
            assert ours(pixels).equal(plain(pixels))
    assert trained.dtype is torch.bfloat16
    assert trained.equal(plain(pixels.bfloat16().float()).bfloat16())
    (convolution, _), *_ = trained.grad_fn.next_functions
    assert convolution._saved_input.dtype is torch.float32


def test_a_parametrised_depthwise_convolution_is_not_pickled_as_another():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    products.use([layer], "torch")
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(layer)


def test_convolutions_of_groups_are_no_depthwise_ones():
    layers = nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=8)
    products.use(layers, "onednn")
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d]
