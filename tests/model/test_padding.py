"""Padding: nothing is selected there, nothing attends to it, and an image's output does not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detr_exp.data.fit import Fit
from detr_exp.model.backbone.dinov2_windowed import WindowedDinov2
from detr_exp.model.backbone.rope_vit import RopeViT
from detr_exp.model.backbone.timm_vit import TimmViT
from detr_exp.model.layer import query_selection
from detr_exp.model.layer.memory import padding_of
from detr_exp.model.postprocess import detect
from detr_exp.ops.boxes import cxcywh_to_xyxy
from detr_exp.structures import Outputs, Target, Targets, predicted

TINY = {
    "rtdetrv2": ["model=rtdetrv2_tiny", "model.image_size=[96,96]"],
    "dfine": ["model=dfine_tiny", "model.image_size=[96,96]"],
    "deimv2": ["model=deimv2_atto", "model.image_size=[96,96]", "model.num_queries=30"],
    "pyramid": [
        *("model=ecdet_s", "model.image_size=[96,96]", "model.num_queries=30", "model.num_layers=2"),
        *("model.backbone.body.width=64", "model.backbone.body.num_heads=2", "model.backbone.body.depth=2"),
        "model.backbone.body.taps=[0,1]",
    ],
    "poses": [
        *("model=ecpose_s", "model.image_size=[96,96]", "model.num_queries=30", "model.num_layers=2"),
        *("model.backbone.body.width=64", "model.backbone.body.num_heads=2", "model.backbone.body.depth=2"),
        *("model.backbone.body.taps=[0,1]", "model.keypoint_counts=[3,0]"),
    ],
    "dinov3": [
        *("model=deimv2_l", "model.image_size=[96,96]", "model.num_queries=30", "model.num_layers=2"),
        *("model.backbone.body.name=vit_tiny_patch16_dinov3_qkvb", "model.backbone.body.taps=[0,1,2]"),
    ],
    "transformer": [
        *("model=rfdetr", "model.image_size=[128,128]", "model.neck.num_bottlenecks=1", "model.num_queries=40"),
        *("model.backbone.width=48", "model.backbone.num_heads=2", "model.backbone.out_blocks=[1,2]"),
        *("model.hidden_dim=64", "model.num_groups=2"),
    ],
    "windows": [
        *("model=lwdetr_tiny", "model.image_size=[128,128]", "model.neck.num_bottlenecks=1", "model.num_queries=40"),
        *("model.backbone.width=48", "model.backbone.num_heads=2", "model.backbone.depth=2"),
        *("model.backbone.windowed=[0]", "model.backbone.taps=[0,1]", "model.hidden_dim=64", "model.num_groups=2"),
    ],
    "masks": ["model=rfdetr_seg_tiny"],
    "keypoints": ["model=rfdetr_keypoint_tiny", "model.keypoint_counts=[3,0]"],
}


@pytest.fixture(params=sorted(TINY))
def network(request, make, randomise):
    return randomise(make(*TINY[request.param], num_classes=2)).eval()


def batch(network, sizes, seed=0):
    """Noise of some sizes on canvases of noise, and their padding."""
    height, width = network.image_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(sizes), 3, height, width, generator=generator)
    return images, Fit("letterbox").padding(sizes, (height, width))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(network):
    images, mask = batch(network, [(40, 80), (60, 60), (90, 30), (20, 200)])
    together = network(images, padding_mask=mask).pred
    for index in range(len(images)):
        alone = network(images[[index, 0]], padding_mask=mask[[index, 0]]).pred
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together.boxes[index], alone.boxes[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_no_query_is_selected_on_padding(network, monkeypatch):
    """Also where fewer cells are left than there are queries."""
    chosen = []
    best_cells = query_selection.best_cells

    def recorded(scores, count, padded):
        chosen.append((scores, best_cells(scores, count, padded), padded))
        return chosen[-1][1]

    for module in ("query_selection", "group_queries"):
        monkeypatch.setattr(f"detr_exp.model.layer.{module}.best_cells", recorded)
    images, mask = batch(network, [(96, 96), (48, 96), (10, 200), (200, 3)])
    for training in (False, True):
        network.train(training)(images, nothing(len(images)), mask)
    assert len(chosen) == 2
    for scores, best, padded in chosen:
        assert padded.any(1).tolist() == [False, True, True, True]
        assert not padded.expand_as(scores).gather(-1, best).any()


def with_boxes(outputs, boxes):
    """Outputs with other boxes, and with their corners as keypoints where boxes follow from these."""
    layers = outputs.layers._replace(boxes=boxes)
    points = predicted(layers, "keypoints")
    if points is not None and points.shape[-1] == 2:
        low, high = cxcywh_to_xyxy(boxes).chunk(2, dim=-1)
        layers = layers._replace(keypoints=torch.stack([low, high, (low + high) / 2], dim=-2))
    return outputs._replace(layers=layers)


def nothing(count):
    empty = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), keypoints=torch.zeros(0, 3, 3))
    return Targets.pack([empty] * count)


@torch.no_grad()
def test_detections_are_in_the_pixels_of_their_image(network):
    """A box over the whole image, which is what is predicted, is the image; masks have its size."""
    sizes = [(40, 81), (301, 77)]
    images, mask = batch(network, sizes)
    outputs = network(images, padding_mask=mask)
    height, width = network.image_size
    contents = torch.tensor([Fit("letterbox").content(size, (height, width)) for size in sizes])
    ends = (contents / torch.tensor([height, width])).flip(1)
    boxes = torch.cat([ends / 2, ends], dim=1)[:, None].expand_as(outputs.pred.boxes)
    outputs = with_boxes(outputs, boxes[None])
    for detections, size in zip(detect(network, outputs, torch.tensor(sizes), mask), sizes):
        expected = torch.tensor([0.0, 0.0, size[1], size[0]]).expand(len(detections), 4)
        torch.testing.assert_close(detections.boxes, expected, atol=1e-3, rtol=0)
        if "masks" in network.tasks:
            assert detections.masks.shape == (len(detections), *size)


@torch.no_grad()
def test_boxes_are_cut_at_the_image_where_the_network_cuts_them(network):
    images, mask = batch(network, [(40, 80)])
    outputs = network(images, padding_mask=mask)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand_as(outputs.layers.boxes)
    outputs = with_boxes(outputs, whole)
    (found,) = detect(network, outputs, torch.tensor([[40, 80]]), mask)
    expected = [0.0, 0.0, 80.0, 40.0 if network.cuts_boxes else 80.0]
    torch.testing.assert_close(found.boxes[0], torch.tensor(expected), atol=1e-3, rtol=0)


@torch.no_grad()
def test_masks_come_back_to_the_original_pixel(make):
    """Pixels of the left half of the image, whatever lies on the padding."""
    network = make(*TINY["masks"], num_classes=2).eval()
    size = (60, 150)
    images, mask = batch(network, [size])
    outputs = network(images, padding_mask=mask)
    features = torch.full_like(outputs.layers.masks.features, -1.0)
    features[..., : features.shape[-1] // 2] = 1.0
    queries = torch.full_like(outputs.layers.masks.queries, 1.0)
    masks = outputs.layers.masks._replace(features=features, queries=queries)
    outputs = Outputs(outputs.layers._replace(masks=masks))
    (found,) = detect(network, outputs, torch.tensor([size]), mask)
    assert found.masks[:, :, : size[1] // 2].all()
    assert not found.masks[:, :, size[1] // 2 + 1 :].any()


def vit(**changes):
    settings = dict(image_size=[64, 64], width=32, num_heads=2, patch_size=8, num_windows=2, out_blocks=[1, 3, 5])
    return WindowedDinov2(**settings | changes).eval()


@pytest.mark.parametrize("windows", [1, 2, 4])
@torch.no_grad()
def test_a_vision_transformer_does_not_attend_to_padding(windows):
    """Windows without image, with some, and full of it; whatever lies on padded patches changes nothing."""
    torch.manual_seed(0)
    backbone = vit(num_windows=windows)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[0, 24:], mask[1, :, 40:] = True, True
    image = torch.randn(2, 3, 64, 64)
    other = torch.where(mask[:, None], torch.randn_like(image), image)
    seen = ~padding_of(mask, [(8, 8)])[0][:, None]
    assert not torch.equal(backbone(image)[0] * seen, backbone(other)[0] * seen) or windows == 4
    for one, two in zip(backbone.forward_padded(image, mask), backbone.forward_padded(other, mask)):
        assert one.isfinite().all()
        torch.testing.assert_close(one * seen, two * seen, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "plain",
    [
        lambda: RopeViT(width=32, num_heads=2, depth=2, taps=[0, 1], pretrained=False),
        lambda: TimmViT(name="vit_tiny_patch16_dinov3_qkvb", taps=[0, 1], pretrained=False),
    ],
)
def test_a_plain_transformer_does_not_attend_to_padding(plain):
    torch.manual_seed(0)
    body = plain().eval()
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[0, 40:], mask[1, :, 20:] = True, True
    image = torch.randn(2, 3, 64, 64)
    seen = ~padding_of(mask, [(4, 4)])[0][:, None]
    covers = seen.repeat_interleave(16, 2).repeat_interleave(16, 3)  # pixels of patches with image are all seen
    other = torch.where(covers, image, torch.randn_like(image))
    assert not torch.equal(body(image)[1] * seen, body(other)[1] * seen)
    for one, two in zip(body.forward_padded(image, mask), body.forward_padded(other, mask)):
        torch.testing.assert_close(one * seen, two * seen, atol=1e-6, rtol=0)


@torch.no_grad()
def test_without_windows_an_image_does_not_depend_on_the_amount_of_padding():
    """Positions aside, which belong to the canvas."""
    torch.manual_seed(0)
    backbone = vit(num_windows=1)
    nn.init.zeros_(backbone.embedding.position)
    image = torch.randn(1, 3, 24, 64)
    narrow, wide = (torch.cat([image, torch.randn(1, 3, rows, 64)], dim=2) for rows in (8, 40))
    masks = []
    for canvas in (narrow, wide):
        mask = torch.zeros(1, *canvas.shape[-2:], dtype=torch.bool)
        mask[:, 24:] = True
        masks.append(mask)
    for one, two in zip(backbone.forward_padded(narrow, masks[0]), backbone.forward_padded(wide, masks[1])):
        torch.testing.assert_close(one[:, :, :3], two[:, :, :3], atol=1e-5, rtol=0)


def test_a_mask_without_padding_changes_nothing_but_the_order_of_sums(network):
    images, _ = batch(network, [(40, 40)])
    whole = torch.zeros(1, *network.image_size, dtype=torch.bool)
    with torch.no_grad():
        one, two = network(images).pred, network(images, padding_mask=whole).pred
    torch.testing.assert_close(one.boxes, two.boxes, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(one.logits, two.logits, atol=2e-5, rtol=1e-4)
