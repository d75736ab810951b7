"""What a fine-tuning script sets, one word each, seen on the network, the loss and the pairs that are made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detr_exp import build
from detr_exp.structures import Detections, Outputs, Prediction, Target, Targets

CLASSES = 5
FOCAL, SOFTMAX = "experiment=rtdetrv2_r50_finetune", "experiment=rtdetrv2_r50_finetune_ce"
SMALL = [
    "model=rtdetrv2_tiny",
    "model.image_size=[64,96]",
    "model.backbone.widths=[8,12,16,24]",
    *(f"model.{key}=32" for key in ("hidden_dim", "neck.hidden_dim", "dim_feedforward", "neck.dim_feedforward")),
    "model.num_queries=12",
    "model.num_denoising=6",
    f"data.num_classes={CLASSES}",
]
TIMM = ["model/backbone=resnet50", "model.backbone.name=resnet18"]  # the plain ResNet, a smaller one


def network(*words: str, seed: int = 0) -> Any:
    cfg = build.compose(words)
    torch.manual_seed(seed)
    return build.network(cfg)


def small(*words: str, seed: int = 0) -> Any:
    shrunk = [word for word in SMALL if TIMM[0] not in words or "widths" not in word]
    return network(*shrunk, *words, seed=seed)


def images(made: Any, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *made.image_size, generator=torch.Generator().manual_seed(1))


def logits(made: Any) -> torch.Tensor:
    return made.train()(images(made)).layers.logits.detach()


def targets(*counts: int) -> Targets:
    g = torch.Generator().manual_seed(2)
    return Targets.pack(
        [Target(torch.randint(CLASSES, (n,), generator=g), 0.1 + 0.4 * torch.rand(n, 4, generator=g)) for n in counts]
    )


# ------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("loss", "background"), [("focal", 0), ("vfl", 0), ("ce", 1)])
@pytest.mark.parametrize("classes", [1, 9])
def test_the_number_of_labels_is_the_width_of_every_head(loss: str, background: int, classes: int) -> None:
    words = [f"loss={loss}", f"data.num_classes={classes}"]
    made = small(*words).train()
    objects = Targets.pack([Target(torch.tensor([classes - 1]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))])
    outputs = made(images(made, 1), objects)
    parts = (outputs.layers, outputs.encoder, outputs.denoising.layers)
    assert {part.logits.shape[-1] for part in parts} == {classes + background}
    assert build.criterion(build.compose([*SMALL, *words]))(outputs, objects, 1.0)["total"].isfinite()
    with torch.no_grad():
        found = made.postprocess(made.eval()(images(made, 1)), torch.tensor([[64, 96]]))[0]
    assert set(found.labels.tolist()) <= set(range(classes)), "background is never detected"


@pytest.fixture
def crockery(tmp_path: Path) -> Callable[..., Any]:
    """The config of a data set on disk with a cup (category 7) and a ball (3)."""

    def make(*words: str, cup: str = "cup") -> Any:
        for split in ("train", "valid"):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(tmp_path / split / "a.png")
            content = {
                "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
                "categories": [{"id": 7, "name": cup}, {"id": 3, "name": "ball"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 5, 20, 10], "area": 200}],
            }
            (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
        return build.compose(["data=auto", f"data.root={tmp_path}", "data.num_workers=0", *words])

    return make


def test_label_names_lead_to_labels_and_back(crockery: Callable[..., Any]) -> None:
    cfg = crockery()
    data = build.data(cfg)
    made = small(f"data.num_classes={data.num_classes}")
    assert data.classes == ["ball", "cup"]
    (batch,) = data.loader("val", network=made, batch_size=1, seed=0)
    (label,) = batch.targets.labels.tolist()
    assert data.classes[label] == "cup", "from the file to the label"
    assert data.category_ids[label] == 7
    metric = build.metric(cfg, data, made)("val")
    metric.update([1], [Detections(torch.ones(1), torch.tensor([label]), torch.tensor([[10.0, 5, 30, 15]]))])
    values = metric.compute()
    assert values["AP/cup"] > 0.99, "from the label to the name"
    assert values["mAP"] > 0.99

    cfg = crockery(cup="mug")
    assert build.metric(cfg, build.data(cfg), made)("val").metric_names() == ["ball", "mug"]


def test_labels_may_be_the_ids_of_the_file(crockery: Callable[..., Any]) -> None:
    data = build.data(crockery("data.category_ids=raw"))
    made = network(*SMALL[:-1], "data.category_ids=raw", f"data.num_classes={data.num_classes}")
    (batch,) = data.loader("val", network=made, batch_size=1, seed=0)
    assert batch.targets.labels.tolist() == [7]
    assert made.eval()(images(made)).pred.logits.shape[-1] == 8
    assert (data.classes[7], data.classes[3]) == ("cup", "ball")


# ----------------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize(
    ("words", "channels", "millions"),
    [
        (["model/backbone=r18vd"], [128, 256, 512], 11.2),
        (["model/backbone=resnet50"], [512, 1024, 2048], 23.5),
        (["model/backbone=hgnetv2_l"], [512, 1024, 2048], 13.4),
        (["model/backbone=timm", "model.backbone.name=convnext_atto"], [80, 160, 320], 3.4),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_a_backbone_brings_its_channels_into_the_encoder(
    words: list[str], channels: list[int], millions: float
) -> None:
    with torch.device("meta"):
        made = network("model=rtdetrv2", "data.num_classes=5", *words)
    size = sum(parameter.numel() for parameter in made.backbone.parameters())
    assert size == pytest.approx(millions * 1e6, rel=0.05)
    first = [next(level.parameters()) for level in made.encoder.input_proj]
    assert [weight.shape[1] for weight in first] == channels


@pytest.mark.parametrize("words", [[], TIMM], ids=["ResNet-vd", "timm"])
def test_pretrained_weights_are_those_of_the_file_and_scratch_those_of_the_seed(
    words: list[str], tmp_path: Path
) -> None:
    teacher = small(*words, seed=1).backbone
    body = getattr(teacher, "body", teacher)
    torch.save(body.state_dict(), tmp_path / "backbone.pth")
    started, scratch = (
        small(*words, f"model.backbone.pretrained={source}", seed=2).backbone
        for source in (tmp_path / "backbone.pth", "false")
    )
    name = next(name for name, parameter in teacher.named_parameters() if parameter.dim() == 4)
    assert torch.equal(started.get_parameter(name), teacher.get_parameter(name))
    assert not torch.equal(scratch.get_parameter(name), teacher.get_parameter(name))


def test_only_pretrained_true_goes_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no way out")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    words = ["model/backbone=r18vd", *(word for word in SMALL if "widths" not in word)]
    assert network("model=rtdetrv2_tiny", *words).backbone
    with pytest.raises(ValueError, match=r"pretrained is true but .*\.pth.*model\.backbone\.pretrained=<file>"):
        network("model=rtdetrv2_tiny", *words, "model.backbone.pretrained=true")


@pytest.mark.parametrize("words", [[], TIMM], ids=["ResNet-vd", "timm"])
def test_frozen_norms_do_not_see_the_batch_and_do_not_train(words: list[str]) -> None:
    def depends_on_the_batch(made: Any) -> bool:
        batch = images(made)
        together, alone = made.backbone(batch)[-1][:1], made.backbone(batch[:1])[-1]
        return not torch.allclose(together, alone, atol=1e-5)

    free, frozen = (small(*words, f"model.backbone.freeze_norm={on}").train() for on in ("false", "true"))
    assert depends_on_the_batch(free)
    assert not depends_on_the_batch(frozen)
    trained = [sum(p.numel() for p in made.backbone.parameters() if p.requires_grad) for made in (free, frozen)]
    assert trained[1] < trained[0]
    assert not [m for m in frozen.backbone.modules() if isinstance(m, nn.BatchNorm2d)]


# ----------------------------------------------------------------------------------- levels, encoder, decoder


def test_feature_levels() -> None:
    """One more count of points is one more level, half as fine as the last map."""
    three, four = small(), small("model.num_points=[4,4,4,4]")
    assert three.spatial_shapes() == [(8, 12), (4, 6), (2, 3)]
    assert four.spatial_shapes() == [(8, 12), (4, 6), (2, 3), (1, 2)]
    cells: list[torch.Size] = []
    for made in (three, four):
        made.decoder.layers[0].cross_attn.value_proj.register_forward_hook(
            lambda _, rows, __: cells.append(rows[0].shape)
        )
        made.eval()(images(made))
    assert [shape[1] for shape in cells] == [96 + 24 + 6, 96 + 24 + 6 + 2]


def test_strides() -> None:
    made = small("model.backbone.out_strides=[4,8,16]")
    assert [tuple(level.shape[-2:]) for level in made.backbone(images(made))] == [(16, 24), (8, 12), (4, 6)]
    assert made.spatial_shapes() == [(16, 24), (8, 12), (4, 6)]
    assert made.stride == 16, "sides must be multiples of it"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("model.neck.in_channels=[12,16,24]", "model.neck.in_channels=[512,1024,2048]"),
        ("model.neck.feat_strides=[8,16,32]", "model.neck.feat_strides=[4,8,16]"),
    ],
)
def test_what_the_backbone_decides_may_be_said_but_not_contradicted(right: str, wrong: str) -> None:
    plain, said = small(), small(right)
    assert torch.equal(logits(plain), logits(said))
    with pytest.raises(ValueError, match=rf"{wrong.partition('=')[0].rpartition('.')[2]} is .* but the backbone has"):
        small(wrong)


def test_channels_and_layers_of_the_encoder() -> None:
    made = small("model.neck.hidden_dim=48")
    assert {level.shape[1] for level in made.encoder(made.backbone(images(made)))} == {48}
    assert made.decoder.layers[0].linear1.in_features == 32, "the decoder keeps its own width"
    sizes = [sum(p.numel() for p in small(f"model.neck.num_encoder_layers={n}").parameters()) for n in (0, 1, 2)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]


def test_the_decoder_method() -> None:
    bilinear, discrete = small(), small("model.cross_attn_method=discrete")
    assert all(map(torch.equal, bilinear.state_dict().values(), discrete.state_dict().values()))
    assert not torch.allclose(logits(bilinear), logits(discrete))

    def trained(made: Any) -> set[bool]:
        return {p.requires_grad for name, p in made.named_parameters() if "sampling_offsets" in name}

    assert (trained(bilinear), trained(discrete)) == ({True}, {False})


def test_offset_scale_widens_what_is_read() -> None:
    assert not torch.allclose(logits(small()), logits(small("model.offset_scale=1.0")))


@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "activation_dropout", "neck.dropout"])
def test_dropouts_make_training_random_and_evaluation_not(key: str) -> None:
    made = small(f"model.{key}=0.3", "model.num_denoising=0", "model.backbone.freeze_norm=true").train()
    batch = images(made)

    def runs() -> list[torch.Tensor]:
        return [made(batch).layers.logits for _ in range(2)]

    assert not torch.equal(*runs())
    made.eval()
    assert torch.equal(*runs())
    still = small("model.num_denoising=0").train()
    assert torch.equal(*(still(batch).layers.logits for _ in range(2)))


# -------------------------------------------------------------------------------------------- loss and matching


@pytest.fixture(scope="module")
def supervised() -> Callable[..., dict[str, torch.Tensor]]:
    """Words of a recipe -> its loss terms on the outputs of a small network, which stay the same."""
    objects = targets(3, 0, 4)
    made = {activation: small(f"loss={loss}").train() for activation, loss in (("sigmoid", "focal"), ("softmax", "ce"))}
    outputs: dict[str, Outputs] = {}
    for activation, one in made.items():
        torch.manual_seed(0)
        with torch.no_grad():
            for head in one.decoder.dec_score_head:  # scores that start at 1 % hide what confident ones cost
                head.bias.zero_()
            outputs[activation] = one(images(one, 3), objects)

    def terms(*words: str) -> dict[str, torch.Tensor]:
        cfg = build.compose([*words, f"data.num_classes={CLASSES}"])
        return build.criterion(cfg)(outputs[cfg.loss.activation], objects, num_boxes=7.0)

    return terms


def part(terms: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.stack([value for key, value in terms.items() if key.startswith(f"loss_{name}")])


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        (FOCAL, "loss.focal_gamma=2.0"),
        (FOCAL, "loss.focal_alpha=0.5"),
        (FOCAL, "loss.label_smoothing=0.0"),
        (SOFTMAX, "loss.eos_coef=0.5"),
        (SOFTMAX, "loss.label_smoothing=0.0"),
    ],
)
def test_knobs_of_the_class_loss_act_in_the_recipes_and_on_the_class_only(
    recipe: str, word: str, supervised: Callable[..., dict[str, torch.Tensor]]
) -> None:
    plain, changed = supervised(recipe), supervised(recipe, word)
    assert (part(plain, "class") - part(changed, "class")).abs().min() > 1e-4, "in every layer"
    assert torch.equal(part(plain, "bbox"), part(changed, "bbox")), "the same pairs"


@pytest.mark.parametrize("recipe", [FOCAL, SOFTMAX])
def test_the_coefficient_of_the_class_loss_scales_it(
    recipe: str, supervised: Callable[..., dict[str, torch.Tensor]]
) -> None:
    two, one = supervised(recipe), supervised(recipe, "loss.weight_class=1.0")
    torch.testing.assert_close(part(two, "class"), 2 * part(one, "class"))
    assert torch.equal(part(two, "giou"), part(one, "giou"))


def test_a_larger_gamma_plays_down_and_alpha_one_leaves_only_matches(
    supervised: Callable[..., dict[str, torch.Tensor]],
) -> None:
    losses = [part(supervised(FOCAL, f"loss.focal_gamma={gamma}"), "class") for gamma in (0.0, 1.0, 3.0)]
    assert (losses[0] > losses[1]).all()
    assert (losses[1] > losses[2]).all()
    words = [FOCAL, "loss.focal_alpha=1.0", f"data.num_classes={CLASSES}"]
    criterion = build.criterion(build.compose(words))
    nothing = targets(0)
    outputs = Outputs(Prediction(torch.randn(2, 1, 12, CLASSES), torch.rand(2, 1, 12, 4)))
    assert criterion(outputs, nothing, 0.0)["total"] == 0, "negatives weigh 1 - alpha"


def test_focal_loss_on_and_off(supervised: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Off is one word as well: the other recipe, or `loss=ce` without one. Logits, matching and scores follow."""
    assert not torch.allclose(supervised(FOCAL)["total"], supervised(SOFTMAX)["total"], rtol=1e-3)
    assert not torch.allclose(supervised(FOCAL)["total"], supervised(FOCAL, "loss=vfl")["total"], rtol=1e-3)
    for loss, columns, activation in (("focal", CLASSES, "sigmoid"), ("ce", CLASSES + 1, "softmax")):
        cfg = build.compose([*SMALL, f"loss={loss}"])
        made = build.network(cfg).eval()
        assert made(images(made)).pred.logits.shape[-1] == columns
        assert build.criterion(cfg).matcher.activation == activation


