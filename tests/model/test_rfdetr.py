from functools import partial

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2
from detr_exp.model.decoder.rfdetr import GroupDecoder
from detr_exp.model.neck.projector import Projector
from detr_exp.model.rfdetr import RFDETR
from detr_exp.structures import Outputs, Prediction

LABELS = 91  # category ids of COCO, 0..90


def tiny(levels=("P4",), drop_path=0.0, **changes):
    torch.manual_seed(0)
    backbone = WindowedDinov2(
        image_size=[64, 64], width=32, num_heads=2, patch_size=8, num_windows=2, out_blocks=[1, 2], drop_path=drop_path
    )
    settings = dict(
        num_classes=4,
        activation="sigmoid",
        backbone=backbone,
        neck=partial(Projector, levels=list(levels), num_bottlenecks=1),
        decoder=partial(GroupDecoder, num_heads=2, num_cross_heads=4, num_points=2, dim_feedforward=48),
        image_size=[64, 64],
        pixel_mean=None,
        pixel_std=None,
        hidden_dim=32,
        num_layers=2,
        num_queries=10,
        num_groups=3,
    )
    network = RFDETR(**settings | changes)
    with torch.no_grad():  # heads that start at zero would hide everything
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def images(height=64, width=64, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def total(outputs):
    parts = [outputs.layers.logits, outputs.layers.boxes, outputs.encoder.logits, outputs.encoder.boxes]
    return sum(part.square().sum() for part in parts)


# Counts of the package, less what never gets a gradient there: the mask token, and the twelfth block of Base.
@pytest.mark.parametrize(
    ("option", "count", "size", "stride"),
    [
        ("rfdetr", 30_467_298 - 384, 384, 32),
        ("rfdetr_small", 32_111_170 - 384, 512, 32),
        ("rfdetr_medium", 33_687_458 - 384, 576, 32),
        ("rfdetr_large", 33_933_218 - 384, 704, 32),
        ("rfdetr_base", 32_174_530 - 384 - 1_775_232, 560, 56),
        ("rfdetr_seg", 33_577_475 - 384, 312, 12),
        ("rfdetr_seg_small", 33_711_107 - 384, 384, 24),
        ("rfdetr_seg_medium", 35_694_259 - 384, 432, 24),
        ("rfdetr_seg_large", 35_873_971 - 384, 504, 24),
        ("rfdetr_seg_xlarge", 38_113_635 - 384, 624, 24),
        ("rfdetr_seg_2xlarge", 38_648_163 - 384, 768, 24),
        ("rfdetr_keypoint", 41_044_470 - 384, 576, 24),
    ],
)
def test_published_networks_have_their_parameters(option, count, size, stride):
    network = built(option)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert network.image_size == (size, size)
    assert network.stride == stride


def built(option):
    counts = [f"model.keypoint_counts={[17] + [0] * (LABELS - 1)}"] if "keypoint" in option else []
    with torch.device("meta"):
        return build.network(compose([f"model={option}", f"data.num_classes={LABELS}", *counts]))


@torch.no_grad()
def test_evaluation_is_the_first_group_and_the_last_layer():
    network = tiny()
    trained, evaluated = network.train()(images()), network.eval()(images())
    assert trained.layers.logits.shape == (2, 2, 30, 4)
    assert trained.encoder.boxes.shape == (2, 30, 4)
    assert trained.groups == 3
    assert evaluated.layers.logits.shape == (1, 2, 10, 4)
    assert evaluated.encoder is None
    assert evaluated.groups == 1
    torch.testing.assert_close(evaluated.pred.logits, trained.pred.logits[:, :10], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(evaluated.pred.boxes, trained.pred.boxes[:, :10], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_groups_do_not_see_each_other():
    network = tiny().train()
    before = network(images())
    network.queries.content[1] += 1
    network.queries.project.weight[1] += 1
    after = network(images())
    for part in ("logits", "boxes"):
        change = (getattr(after.layers, part) - getattr(before.layers, part)).abs().amax(dim=(0, 1, 3)).view(3, 10)
        assert change[1].min() > 0
        torch.testing.assert_close(change[[0, 2]], torch.zeros(2, 10), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_lies_under_the_padding_is_not_read():
    """By the decoder, that is; the backbone sees all pixels."""
    network = tiny().eval()
    network.backbone = Patches(network.backbone)
    network.neck = First()
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[0, 64:], mask[1, :, 72:] = True, True
    image = images(96, 128)
    other = torch.where(mask[:, None], torch.rand_like(image), image)
    one, two = network(image, padding_mask=mask), network(other, padding_mask=mask)
    torch.testing.assert_close(one.pred.boxes, two.pred.boxes)
    torch.testing.assert_close(one.pred.logits, two.pred.logits)
    assert not torch.equal(network(image).pred.boxes, network(other).pred.boxes)


class Patches(torch.nn.Module):
    """Only the patches of a backbone, which see nothing around them."""

    def __init__(self, backbone):
        super().__init__()
        self.patches = backbone.embedding.patches

    def forward(self, images):
        return [self.patches(images)]


class First(torch.nn.Module):
    def forward(self, maps):
        return maps[:1]


def test_every_weight_gets_a_gradient():
    network = tiny(levels=("P3", "P5"), drop_path=0.1).train()
    total(network(images())).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        network = tiny(drop_path=0.3).train()
        network.set_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        total(network(images())).backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("training", [False, True])
def test_an_image_with_fewer_cells_than_queries_has_fewer_queries(training):
    outputs = tiny(num_queries=100).train(training)(images(32, 48))
    queries = (32 // 8) * (48 // 8)
    assert outputs.pred.boxes.shape[1] == queries * (3 if training else 1)
    if training:
        assert outputs.encoder.boxes.shape[1] == queries * 3


def test_softmax_has_a_column_for_the_background():
    network = tiny(activation="softmax").eval()
    outputs = network(images())
    assert outputs.pred.logits.shape[-1] == 5
    actual = network.postprocess(outputs, torch.tensor([[30, 40], [30, 40]]))
    assert all((one.labels < 4).all() for one in actual)


def test_detections_stay_inside_the_image():
    boxes = torch.tensor([[0.5, 0.5, 3.0, 0.5], [0.1, 0.9, 0.4, 0.4]])
    logits = torch.tensor([[2.0, -9, -9, -9], [1.0, -9, -9, -9]])
    network = tiny()
    (actual,) = network.postprocess(
        Outputs(Prediction(logits[None, None], boxes[None, None])), torch.tensor([[100, 200]]), 2
    )
    torch.testing.assert_close(actual.boxes, torch.tensor([[0.0, 25, 200, 75], [0, 70, 60, 100]]))
    torch.testing.assert_close(actual.scores, torch.tensor([2.0, 1.0]).sigmoid())


@torch.no_grad()
def test_deployed_networks_answer_the_same_with_fewer_weights():
    network = tiny().eval()
    before, size = network(images()), sum(p.numel() for p in network.parameters())
    after = network.deploy()(images())
    torch.testing.assert_close(after.pred.boxes, before.pred.boxes)
    torch.testing.assert_close(after.pred.logits, before.pred.logits)
    assert sum(p.numel() for p in network.parameters()) < size


@pytest.mark.parametrize(("option", "millions"), [("rfdetr", 26.86), ("rfdetr_keypoint", 35.99)])
def test_published_size_in_evaluation(option, millions):
    """The keypoint network drops another 0.47 M that only make the encoder's keypoints, for the loss."""
    count = sum(parameter.numel() for parameter in built(option).deploy().parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_bf16_autocast_runs_and_keeps_boxes_exact():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tiny().train()(images())
        total(outputs).backward()
    assert outputs.layers.boxes.dtype == torch.float32
    assert outputs.layers.logits.isfinite().all()
