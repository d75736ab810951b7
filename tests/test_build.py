"""Objects from configs: what one group needs of another arrives, and what does not fit is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, open_dict

from detr_exp import build
from detr_exp.data.dataset import DataSet
from detr_exp.structures import Detections
from detr_exp.trainer.trainer import Trainer

B = 2


@pytest.fixture
def cfg(tiny_run: list[str]) -> DictConfig:
    return build.compose(tiny_run)


def images(cfg: DictConfig) -> torch.Tensor:
    return torch.rand(B, 3, *cfg.model.image_size, generator=torch.Generator().manual_seed(0))


def test_the_python_face(cfg: DictConfig) -> None:
    network = build.network(cfg).eval()
    outputs = network(images(cfg))
    num_queries, num_classes = cfg.model.num_queries, build.data(cfg).num_classes
    assert outputs.pred.logits.shape == (B, num_queries, num_classes)
    assert outputs.pred.boxes.shape == (B, num_queries, 4)
    assert 0 <= outputs.pred.boxes.min() <= outputs.pred.boxes.max() <= 1
    found = network.postprocess(outputs, torch.tensor([[100, 200], [50, 50]]))
    assert len(found) == B
    assert found[0].boxes.shape[1] == 4
    assert found[0].scores.shape == found[0].labels.shape
    assert (found[0].scores.diff() <= 0).all()
    assert found[0].boxes[:, 2].max() > 100, "x runs over the width"


def test_a_network_with_a_given_number_of_classes_does_not_touch_the_data() -> None:
    words = ["model=rtdetrv2_tiny", "data=coco", "data.root=/absent", "data.num_classes=5"]
    assert build.network(build.compose(words)).num_classes == 5
    with pytest.raises(ValueError, match="absent"):
        build.network(build.compose(words[:-1]))


def test_the_loss_decides_the_activation(tiny_run: list[str]) -> None:
    cfg = build.compose([*tiny_run, "loss=ce"])
    network, criterion = build.network(cfg).eval(), build.criterion(cfg)
    assert network(images(cfg)).pred.logits.shape[-1] == network.num_classes + 1
    assert (network.activation, criterion.activation, criterion.matcher.activation) == ("softmax",) * 3


@pytest.mark.parametrize("loss", ["vfl", "focal", "bce", "mal", "ce", "ia_bce"])
def test_every_loss_trains_every_parameter_of_the_network(tiny_run: list[str], loss: str) -> None:
    cfg = build.compose([*tiny_run, f"loss={loss}"])
    torch.manual_seed(0)
    data = build.data(cfg)
    network, criterion = build.network(cfg, data).train(), build.criterion(cfg, data)
    loader = data.loader("train", network=network, batch_size=4, seed=0, training=True)
    batch = next(iter(loader))
    terms = criterion(network(batch.pixels(), batch.targets), batch.targets, num_boxes=len(batch.targets), num_images=4)
    terms["total"].backward()
    assert terms["total"].isfinite()
    assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("size", "words"),
    [([100, 64], ["[100, 64]", "[96,64] or"]), ([30, 100], ["[32,96] or", "[32,128]"])],
    ids=["larger", "smaller"],
)
def test_an_image_size_the_network_cannot_divide(tiny_run: list[str], size: list[int], words: list[str]) -> None:
    cfg = build.compose([*tiny_run, f"model.image_size=[{size[0]},{size[1]}]"])
    with pytest.raises(ValueError, match="multiples of 32") as caught:
        build.network(cfg)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("model", "os.system"),
        ("model.backbone", "subprocess.run"),
        ("model", "torch.load"),
        ("model", "detr_exp.trainer.checkpoint.save"),
        ("model", "detr_exp.model.rtdetrv2.torch.hub.load"),
        ("loss.class_loss", "detr_exp.model.rtdetrv2.RTDETRv2"),
        ("optim.optimizer", "torch.optim.optimizer.Optimizer"),
    ],
)
def test_configs_cannot_call_what_is_not_of_their_group(cfg: DictConfig, key: str, target: str) -> None:
    with open_dict(cfg):
        node = cfg
        for part in key.split("."):
            node = node[part]
        node._target_ = target
    with pytest.raises(ValueError, match=rf"{key}\._target_ is {target}; .*configs may name"):
        build.run(cfg, Path("unused"))


def test_what_is_refused_is_not_even_imported(cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sneaky.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    cfg.model._target_ = "sneaky.Model"
    with pytest.raises(ValueError, match=r"allow_targets=\[sneaky\]"):
        build.network(cfg)


def test_user_packages_are_allowed_by_name(cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_matchers.py").write_text("def made(numerator): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with open_dict(cfg):
        cfg.matcher = {"_target_": "own_matchers.made", "numerator": 3}
    with pytest.raises(ValueError, match=r"allow_targets=\[own_matchers\]"):
        build.criterion(cfg)
    cfg.allow_targets = ["own_matchers"]
    with pytest.raises(Exception, match="activation"):  # it was called, with what a matcher is told
        build.criterion(cfg)


def test_the_optimiser_has_the_groups_and_rates_of_the_config(tiny_run: list[str]) -> None:
    cfg = build.compose([*tiny_run, "optim.lr=0.01", "optim.lr_backbone=0.001"])
    network = build.network(cfg)
    optimizer = build.optimizer(cfg)(network)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in network.backbone.parameters()} == {0.001}
    assert {rates[id(p)] for p in network.decoder.parameters()} == {0.01}
    decayed = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decayed["rest"] == cfg.optim.weight_decay
    assert 0.0 in decayed.values()


def test_the_schedule_of_the_config(tiny_run: list[str]) -> None:
    cfg = build.compose([*tiny_run, "optim/scheduler=cosine", "optim.warmup=2", "optim.warmup_unit=steps"])
    factor = build.schedule(cfg)(10, 100)
    assert factor(0) == 0.5
    assert factor(2) == 1.0
    assert math.isclose(factor(100), cfg.optim.scheduler.min_factor, abs_tol=1e-9)


def test_the_metric_has_the_ground_truth_of_a_split(cfg: DictConfig) -> None:
    data = build.data(cfg)
    network = build.network(cfg, data)
    metric = build.metric(cfg, data, network)("val")
    for batch in data.loader("val", network=network, batch_size=2, seed=0):
        detections, first = [], 0
        for count, (height, width) in zip(batch.targets.counts, batch.image_sizes.tolist()):
            cx, cy, w, h = batch.targets.boxes[first : first + count].unbind(-1)
            corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
            boxes = corners * torch.tensor([width, height, width, height])
            detections.append(Detections(torch.ones(count), batch.targets.labels[first : first + count], boxes))
            first += count
        metric.update(batch.image_ids, detections)
    assert metric.compute()["mAP"] > 0.99


def test_keypoints_come_from_the_data() -> None:
    words = ["model=rfdetr_keypoint", "data.num_workers=0", "model.image_size=[120,120]", "model.num_queries=4"]
    cfg = build.compose([*words, "model.num_layers=1", "model.num_groups=1"])
    assert list(build.network(cfg).keypoint_counts) == build.data(cfg).keypoints.counts
    boxes_only = SimpleNamespace(num_classes=2, classes=["a", "b"], keypoints=None)
    with pytest.raises(ValueError, match="predicts keypoints, but the data have none"):
        build.network(cfg, boxes_only)


def test_data_with_other_keypoints_are_not_evaluated() -> None:
    cfg = build.compose(["model=rfdetr_keypoint", "data=shapes", "data.num_workers=0"])
    data = build.data(cfg)
    counts = list(data.keypoints.counts)
    trained_on = SimpleNamespace(tasks=("boxes", "keypoints"), keypoint_counts=counts)
    assert build.metric(cfg, data, trained_on)("val").sigmas == [[0.05] * count for count in counts]
    trained_on.keypoint_counts = [4, 5, *counts[2:]]
    with pytest.raises(ValueError, match="class 'kite' has 4 keypoints in the data, but the network predicts 5"):
        build.metric(cfg, data, trained_on)


def test_a_run_has_everything(cfg: DictConfig, tmp_path: Path) -> None:
    run = build.run(cfg, tmp_path)
    assert isinstance(run.data, DataSet)
    assert run.network.num_classes == run.data.num_classes == run.criterion.num_classes
    assert run.config["model"]["image_size"] == [64, 64]
    assert (run.seed, run.resume_from) == (0, None)
    assert isinstance(build.trainer(cfg), Trainer)


def test_secrets_are_not_kept(tiny_run: list[str], tmp_path: Path) -> None:
    cfg = build.compose([*tiny_run, 'tracker.tracking_uri="http://me:hunter2@host/x"', "tracker.project=x"])
    assert "hunter2" not in str(build.run(cfg, tmp_path).config)


def test_weights_are_loaded_and_class_names_carried_over(cfg: DictConfig, tmp_path: Path) -> None:
    data = build.data(cfg)
    torch.manual_seed(1)
    trained = build.network(cfg, data)
    classes = list(reversed(data.classes))
    state = {"format": 1, "model": trained.state_dict(), "classes": classes}
    torch.save(state, tmp_path / "w.pth")
    torch.manual_seed(2)
    cfg.model.weights = str(tmp_path / "w.pth")
    loaded = build.network(cfg, data)
    assert torch.equal(loaded.backbone.conv1.conv1_1.conv.weight, trained.backbone.conv1.conv1_1.conv.weight)
    head, old = loaded.decoder.dec_score_head[-1].weight, trained.decoder.dec_score_head[-1].weight
    assert torch.equal(head, old.flip(0)), "rows follow the names of the classes"
