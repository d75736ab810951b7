"""RT-DETRv2 as a whole: sizes, gradients, and what must not change its outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from detr_exp.structures import Outputs

LARGE = ["model.num_layers=6", "model.neck.expansion=1.0"]
WIDE = ["model.neck.hidden_dim=384", "model.neck.dim_feedforward=2048"]
# Parameters with 80 classes, and those that train: what the published networks have.
PARAMETERS = {
    "r18": ([], 20_184_464, 20_184_464),
    "r34": (["model/backbone=r34vd", "model.num_layers=4"], 31_441_668, 31_441_668),
    "r50_m": (["model/backbone=r50vd", "model.num_layers=6", "model.eval_idx=2"], 36_593_772, 36_565_260),
    "r50": (["model/backbone=r50vd", *LARGE], 42_891_372, 42_862_860),
    "r101": (["model/backbone=r101vd", *LARGE, *WIDE], 76_556_268, 76_527_756),
    "hgnetv2_l": (["model/backbone=hgnetv2_l", *LARGE], 32_925_036, 32_900_108),
    "hgnetv2_x": (["model/backbone=hgnetv2_x", *LARGE, *WIDE], 67_374_188, 67_348_748),
    "hgnetv2_h": (
        [
            "model/backbone=hgnetv2_h",
            *LARGE,
            "model.neck.hidden_dim=512",
            "model.neck.dim_feedforward=2048",
            "model.neck.num_encoder_layers=2",
        ],
        125_584_348,
        125_527_756,
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_published_networks(name, make):
    overrides, total, trained = PARAMETERS[name]
    with torch.device("meta"):
        network = make("model=rtdetrv2", *overrides, num_classes=80)
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == trained


def test_the_tiny_network_is_for_laptops(make):
    network = make("model=rtdetrv2_tiny", num_classes=5)
    assert sum(parameter.numel() for parameter in network.parameters()) < 4_000_000
    assert network.image_size == (160, 160)


def images(network, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(network.parameters()).dtype
    return torch.rand(batch, 3, *network.image_size, generator=generator, dtype=torch.float64).to(dtype)


def total(outputs: Outputs) -> torch.Tensor:
    """A number that every prediction takes part in."""
    parts = [outputs.layers, outputs.encoder, *([outputs.denoising.layers] if outputs.denoising else [])]
    return sum(part.logits.square().sum() + part.boxes.square().sum() for part in parts)


VARIANTS = {
    "as it is": [],
    "softmax": ["loss=ce"],
    "discrete": ["model.cross_attn_method=discrete"],
    "one2many": ["model.query_select_method=one2many"],
    "agnostic": ["model.query_select_method=agnostic"],
    "learned queries": ["model.learn_query_content=true"],
    "early evaluation": ["model.eval_idx=0"],
    "four levels": ["model.num_points=[4,2,1,3]"],
    "no denoising": ["model.num_denoising=0"],
    "no noise": ["model.box_noise_scale=0", "model.label_noise_ratio=0"],
    "dropout": ["model.dropout=0.1", "model.attention_dropout=0.1", "model.neck.dropout=0.1"],
    "frozen": ["model.backbone.freeze_norm=true", "model.backbone.freeze_at=1"],
    "two maps": ["model.backbone.out_strides=[8,16]", "model.num_points=[4,4]", "model.neck.use_encoder_idx=[1]"],
}


@pytest.mark.parametrize("objects", ["some", "none"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_trainable_parameter_gets_a_gradient(name, objects, small, targets, no_objects):
    network = small(*VARIANTS[name]).train()
    outputs = network(images(network), targets if objects == "some" else no_objects)
    total(outputs).backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name, small, targets):
    network = small(*VARIANTS[name])
    columns = 7 + (name == "softmax")
    outputs = network.train()(images(network), targets)
    assert outputs.layers.logits.shape == (3, 3, 20, columns)
    assert outputs.layers.boxes.shape == (3, 3, 20, 4)
    assert outputs.encoder.logits.shape == (3, 20, 1 if name == "agnostic" else columns)
    assert (outputs.denoising is None) == (name == "no denoising")
    with torch.no_grad():
        outputs = network.eval()(images(network), targets)
    assert outputs.layers.logits.shape == (1, 3, 20, columns)
    assert outputs.encoder is None
    assert outputs.denoising is None
    actual = network.postprocess(outputs, torch.tensor([[100, 200], [50, 60], [10, 10]]))
    assert len(actual) == 3
    assert all(0 <= label < 7 for label in actual[0].labels)


def test_matching_queries_do_not_see_the_denoising_queries(small, randomise, targets):
    network = randomise(small("model.backbone.freeze_norm=true").double()).train()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    torch.manual_seed(0)
    outputs = network(images(network), targets)
    without = network(images(network))
    assert without.denoising is None
    torch.testing.assert_close(outputs.layers.logits, without.layers.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs.layers.boxes, without.layers.boxes, rtol=0, atol=1e-12)


def test_looking_forward_twice_changes_gradients_but_not_values(small, randomise, targets):
    once, twice = (randomise(small(f"model.look_forward_twice={on}").double()).train() for on in ("false", "true"))
    results = []
    for network in (once, twice):
        torch.manual_seed(0)
        outputs = network(images(network), targets)
        outputs.layers.boxes[-1].sum().backward()
        results.append((outputs.layers.boxes, network.decoder.dec_bbox_head))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    # The last box trains the head before it only when looking forward twice.
    assert not any(p.grad.any() for p in results[0][1][1].parameters())
    assert any(p.grad.any() for p in results[1][1][1].parameters())


def test_batched_equals_one_by_one(small, randomise):
    network = randomise(small().double()).eval()
    pictures = images(network)
    with torch.no_grad():
        together = network(pictures).pred
        alone = [network(image[None]).pred for image in pictures]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), rtol=0, atol=1e-10)
    torch.testing.assert_close(together.boxes, torch.cat([one.boxes for one in alone]), rtol=0, atol=1e-10)


def test_evaluation_stops_at_eval_idx(small, randomise):
    full, early = (randomise(small(f"model.eval_idx={index}").double()) for index in (-1, 1))
    with torch.no_grad():
        stopped = early.eval()(images(early)).pred
        full.train().apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else None)
        every_layer = full(images(full)).layers
    torch.testing.assert_close(stopped.logits, every_layer.logits[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(stopped.boxes, every_layer.boxes[1], rtol=0, atol=1e-12)


def test_gradient_checkpointing_gives_equal_gradients_and_statistics(small, targets):
    plain = small().double().train()
    saving = copy.deepcopy(plain)
    saving.set_gradient_checkpointing(True)
    for network in (plain, saving):
        torch.manual_seed(0)
        total(network(images(network), targets)).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("overrides", [[], ["model.eval_idx=1"], ["model.backbone.freeze_norm=true"]])
def test_deployed_networks_give_the_same_outputs_with_fewer_parts(overrides, small, randomise):
    network = randomise(small(*overrides).double()).eval()
    before = sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        expected = network(images(network)).pred
        network.deploy()
        actual = network(images(network)).pred
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=0, atol=1e-9)
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def test_deployed_r18_has_the_published_size(make):
    """19.92 M parameters with RepVGG folded; folding all norms leaves one number per channel instead of two."""
    network = make("model=rtdetrv2", num_classes=80).deploy()
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(19.91e6, abs=0.01e6)


def test_bfloat16_and_channels_last(small, targets):
    network = small().train().to(memory_format=torch.channels_last)
    pictures = images(network).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = network(pictures, targets)
    assert outputs.layers.boxes.dtype == outputs.layers.logits.dtype == torch.float32
    total(outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_half_precision_weights(small):
    network = small().eval().bfloat16()
    with torch.no_grad():
        assert network(images(network)).pred.boxes.isfinite().all()


def test_padded_parts_of_the_memory_change_nothing(small, randomise):
    network = randomise(small().double()).eval()
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[0, :, 64:] = True
    levels = [torch.rand(2, 32, 96 // stride, 128 // stride).double() for stride in (8, 16, 32)]
    changed = [level.clone() for level in levels]
    for level in changed:
        level[0, :, :, level.shape[-1] // 2 :] += 1
    with torch.no_grad():
        first, second = (network.decoder(maps, None, padding).layers for maps in (levels, changed))
        without = network.decoder(changed, None, None).layers
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(first.boxes, second.boxes, rtol=0, atol=1e-12)
    assert not torch.allclose(first.logits, without.logits, atol=1e-6)
    with torch.no_grad():
        assert network(images(network, 2), padding_mask=padding).pred.boxes.isfinite().all()


def test_pixels_are_normalised_as_the_backbone_wants(make, small, randomise):
    plain, normalising = (
        randomise(small(*overrides).double()).eval()
        for overrides in ([], ["model.pixel_mean=[0.5,0.4,0.3]", "model.pixel_std=[0.2,0.3,0.4]"])
    )
    pictures = images(plain)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = plain((pictures - mean) / std).pred.logits
        torch.testing.assert_close(normalising(pictures).pred.logits, expected, rtol=0, atol=1e-5)
    timm = make("model=rtdetrv2_tiny", "model/backbone=timm", "model.backbone.name=resnet18")
    assert timm.pixel_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_initial_scores_are_one_percent_and_boxes_are_anchors(small):
    network = small().eval()
    head = network.decoder.dec_score_head[0]
    assert head.bias.sigmoid().tolist() == pytest.approx([0.01] * 7)
    with torch.no_grad():
        boxes = network(images(network)).pred.boxes
    sides = boxes[..., 2:].flatten()
    assert all(min(abs(side - anchor) for anchor in (0.05, 0.1, 0.2)) < 1e-4 for side in sides.tolist())


@pytest.mark.slow
def test_a_compiled_network_gives_the_same(small, targets):
    plain = small("model.backbone.freeze_norm=true").train()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")
    results = []
    for network in (plain, compiled):
        torch.manual_seed(0)
        outputs = network(images(network), targets)
        total(outputs).backward()
        results.append((outputs, [parameter.grad for parameter in network.parameters()]))
    torch.testing.assert_close(results[0][0].layers.logits, results[1][0].layers.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        results[0][0].denoising.layers.boxes, results[1][0].denoising.layers.boxes, rtol=1e-3, atol=1e-4
    )
    assert all(grad is not None for grad in results[1][1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.eval_idx=3"], r"eval_idx is 3 but there are 3 layers"),
        (["model.num_points=[4,4]"], r"num_points has 2 counts but the encoder makes 3 maps"),
        (["model.query_select_method=best"], r"'best'.*default, one2many, agnostic"),
        (["model.cross_attn_method=cubic"], r"'cubic'.*bilinear, discrete"),
        (["model.num_heads=5"], r"32.*5 heads.*model\.num_heads"),
        (["model.neck.in_channels=[1,2,3]"], r"in_channels is \[1, 2, 3\] but the backbone has \[12, 16, 24\]"),
        (["model.num_queries=2000"], r"num_queries is 2000 but .*only 252"),
    ],
)
def test_mistakes_name_the_value_and_the_fix(overrides, message, small):
    with pytest.raises(Exception, match=message):
        small(*overrides)
