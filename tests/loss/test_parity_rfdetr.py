"""The criterion against RF-DETR's: detection (9 terms), segmentation (25) and keypoints (35), with query groups."""

import pytest
import torch

from detr_exp.structures import MaskLogits, Outputs, Prediction, Target, Targets

rfdetr = pytest.importorskip("rfdetr.models.criterion")
matching = pytest.importorskip("rfdetr.models.matcher")

CLASSES, QUERIES, GROUPS = 3, 14, 3
KEYPOINTS = [5, 0, 3]
SIZE = 96  # of target masks; the mask head has a quarter of it
NAMES = {"loss_ce": "loss_class"} | {
    f"loss_keypoints_{part}": f"loss_keypoint_{part}" for part in ("l1", "findable", "visible", "nll")
}


def random_targets(*counts: int) -> Targets:
    g = torch.Generator().manual_seed(3)
    sizes = torch.tensor([0.6, 0.6, 0.4, 0.4])

    def one(n: int) -> Target:
        boxes = torch.rand(n, 4, generator=g) * sizes + torch.tensor([0.2, 0.2, 0.05, 0.05])
        keypoints = torch.rand(n, max(KEYPOINTS), 3, generator=g)
        keypoints[..., 2] = torch.randint(0, 3, keypoints.shape[:2], generator=g)
        keypoints[keypoints[..., 2] == 0] = 0
        masks = torch.rand(n, SIZE // 8, SIZE // 8, generator=g) > 0.5
        masks = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return Target(torch.randint(0, CLASSES, (n,), generator=g), boxes, masks, keypoints)

    return Targets.pack([one(n) for n in counts])


def random_outputs(task: str, images: int, layers: int, groups: int) -> Outputs:
    g = torch.Generator().manual_seed(4)
    bias = torch.randn(1, generator=g).requires_grad_()

    def prediction(*shape: int) -> Prediction:
        queries = groups * QUERIES
        boxes = torch.rand(*shape, queries, 4, generator=g) * torch.tensor([1.2, 1.2, 0.5, 0.5]) - 0.05
        masks = keypoints = None
        if task == "segmentation":
            features = torch.randn(*shape, 6, SIZE // 4, SIZE // 4, generator=g).requires_grad_()
            masks = MaskLogits(features, torch.randn(*shape, queries, 6, generator=g).requires_grad_(), bias)
        if task == "keypoints":
            keypoints = torch.randn(*shape, queries, len(KEYPOINTS) * max(KEYPOINTS), 8, generator=g).requires_grad_()
        logits = torch.randn(*shape, queries, CLASSES, generator=g).requires_grad_()
        return Prediction(logits, boxes.requires_grad_(), masks, keypoints)

    return Outputs(prediction(layers, images), prediction(images), groups=groups)


def as_oracle_outputs(outputs: Outputs) -> dict:
    def named(one: Prediction) -> dict:
        converted = {"pred_logits": one.logits, "pred_boxes": one.boxes}
        if one.masks is not None:
            names = ("spatial_features", "query_features", "bias")
            converted["pred_masks"] = dict(zip(names, one.masks))
        if one.keypoints is not None:
            converted["pred_keypoints"] = one.keypoints
        return converted

    *auxiliary, last = [named(outputs.layers.at(i)) for i in range(len(outputs.layers.boxes))]
    return {**last, "aux_outputs": auxiliary, "enc_outputs": named(outputs.encoder)}


def per_image(targets: Targets, task: str) -> list[dict]:
    counts = list(targets.counts)
    images = [{"labels": labels} for labels in targets.labels.split(counts)]
    fields = ["boxes", *{"segmentation": ["masks"], "keypoints": ["keypoints"]}.get(task, [])]
    for name in fields:
        for image, own in zip(images, getattr(targets, name).split(counts)):
            image[name] = own
    return images


def make_oracle(task: str, groups: int):
    matcher = matching.HungarianMatcher(
        cost_class=2.0,
        cost_bbox=5.0,
        cost_giou=2.0,
        cost_mask_ce=5.0,
        cost_mask_dice=5.0,
        num_keypoints_per_class=KEYPOINTS,
        keypoint_l1_loss_coef=1.0,
        keypoint_findable_loss_coef=1.0,
        keypoint_visible_loss_coef=1.0,
        keypoint_nll_loss_coef=1.0,
    )
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    weights |= {"loss_mask_ce": 5.0, "loss_mask_dice": 5.0} if task == "segmentation" else {}
    weights |= {name: 1.0 for name in NAMES if name != "loss_ce"} if task == "keypoints" else {}
    extra = {"segmentation": ["masks"], "keypoints": ["keypoints"]}.get(task, [])
    criterion = rfdetr.SetCriterion(
        num_classes=CLASSES,
        matcher=matcher,
        weight_dict=weights,
        focal_alpha=0.25,
        losses=["labels", "boxes", *extra],
        group_detr=groups,
        ia_bce_loss=True,
        num_keypoints_per_class=KEYPOINTS,
    )
    return criterion.train(), weights


@pytest.mark.parametrize(
    ("task", "layers", "terms"), [("detection", 2, 9), ("segmentation", 4, 25), ("keypoints", 4, 35)]
)
@pytest.mark.parametrize("counts", [(4, 3), (2, 0, 6)])
def test_all_terms_and_gradients(task, layers, terms, counts, make_criterion):
    targets, outputs = random_targets(*counts), random_outputs(task, len(counts), layers, GROUPS)
    criterion, weights = make_oracle(task, GROUPS)
    torch.manual_seed(12)
    found = criterion(as_oracle_outputs(outputs), per_image(targets, task))
    theirs = {}
    for name, value in found.items():
        base = next((part for part in sorted(weights, key=len, reverse=True) if name.startswith(part)), None)
        if base is not None:
            suffix = name[len(base) :]
            place = f"_aux{suffix}" if suffix[1:].isdigit() else suffix
            theirs[NAMES.get(base, base) + place] = value * weights[base]
    leaves = [outputs.layers.logits, outputs.layers.boxes, outputs.encoder.boxes]
    leaves += [] if outputs.layers.masks is None else list(outputs.layers.masks)
    leaves += [] if outputs.layers.keypoints is None else [outputs.layers.keypoints]
    expected = torch.autograd.grad(sum(theirs.values()), leaves)

    torch.manual_seed(12)
    ours = make_criterion("ia_bce", num_classes=CLASSES, keypoint_counts=KEYPOINTS)(
        outputs, targets if task != "detection" else Targets(targets.labels, targets.boxes, counts), float(sum(counts))
    )
    assert len(theirs) == terms
    assert set(ours) == {*theirs, "total"}
    for name, term in theirs.items():
        torch.testing.assert_close(ours[name], term, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for gradient, other in zip(torch.autograd.grad(ours["total"], leaves), expected):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", ["detection", "segmentation", "keypoints"])
def test_pairs(task, make_criterion):
    targets, outputs = random_targets(5, 0, 7), random_outputs(task, 3, 1, GROUPS)
    criterion, _ = make_oracle(task, GROUPS)
    torch.manual_seed(1)
    theirs = criterion.matcher(as_oracle_outputs(outputs), per_image(targets, task), group_detr=GROUPS)
    ours = make_criterion("ia_bce", num_classes=CLASSES, keypoint_counts=KEYPOINTS)
    torch.manual_seed(1)
    pairs = ours.matcher([outputs.layers], targets, GROUPS, ours.weights, ours.keypoint_counts)
    first = (0, 5, 5)
    for b, (query, target) in enumerate(theirs):
        mine = pairs.image[0] == b
        assert torch.equal(pairs.query[0, mine], query)
        assert torch.equal(pairs.target[0, mine] - first[b], target)
