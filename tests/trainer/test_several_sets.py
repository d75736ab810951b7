"""A training on several data sets: values of each and of all, the best by one of them, and classes added later."""

from __future__ import annotations

import json

import pytest

from detr_exp.config.compose import compose
from detr_exp.inference.evaluation import evaluate_in
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.checkpoint import load
from detr_exp.training import train_in

SOURCE = (
    "data.source.sets={{near: {{layout: shapes, train: 5, val: 2, options: {{size: 64, seed: 0}}, ignore: [{0}]}}, \
far: {{layout: shapes, train: 3, val: 3, options: {{size: 64, seed: 9}}, as: {{kite: {1}}}}}}}"
)
CHANGED = ("data=many", "data/augment=none", "trainer.max_steps=2", "trainer.batch_size=4", "trainer.num_pictures=0")


def words_of(tiny_run: list[str], *words: str) -> list[str]:
    kept = [w for w in tiny_run if not w.startswith(("data=", "data.source", "data.train", "data.val", "data.test"))]
    return [*kept, *CHANGED, *words]


@pytest.fixture(scope="module")
def trained_on_two(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cfg = compose(words_of(tiny_run, SOURCE.format("heart", "kite"), "trainer.monitor=val/far/mAP"))
    train_in(folder, cfg)
    return folder, cfg


def test_each_set_and_all_together_are_measured(trained_on_two):
    folder, _ = trained_on_two
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "val/mAP" in line)
    assert {"val/mAP", "val/near/mAP", "val/far/mAP", "val/near/mAP50", "val/far/mAP_small"} <= last.keys()
    best = load(folder / files.BEST_TOTAL)
    assert best["metrics"]["far/mAP"] >= 0


def test_an_evaluation_gives_the_same_values(trained_on_two, tmp_path):
    folder, _ = trained_on_two
    cfg = compose([f"checkpoint={folder}", "trainer/hardware=cpu"], config_name="evaluate")
    found = evaluate_in(tmp_path, cfg)
    saved = load(folder / files.BEST_TOTAL)["metrics"]
    assert found["near/mAP"] == saved["near/mAP"]
    assert found["far/mAP50"] == saved["far/mAP50"]


def test_an_unknown_set_cannot_be_monitored(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.monitor is 'val/fra/mAP', which this run does not measure"):
        train_in(tmp_path, compose(words_of(tiny_run, SOURCE.format("heart", "kite"), "trainer.monitor=val/fra/mAP")))


def test_classes_are_added_and_the_rows_of_the_old_ones_stay(trained_on_two, tiny_run, tmp_path):
    """The new class, and one of the old ones that no set has: without weight decay its rows do not move."""
    folder, _ = trained_on_two
    old = load(folder / files.BEST_TOTAL)
    added = "data.source.sets={new: {layout: shapes, train: 4, val: 2, options: {size: 64, seed: 3}, \
as: {kite: drone}, ignore: [arrow]}}"
    classes = old["classes"]
    start = [f"model.weights={folder}", f"data.source.classes=[{','.join(classes)}]", "loss=bce"]
    start += ["optim.weight_decay=0", "trainer.use_ema=false", "model.label_noise_ratio=1.0"]
    train_in(tmp_path, compose(words_of(tiny_run, added, *start)))
    new = load(tmp_path / files.NEWEST)
    assert new["classes"] == [*classes, "drone"]
    heads = [
        name for name in old["model"] if name.endswith(("class_embed.weight", "score_head.weight", "head.2.weight"))
    ]
    assert len(heads) == 3
    for name in heads:
        before, after = (made["model"][name][: len(classes)] for made in (old, new))
        moved = {label for label, same in zip(classes, (before == after).all(1).tolist()) if not same}
        assert moved == set(classes) - {"arrow", "kite"}