@pytest.mark.parametrize("recipe", [FOCAL, SOFTMAX])
@pytest.mark.parametrize("word", ["matcher.cost_class=50", "matcher.cost_bbox=0"])
def test_costs_choose_other_pairs_in_the_recipes(recipe: str, word: str) -> None:
    objects = targets(6)
    cfgs = [build.compose([recipe, f"data.num_classes={CLASSES}", *words]) for words in ([], [word])]
    columns = CLASSES + (cfgs[0].loss.activation == "softmax")
    g = torch.Generator().manual_seed(3)
    layers = Prediction(torch.randn(3, 1, 40, columns, generator=g), 0.1 + 0.4 * torch.rand(3, 1, 40, 4, generator=g))
    plain, changed = (build.criterion(cfg).matcher([layers], objects) for cfg in cfgs)
    assert not torch.equal(plain.query, changed.query)


# -------------------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("recipe", [FOCAL, SOFTMAX])
def test_rates_and_length_of_the_recipes(recipe: str) -> None:
    cfg = build.compose([recipe, f"data.num_classes={CLASSES}"])
    with torch.device("meta"):
        made = build.network(cfg)
    groups = build.optimizer(cfg)(made).param_groups
    layers = {name: module for name, module in made.named_modules() if "Norm" in type(module).__name__}
    norms = {
        f"{layer}.{name}" for layer, module in layers.items() for name, _ in module.named_parameters(recurse=False)
    }
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    kinds: dict[tuple[bool, bool], set[tuple[float, float]]] = {}
    for name, parameter in made.named_parameters():
        if id(parameter) in rates:
            place = name.startswith("backbone."), name in norms
            kinds.setdefault(place, set()).add(rates[id(parameter)])
    assert kinds == {
        (True, False): {(1e-6, 0.005)},
        (True, True): {(1e-6, 0.0)},
        (False, False): {(1e-5, 0.005)},
        (False, True): {(1e-5, 0.0)},
    }
    assert not any("sampling_offsets" in n for n, p in made.named_parameters() if p.requires_grad), "discrete"
    assert any(isinstance(module, nn.BatchNorm2d) for module in made.backbone.modules()), "norms are trained"
    factor = build.schedule(cfg)(10, 600)
    assert [factor(step) for step in (0, 29, 59, 60)] == pytest.approx([1 / 60, 0.5, 1.0, 1.0])
    settings = build.trainer(cfg).settings
    assert settings.batch_size * settings.grad_accum_steps == 4
    assert (settings.epochs, settings.eval_interval, settings.clip_max_norm) == (60, 1, 1.0)
