"""The matcher beside those of transformers and RF-DETR: all layers of a step, the same assignments.

python scripts/bench_matcher.py [--rounds 5] [--dry]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from measure import Section, beside, interleaved, run
from rfdetr.models.matcher import HungarianMatcher as RFDetrMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from detr_exp.matcher.hungarian import Assignment, HungarianMatcher
from detr_exp.structures import Prediction, Target, Targets

LAYERS, IMAGES, QUERIES, CLASSES = 7, 16, 300, 80
GATES = {"transformers": 0.10, "rfdetr": 0.60}

Pairs = list[list[tuple[torch.Tensor, torch.Tensor]]]


def scene(objects: int) -> tuple[Prediction, Targets, list[dict], list[dict]]:
    """Random predictions of all layers, and the targets in our form and the peers'."""
    g = torch.Generator().manual_seed(objects)
    boxes = torch.rand(LAYERS, IMAGES, QUERIES, 4, generator=g) * 0.4 + 0.1
    prediction = Prediction(torch.randn(LAYERS, IMAGES, QUERIES, CLASSES, generator=g), boxes)
    counts = torch.randint(objects - objects // 3, objects + objects // 3 + 1, (IMAGES,), generator=g).tolist()
    images = [
        Target(torch.randint(0, CLASSES, (n,), generator=g), torch.rand(n, 4, generator=g) * 0.4 + 0.1) for n in counts
    ]
    outputs = [{"logits": a, "pred_logits": a, "pred_boxes": b} for a, b in zip(*prediction[:2])]
    labels = [{"class_labels": one.labels, "labels": one.labels, "boxes": one.boxes} for one in images]
    return prediction, Targets.pack(images), outputs, labels


def contenders(objects: int) -> tuple[dict[str, Callable], Callable[[Assignment], Pairs]]:
    """Calls by name, and the translation of our result into theirs."""
    prediction, targets, outputs, labels = scene(objects)
    ours = HungarianMatcher(activation="sigmoid", cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0)
    config = SimpleNamespace(
        matcher_class_cost=2.0,
        matcher_bbox_cost=5.0,
        matcher_giou_cost=2.0,
        use_focal_loss=True,
        matcher_alpha=0.25,
        matcher_gamma=2.0,
    )
    transformers, rfdetr = RTDetrHungarianMatcher(config), RFDetrMatcher(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0)
    calls = {
        "ours": lambda: ours([prediction], targets),
        "transformers": lambda: [transformers(layer, labels) for layer in outputs],
        "rfdetr": lambda: rfdetr._match_many(outputs, labels),
    }
    starts = torch.tensor([0, *targets.counts]).cumsum(0)

    def translate(pairs: Assignment) -> Pairs:
        split = zip(pairs.query.split(pairs.counts, 1), pairs.target.split(pairs.counts, 1), starts)
        by_image = [(query, target - start) for query, target, start in split]
        return [[(query[s], target[s]) for query, target in by_image] for s in range(LAYERS)]

    return calls, translate


def differing(calls: dict[str, Callable], translate: Callable[[Assignment], Pairs]) -> set[str]:
    """Peers whose assignments are not ours."""
    own = translate(calls["ours"]())

    def is_equal(theirs: Pairs) -> bool:
        layers = zip(own, theirs)
        return all(torch.equal(a, b) for one, other in layers for x, y in zip(one, other) for a, b in zip(x, y))

    return {name for name in GATES if not is_equal(calls[name]())}


def bench(rounds: int) -> Section:
    rows = []
    for objects in (7, 50):
        calls, translate = contenders(objects)
        wrong = differing(calls, translate)
        times = interleaved(calls, rounds)
        part = f"{LAYERS} layers, batch {IMAGES}, about {objects} objects"
        rows += [
            beside(part, times, peer=name, gate=gate, fault="other assignments" if name in wrong else "")
            for name, gate in GATES.items()
        ]
    text = f"""
All layers of a training step at once, {QUERIES} queries and {CLASSES} classes, random predictions. All three find the
same assignments, pair by pair. `transformers`, like the official code, compares the queries of every image with the
objects of all images; ours compares them with those of their own image, all layers in one tensor that goes to the host
in one copy.
"""
    return Section("Matching", rows, text, packages=("torch", "scipy", "transformers", "rfdetr"))


if __name__ == "__main__":
    sys.exit(run("matcher", bench, __doc__))
