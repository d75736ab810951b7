"""What each setting of a training does, seen in the weights, files and log lines of small runs."""

import json
import math
from pathlib import Path

import pytest
import torch

from detr_exp import build
from detr_exp.model.rtdetrv2 import RTDETRv2
from detr_exp.structures import Detections
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer import validation
from detr_exp.training import train_in

ONE_STEP = ("data.train=2", "data.val=1", "trainer.max_steps=1", "trainer.num_pictures=0")
FOUR_EPOCHS = ("data.train=4", "data.val=2", "data.test=2", "trainer.epochs=4", "trainer.num_pictures=0")
BY_HAND = ("optim.warmup=0", "optim.weight_decay=0")
PLAIN_SGD = ("optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas")
TINY_RFDETR = (
    "loss=ia_bce",
    "model.image_size=[64,64]",
    "model.backbone.width=32",
    "model.backbone.num_heads=2",
    "model.backbone.patch_size=8",
    "model.backbone.out_blocks=[1,2]",
    *(f"model.{key}=32" for key in ("hidden_dim", "dim_feedforward")),
    "model.num_heads=2",
    "model.num_cross_heads=4",
    "model.num_layers=1",
    "model.num_queries=10",
    "model.num_groups=2",
)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder, name):
    """(step, value) of everything logged under a name."""
    return [(line["step"], line[name]) for line in lines(folder) if name in line]


def newest(folder):
    return files.load(folder / files.NEWEST)


def names(folder):
    return {key for line in lines(folder) for key in line}


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Overrides -> the folder of a finished run; the same overrides are trained once."""
    known: dict[tuple[str, ...], Path] = {}

    def run(*words):
        if words not in known:
            known[words] = tmp_path_factory.mktemp("run")
            train_in(known[words], small(*words))
        return known[words]

    return run


# --------------------------------------------------------------------------- one step: rates, decay, clipping, average


@pytest.fixture(scope="module")
def start(finished):
    """The weights that every run of this seed begins with: those after a step of rate zero."""
    folder = finished(*ONE_STEP, "optim.lr=0", "trainer.use_ema=false")
    return newest(folder)["model"]


def moved(folder, start):
    """How far the step took each trained tensor."""
    saved = newest(folder)
    trained = {n: t for n, t in saved["model"].items() if n in start and "num_batches" not in n and "running" not in n}
    return {name: tensor - start[name] for name, tensor in trained.items()}


def test_lr_and_lr_backbone_are_the_length_of_adams_first_step(finished, start):
    change = moved(finished(*ONE_STEP, *BY_HAND, "optim.lr=1e-2", "optim.lr_backbone=1e-3"), start)
    furthest = {
        part: max(t.abs().max().item() for n, t in change.items() if n.startswith("backbone.") == inside)
        for part, inside in (("backbone", True), ("rest", False))
    }
    assert furthest == pytest.approx({"backbone": 1e-3, "rest": 1e-2}, rel=0.01)


def test_weight_decay_shrinks_weights_and_leaves_norms(finished, start):
    plain, decayed = (
        moved(finished(*ONE_STEP, "optim.warmup=0", "optim.lr=1e-2", f"optim.weight_decay={rate}"), start)
        for rate in (0, 2)
    )
    weight, norm = "decoder.layers.0.linear1.weight", "decoder.layers.0.norm1.weight"
    torch.testing.assert_close(decayed[weight] - plain[weight], -1e-2 * 2 * start[weight], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(decayed[norm], plain[norm], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("word", "longest"), [("0.1", 0.1), ("1.0", 1.0), ("null", math.inf)])
def test_clip_max_norm_bounds_the_step(finished, start, word, longest):
    folder = finished(*ONE_STEP, *BY_HAND, *PLAIN_SGD, "optim.lr=1e-3", f"trainer.clip_max_norm={word}")
    length = torch.cat([t.flatten() for t in moved(folder, start).values()]).norm().item()
    ((_, norm),) = series(folder, "train/grad_norm")
    assert norm > 1
    assert length == pytest.approx(1e-3 * min(norm, longest), rel=0.01)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["trainer.ema_decay=0.5", "trainer.ema_tau=0"], 0.5),
        (["trainer.ema_decay=0.8", "trainer.ema_tau=2"], 0.8 * (1 - math.exp(-1 / 2))),
        (["trainer.ema_decay=0.5", "trainer.ema_tau=0", "trainer.ema_update_interval=2"], 1.0),
    ],
    ids=["decay", "tau", "interval"],
)
def test_the_average_after_a_step(finished, start, words, kept):
    saved = newest(finished(*ONE_STEP, *BY_HAND, "optim.lr=1e-2", *words))
    for name in ("decoder.layers.0.linear1.weight", "backbone.conv1.conv1_1.conv.weight"):
        expected = kept * start[name] + (1 - kept) * saved["model"][name]
        torch.testing.assert_close(saved["ema"]["average"][name], expected, rtol=1e-5, atol=1e-8)


def test_use_ema_decides_what_is_kept_and_evaluated(finished, start):
    with_ema = finished(*ONE_STEP, *BY_HAND, "optim.lr=1e-2", "trainer.ema_decay=0.5", "trainer.ema_tau=0")
    without = finished(*ONE_STEP, "optim.lr=0", "trainer.use_ema=false")
    assert newest(without)["ema"] is None
    bests = {folder: {p.name for p in folder.glob("checkpoint_best_*")} for folder in (with_ema, without)}
    assert bests[with_ema] == {files.BEST["ema"], files.BEST_TOTAL}
    assert bests[without] == {files.BEST["raw"], files.BEST_TOTAL}
    name = "decoder.layers.0.linear1.weight"
    best = files.load(with_ema / files.BEST_TOTAL)["model"][name]
    assert torch.equal(best, newest(with_ema)["ema"]["average"][name])


def test_drop_path_leaves_out_blocks_in_training(finished):
    losses = []
    for rate in (0, 0.9):
        words = ("trainer.max_steps=2", "data.train=4", "data.val=1", f"model.backbone.drop_path={rate}")
        losses.append(series(finished("model=rfdetr", *TINY_RFDETR, *words), "train/loss"))
    assert [step for step, _ in losses[0]] == [1, 2]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("model", "part"),
    [
        *(("rfdetr_keypoint", f"keypoint_{part}") for part in ("l1", "findable", "visible", "nll")),
        *(("rfdetr_seg", f"mask_{part}") for part in ("ce", "dice")),
    ],
)
def test_losses_of_keypoints_and_masks_have_weights(finished, model, part):
    words = (f"model={model}", *TINY_RFDETR, *ONE_STEP)
    ((logged, *_), (without, *_)) = (lines(finished(*words, *more)) for more in ((), (f"loss.weight_{part}=0",)))
    family = [name for name in logged if name.startswith(f"train/loss_{part.partition('_')[0]}")]
    mine = {f"train/loss_{part}", f"train/loss_{part}_enc"}
    assert mine < set(family)
    assert all(logged[name] != 0 for name in family)
    assert {name for name in family if without[name] == 0} == mine


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(small, tmp_path):
    def kept(word: str) -> int:
        sizes: list[int] = []

        def note(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train_in(tmp_path / word, small(*ONE_STEP, f"trainer.hardware.gradient_checkpointing={word}"))
        return sum(sizes)

    assert kept("true") < 0.8 * kept("false")


# -------------------------------------------------------------------------------- whole runs: schedule, log, evaluation


@pytest.fixture(scope="module")
def talkative(finished):
    """Four epochs of two steps with everything measured."""
    return finished(
        *FOUR_EPOCHS,
        "optim/scheduler=cosine",
        "optim.scheduler.min_factor=0.25",
        "optim.warmup=1",
        "optim.warmup_unit=epochs",
        "optim.warmup_shape=from_zero",
        "trainer.log_per_class_metrics=true",
        "trainer.compute_val_loss=true",
        "trainer.run_test=true",
    )


@pytest.fixture(scope="module")
def terse(finished):
    """Four epochs of one step of two micro-batches with little measured."""
    return finished(
        *FOUR_EPOCHS,
        "optim/scheduler=step",
        "optim.scheduler.drop_epoch=2",
        "optim.scheduler.factor=0.1",
        "optim.warmup=0",
        "trainer.grad_accum_steps=2",
        "trainer.run_test=true",
        "trainer.compute_test_loss=false",
        "trainer.eval_interval=3",
        "trainer.checkpoint_interval=1",
        "trainer.keep_checkpoints=2",
    )


def test_epochs_batch_size_and_accumulation_give_the_number_of_steps(talkative, terse):
    assert [step for step, _ in series(talkative, "train/loss")] == list(range(1, 9)), "4 pictures, 2 a step"
    assert [step for step, _ in series(terse, "train/loss")] == list(range(1, 5)), "4 pictures a step"
    assert newest(talkative)["epoch"] == newest(terse)["epoch"] == 4


def test_the_schedule_sets_the_rate_of_every_step(talkative, terse):
    cosine = [0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6)) for step in range(2, 8)]
    assert [rate for _, rate in series(talkative, "train/lr")] == pytest.approx(
        [0, 0.5e-3, *(1e-3 * f for f in cosine)]
    )
    assert [rate for _, rate in series(terse, "train/lr")] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_eval_interval_leaves_epochs_out_but_never_the_last(talkative, terse):
    assert [step for step, _ in series(talkative, "val/mAP")] == [2, 4, 6, 8]
    assert [step for step, _ in series(terse, "val/mAP")] == [3, 4]


def test_checkpoint_interval_and_keep_checkpoints(talkative, terse):
    assert {p.name for p in terse.glob("checkpoint_[0-9]*.pth")} == {"checkpoint_3.pth", "checkpoint_4.pth"}
    assert not list(talkative.glob("checkpoint_[0-9]*.pth")), "every tenth epoch"


def test_log_per_class_metrics(talkative, terse):
    assert {"val/AP/kite", "val/AP/house", "test/AP/kite"} <= names(talkative)
    assert not [name for name in names(terse) if "AP/" in name]


def test_losses_of_validation_and_test_are_computed_if_configured(talkative, terse, finished):
    assert all(math.isfinite(loss) and loss > 0 for _, loss in series(talkative, "val/loss"))
    assert {"val/loss", "val/loss_giou", "test/loss"} <= names(talkative)
    assert "test/mAP" in names(terse)
    assert not {"val/loss", "test/loss"} & names(terse)
    assert "val/loss" in names(finished(*ONE_STEP, "trainer.monitor=val/loss")), "auto: a loss is watched"


def test_run_test_evaluates_the_best_checkpoint_once(talkative, finished):
    assert [step for step, _ in series(talkative, "test/mAP")] == [8]
    assert not [name for name in names(finished(*ONE_STEP, "optim.lr=0", "trainer.use_ema=false")) if "test/" in name]


@pytest.mark.parametrize(("limit", "recall"), [(1, 0.0), (500, 1.0)])
def test_eval_max_dets_limits_the_recall(small, tmp_path, monkeypatch, limit, recall):
    """Each object is found, but second to a surer mistake of the same class."""
    cfg = small(*ONE_STEP, f"metric.eval_max_dets={limit}")
    data = build.data(cfg)
    objects = data.val.truth()["annotations"]
    labels = torch.tensor([data.category_ids.index(o["category_id"]) for o in objects])
    right = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in objects)])
    scores = torch.tensor([0.9, 0.1]).repeat_interleave(len(objects))
    found = Detections(
        scores, labels.repeat(2), torch.cat([torch.zeros_like(right) + torch.tensor([0, 0, 1, 1]), right])
    )
    monkeypatch.setattr(RTDETRv2, "postprocess", lambda *_: [found])
    train_in(tmp_path, cfg)
    assert series(tmp_path, "val/mAR_max_dets")[-1][1] == recall


def test_log_every_steps_means_over_them(finished, terse):
    folder = finished(*FOUR_EPOCHS, "trainer.log_every_steps=3", "trainer.eval_interval=4")
    assert [step for step, _ in series(folder, "train/loss")] == [3, 6, 8]


# ------------------------------------------------------------------------------------------- decisions on given values


@pytest.fixture
def scripted(small, tmp_path, monkeypatch):
    """A run whose evaluations give these values, one after another."""

    def run(values, *words, epochs=None):
        given = iter(values)
        which: list[str] = []
        evaluate_split = validation.evaluate_split

        def note(settings, console, run, state, split, weights, *rest):
            which.append(weights)
            return evaluate_split(settings, console, run, state, split, weights, *rest)

        monkeypatch.setattr(validation, "evaluate_split", note)
        for look in (
            "save_details",
            "save_evaluation_charts",
            "check_evaluation",
        ):  # at predictions, of which there are none
            monkeypatch.setattr(validation, look, lambda *_: None)
        monkeypatch.setattr(validation, "evaluate", lambda *_, **__: given_metrics(next(given)))
        cfg = small("data.train=2", "data.val=1", f"trainer.epochs={epochs or len(values)}", *words)
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        train_in(folder, cfg)
        monkeypatch.undo()
        return folder, which

    return run


def given_metrics(value):
    return value if isinstance(value, dict) else {"mAP": value, "mAP50": 1 - value}


def best_epoch(folder):
    total = files.load(folder / files.BEST_TOTAL)
    ((_, logged),) = series(folder, "best/epoch")
    assert total["epoch"] == logged
    return total["epoch"]


LUCKY = [0.1, 0.5, 0.1, 0.4, 0.45, 0.46]


@pytest.mark.parametrize(
    ("words", "epoch"),
    [
        ([], 2),
        (["trainer.skip_best_epochs=2"], 6),
        (["trainer.smooth_alpha=0.6"], 6),
        (["trainer.smooth_alpha=0.6", "trainer.use_ema=false"], 6),
        (["trainer.monitor=val/mAP50"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_which_epoch_is_the_best(scripted, words, epoch):
    folder, _ = scripted(LUCKY, *words)
    assert best_epoch(folder) == epoch


STOP = ["trainer.early_stopping=true"]


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        ([], 6),
        (STOP, 6),
        (["trainer.early_stopping=true", "trainer.early_stopping_patience=2"], 5),
        ([*STOP, "trainer.early_stopping_patience=2"], 5),
        ([*STOP, "trainer.early_stopping_patience=1"], 4),
        ([*STOP, "trainer.early_stopping_patience=1", "trainer.skip_best_epochs=4"], 6),
        ([*STOP, "trainer.early_stopping_patience=1", "trainer.early_stopping_min_delta=0.15"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_when_a_run_stops_early(scripted, words, epochs):
    folder, _ = scripted([0.1, 0.2, 0.3, 0.3, 0.3, 0.9], *words)
    assert newest(folder)["epoch"] == epochs


RISING, FLAT, LOW = [0.6, 0.7, 0.8, 0.9], [0.5] * 4, [0.1] * 4


@pytest.mark.parametrize(
    ("word", "raw", "ema", "epochs"),
    [("true", RISING, FLAT, 2), ("false", RISING, FLAT, 4), ("false", LOW, RISING, 4), ("false", FLAT, LOW, 2)],
    ids=["EMA watched", "raw is better", "EMA is better", "neither gains"],
)
def test_which_weights_stop_a_run(scripted, word, raw, ema, epochs):
    folder, which = scripted(
        [value for pair in zip(raw, ema) for value in pair],
        "trainer.evaluate_weights=both",
        "trainer.early_stopping=true",
        "trainer.early_stopping_patience=1",
        f"trainer.early_stopping_use_ema={word}",
        epochs=4,
    )
    assert newest(folder)["epoch"] == epochs
    assert which == ["raw", "ema"] * epochs


@pytest.mark.parametrize(
    ("words", "epoch", "best"), [([], 3, 0.3), (["trainer.monitor=val/loss"], 2, -1.5)], ids=["mAP", "loss"]
)
def test_a_loss_is_better_when_it_is_lower(scripted, words, epoch, best):
    values = [{"mAP": 0.1 * (i + 1), "loss": loss} for i, loss in enumerate([2.0, 1.5, 4.0])]
    folder, _ = scripted(values, *words)
    assert best_epoch(folder) == epoch
    assert newest(folder)["best"]["ema"]["best_raw"] == pytest.approx(best)


@pytest.mark.parametrize("word", ["raw", "ema"])
def test_evaluate_weights(scripted, word):
    folder, which = scripted([0.1, 0.2], f"trainer.evaluate_weights={word}")
    assert which == [word] * 2
    assert (folder / files.BEST[word]).is_file()
    assert files.load(folder / files.BEST_TOTAL)["weights"] == word


def test_frozen_stages_stay_as_they_are_in_the_network_and_its_average(finished):
    words = ("model.backbone.freeze_at=2", "trainer.use_ema=true", "trainer.ema_decay=0.5", "trainer.ema_tau=0")
    saved = [newest(finished(*words, *end)) for end in (("trainer.max_steps=1",), ("trainer.max_steps=2",))]
    frozen = ("backbone.conv1.", "backbone.res_layers.0.", "backbone.res_layers.1.")
    assert any(".running_mean" in name for name in saved[0]["model"] if name.startswith(frozen))
    for name, tensor in saved[0]["model"].items():
        if name.startswith(frozen):
            assert torch.equal(tensor, saved[1]["model"][name]), name
            average = saved[1]["ema"]["average"].get(name, tensor)
            assert torch.equal(tensor, average), name
    moved = "backbone.res_layers.2.blocks.0.branch2a.norm.running_mean"
    assert not torch.equal(saved[0]["model"][moved], saved[1]["model"][moved])
