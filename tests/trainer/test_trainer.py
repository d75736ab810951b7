"""The engine, observed from outside: weights, files and logged numbers of real runs."""

import json
import math
import os
import re
import signal

import pytest
import torch

from detr_exp import build
from detr_exp.signals import Interrupted
from detr_exp.tracker.base import RunRecord
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.checkpoint_content import NonFiniteError
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder):
    """Everything logged but timings and machine figures."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in lines(folder)]


def differences(one, two, where=""):
    """Places in which two nests of plain values and tensors are not bit-equal."""
    if isinstance(one, dict) and isinstance(two, dict):
        return [d for k in one.keys() | two.keys() for d in differences(one.get(k), two.get(k), f"{where}.{k}")]
    if isinstance(one, list | tuple) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two)) for d in differences(a, b, f"{where}[{i}]")]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two
    return [] if same else [where]


def state_differences(first, second):
    one, two = files.load(first / files.NEWEST), files.load(second / files.NEWEST)
    parts = ("model", "optimizer", "ema", "epoch", "batch", "step", "best", "log_sums")
    return [d for part in parts for d in differences(one[part], two[part], part)]


def test_files_of_a_run(fit):
    words = ("trainer.checkpoint_interval=1", "trainer.run_test=true", "trainer.evaluate_weights=both")
    folder = fit(*words, "trainer.num_pictures=2")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", files.NEWEST, files.BEST_TOTAL, *files.BEST.values()} <= names
    assert {"checkpoint_1.pth", "checkpoint_2.pth"} <= names
    assert len(list((folder / "predictions").glob("*.png"))) == 2
    logged = lines(folder)
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 9))
    assert all(math.isfinite(line["train/loss"]) for line in logged if "train/loss" in line)
    evaluations = [line for line in logged if "val/mAP" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert evaluations[-1]["val/mAP"] == evaluations[-1]["val/ema_mAP"]
    assert "test/mAP" in logged[-1]
    total = files.load(folder / files.BEST_TOTAL)
    assert total["classes"] == ["arrow", "kite", "house", "heart", "crescent", "figure"]
    assert total["category_ids"] == [1, 2, 3, 4, 5, 6]
    assert "optimizer" not in total


def test_the_same_seed_gives_the_same_bits_whatever_the_workers(fit):
    one = fit("trainer.deterministic=true", folder="one")
    two = fit("trainer.deterministic=true", "data.num_workers=2", folder="two")
    assert state_differences(one, two) == []
    assert numbers(one) == numbers(two)


def test_another_seed_gives_other_weights(fit):
    one, two = fit("trainer.max_steps=1", folder="one"), fit("trainer.max_steps=1", "seed=1", folder="two")
    assert state_differences(one, two)


DISTURBED = ("trainer.deterministic=true", "data.multi_scale=[64,96]", "trainer.log_every_steps=2")


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train_in(folder, small(*DISTURBED))
    return folder


@pytest.mark.parametrize("ends_at", [3, pytest.param(4, marks=pytest.mark.slow), 6])
def test_a_resumed_run_repeats_the_undisturbed_one(small, undisturbed, tmp_path, monkeypatch, ends_at):
    """Ends in the middle of the first epoch, on its last step, and in the second."""
    step = Trainer.train_step

    def step_then_signal(self, run, state, window):
        if state.step + 1 == ends_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, run, state, window)

    monkeypatch.setattr(Trainer, "train_step", step_then_signal)
    folder = tmp_path / "resumed"
    with pytest.raises(Interrupted) as interrupted:
        train_in(folder, small(*DISTURBED))
    assert interrupted.value.exit_status == 143
    assert files.load(folder / files.NEWEST)["step"] == ends_at
    monkeypatch.undo()
    train_in(folder, small(*DISTURBED, "trainer.resume=auto"))
    assert state_differences(undisturbed, folder) == []
    assert numbers(undisturbed) == numbers(folder)


def test_accumulation_gives_the_gradient_of_the_whole_batch(small):
    """4 x 1 and 2 x 2: the same pictures, the same boxes to divide by."""

    def gradients(batch_size: int, accumulated: int) -> torch.Tensor:
        cfg = small(
            f"trainer.batch_size={batch_size}",
            f"trainer.grad_accum_steps={accumulated}",
            "model.num_denoising=0",
            "data/augment=none",
        )
        torch.manual_seed(0)
        data = build.data(cfg)
        network = build.network(cfg, data).train()
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        criterion = build.criterion(cfg, data)
        loader = data.loader("train", network=network, batch_size=batch_size, seed=0, training=True)
        loader.batch_sampler.set_epoch(0)
        window = [batch for batch, _ in zip(loader, range(accumulated))]
        boxes, images = sum(len(b.targets) for b in window), sum(len(b) for b in window)
        for batch in window:
            losses = criterion(network(batch.pixels(), batch.targets), batch.targets, boxes, images)
            losses["total"].backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    whole, parts = gradients(4, 1), gradients(2, 2)
    assert whole.norm() > 1
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["dfine_tiny"], indirect=True)
def test_statistics_of_a_loss_are_logged_with_its_terms(fit, family):
    folder = fit(*family, "trainer.max_steps=1", "trainer.num_pictures=2")
    (logged,) = [line for line in lines(folder) if "train/loss" in line]
    assert {"train/loss_fgl", "train/loss_fgl_dn_0", "train/loss_ddf_aux_0", "train/loss_class_pre"} <= logged.keys()
    assert logged["train/edge_entropy"] == pytest.approx(1, abs=1e-4), "all positions are as likely before training"
    losses = [value for name, value in logged.items() if name.startswith("train/loss_")]
    assert logged["train/loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert len(list((folder / "predictions").glob("*.png"))) == 1


def test_gradient_checkpointing_changes_no_bit(fit):
    plain = fit("trainer.max_steps=2", folder="plain")
    checkpointed = fit("trainer.max_steps=2", "trainer.hardware.gradient_checkpointing=true", folder="checkpointed")
    one, two = (files.load(f / files.NEWEST)["model"] for f in (plain, checkpointed))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("word", ["true", "false"])
def test_memory_layout_of_activations(fit, monkeypatch, word):
    """By the images, whatever the layout of the weights; and in every convolution."""
    seen = set()
    convolve = torch.nn.Conv2d.forward

    def spied(self, images):
        found = convolve(self, images)
        if found.shape[1] > 1 and min(found.shape[2:]) > 1:  # otherwise both layouts are the same
            seen.add(found.is_contiguous(memory_format=torch.channels_last))
        return found

    monkeypatch.setattr(torch.nn.Conv2d, "forward", spied)
    fit("trainer.max_steps=1", f"trainer.hardware.channels_last={word}")
    assert seen == {word == "true"}


def test_bf16_trains(fit, family):
    folder = fit(*family, "trainer.hardware.amp=bf16", "trainer.max_steps=2")
    assert all(math.isfinite(line["train/loss"]) for line in lines(folder) if "train/loss" in line)


def test_non_finite_steps_are_left_out_then_end_the_run(small, tmp_path, monkeypatch):
    """The weights stay those before the first bad step, and the message names images."""
    words = ("trainer.nonfinite_limit=2", "trainer.log_every_steps=2")
    build_criterion = build.criterion

    def poisoned(*args):
        criterion = build_criterion(*args)
        forward = criterion.forward

        def nan_from_the_second_step(*a, **k):
            losses = forward(*a, **k)
            calls.append(1)
            return losses if len(calls) < 3 else losses | {"total": losses["total"] * float("nan")}

        criterion.forward = nan_from_the_second_step
        return criterion

    calls: list[int] = []
    monkeypatch.setattr(build, "criterion", poisoned)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*images \["):
        train_in(tmp_path / "run", small(*words, "trainer.checkpoint_every_steps=2"))
    state = files.load(tmp_path / "run" / files.NEWEST)
    assert state["step"] == 2
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_a_run_without_a_finite_step_has_not_trained(small, tmp_path):
    with pytest.raises(NonFiniteError, match=r"1 steps in a row"):
        train_in(tmp_path, small("loss.weight_class=1e39", "trainer.max_steps=1"))


@pytest.mark.parametrize("copied", [True, False])
def test_the_first_average_is_a_copy_if_configured(fit, copied):
    state = files.load(fit("trainer.max_steps=1", f"trainer.ema_copy_first={copied}") / files.NEWEST)
    average, weights = state["ema"]["average"], state["model"]
    assert all(torch.equal(average[name], weights[name]) for name in average) is copied


def test_max_steps_ends_with_an_evaluation(fit, capsys):
    words = ("trainer.max_steps=3", "trainer.grad_accum_steps=3", "data.train=12", "trainer.compute_val_loss=true")
    logged = lines(fit(*words))
    assert [line["step"] for line in logged if "val/mAP" in line] == [2, 3], "an epoch has two steps"
    said = capsys.readouterr().out
    assert "6 images a step (2 x 3 accumulated)" in said
    assert re.search(r"epoch 2/2  loss [\d.]+  val loss [\d.]+  mAP", said)


def test_a_set_smaller_than_a_batch_takes_steps(fit):
    logged = lines(fit("data.train=3", "trainer.batch_size=4", "trainer.max_steps=2"))
    assert sum("train/loss" in line for line in logged) == 2


def test_early_stopping_ends_the_run(fit):
    folder = fit(
        "trainer.epochs=6",
        "trainer.early_stopping=true",
        "trainer.early_stopping_patience=1",
        "trainer.early_stopping_min_delta=2",
    )
    assert files.load(folder / files.NEWEST)["epoch"] == 2


def test_a_changed_network_cannot_be_resumed(small, fit):
    folder = fit("trainer.max_steps=1")
    with pytest.raises(ValueError, match=r"model\.num_layers was 2 and is 3.*model\.weights="):
        train_in(folder, small("trainer.max_steps=1", "model.num_layers=3", f"trainer.resume={folder}"))


def test_more_epochs_can_be_resumed(small, fit):
    words = ("data.train=4", "data.val=2")
    folder = fit(*words, "trainer.epochs=1")
    train_in(folder, small(*words, "trainer.epochs=2", f"trainer.resume={folder}"))
    assert files.load(folder / files.NEWEST)["epoch"] == 2
    assert [line["step"] for line in lines(folder) if "val/mAP" in line] == [2, 4]


def test_it_overfits_a_few_images(fit, monkeypatch):
    """Objects of the training images are detected."""
    monkeypatch.setattr(Trainer, "save_newest", lambda *_, **__: None)  # 60 files would take longer than the training
    folder = fit(
        "data.train=4",
        "data.val=4",
        "data.source.seed=3",
        "data/augment=none",
        "trainer.epochs=60",
        "trainer.eval_interval=60",
        "trainer.checkpoint_interval=100",
        "trainer.batch_size=4",
        "trainer.clip_max_norm=1.0",
        "optim.lr=5e-3",
        "trainer.ema_decay=0.9",
        "trainer.log_every_steps=10",
    )
    losses = [line["train/loss"] for line in lines(folder) if "train/loss" in line]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.batch_size=0", r"trainer\.batch_size is 0; it must be a whole number >= 1"),
        ("trainer.batch_size=auto trainer.grad_accum_steps=2", r"trainer\.auto_batch_target_effective="),
        (
            "trainer.auto_batch_ema_headroom=0",
            r"in \(0, 1\]: trainer\.auto_batch_ema_headroom=0\.7",
        ),
        ("trainer.auto_batch_target_effective=0", r"it must be a whole number >= 1"),
        ("trainer.ema_update_interval=0", r"trainer\.ema_update_interval"),
        ("trainer.checkpoint_interval=0", r"trainer\.checkpoint_interval"),
        ("trainer.log_every_steps=0", r"trainer\.log_every_steps"),
        ("trainer.checkpoint_every_steps=0", r"a whole number >= 1, or null: trainer\.checkpoint_every_steps=1"),
        ("trainer.eval_batch_size=0", r"trainer\.eval_batch_size"),
        ("trainer.compute_val_loss=1.5", "true, false or auto"),
        ("trainer.clip_max_norm=-1", r"trainer\.clip_max_norm is -1; it must be a number >= 0, or null"),
        ("trainer.ema_decay=1.0", r"trainer\.ema_decay is 1\.0; it must be a number in \[0, 1\)"),
        ("trainer.smooth_alpha=1.0", r"trainer\.smooth_alpha is 1\.0; it must be a number in \[0, 1\)"),
        ("trainer.eval_interval=0", r"trainer\.eval_interval"),
        ("trainer.evaluate_weights=all", "ema, raw or both"),
        ("trainer.progress_bar=fancy", "rich, tqdm, none"),
        ("trainer.monitor=val/map50", r"no evaluation measures; did you mean trainer\.monitor=val/mAP50\?"),
        ("trainer.monitor=AP/dragon", "which this run does not measure"),
        ("trainer.monitor=val/segm_mAP", "which this run does not measure"),
        ("trainer.monitor=AP/arow", r"did you mean trainer\.monitor=val/AP/arrow\?"),
        ("trainer.monitor=val/loss_mask_ce", "which this run does not measure"),
        ("trainer.monitor=val/loss trainer.compute_val_loss=false", "compute_val_loss=false leaves losses out"),
    ],
)
def test_wrong_settings_name_the_override(small, tmp_path, word, message):
    with pytest.raises(ValueError, match=message):
        train_in(tmp_path, small("trainer.max_steps=1", *word.split()))
    assert not (tmp_path / "metrics.jsonl").exists(), "nothing was trained"


@pytest.mark.parametrize("monitor", ["AP/arrow", "val/F1", "loss", "val/loss_giou"])
def test_what_is_measured_may_be_watched(fit, monitor):
    """What is accepted before the training is there after it."""
    folder = fit("trainer.max_steps=1", f"trainer.monitor={monitor}", "trainer.log_per_class_metrics=true")
    best = files.load(folder / files.BEST_TOTAL)["metrics"]
    assert monitor.removeprefix("val/") in best


@pytest.fixture
def diverging(monkeypatch):
    """Epochs -> in these, evaluated networks give boxes that are no numbers."""

    def make(*epochs):
        build_network, calls = build.started, []

        def poisoned(*args):
            network, share = build_network(*args)
            forward = network.forward

            def broken(*a, **k):
                outputs = forward(*a, **k)
                if network.training:
                    return outputs
                calls.append(1)  # an evaluation is of two batches
                layers = outputs.layers._replace(boxes=outputs.layers.boxes * float("nan"))
                return outputs._replace(layers=layers) if (len(calls) + 1) // 2 in epochs else outputs

            network.forward = broken
            return network, share

        monkeypatch.setattr(build, "started", poisoned)

    return make


def test_a_diverged_network_has_no_result(small, tmp_path, diverging):
    """NaN boxes match everything in the official tool: such a run used to be perfect."""
    diverging(1, 2)
    with pytest.raises(NonFiniteError, match="no finite number in any of 2 evaluations"):
        train_in(tmp_path / "run", small("trainer.evaluate_weights=raw"))
    evaluated = [line for line in lines(tmp_path / "run") if "val/mAP" in line]
    assert [line["val/mAP"] for line in evaluated] == [None, None]
    assert all(line["val/nonfinite"] == 4 * 20 for line in evaluated)
    assert RunRecord.load(tmp_path / "run").status == "nan"
    assert not list((tmp_path / "run").glob("checkpoint_best*"))


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_evaluation_that_diverged_is_not_the_best(small, tmp_path, diverging, epoch):
    diverging(epoch)
    best = train_in(tmp_path / "run", small("trainer.evaluate_weights=raw"))
    assert math.isfinite(best)
    assert files.load(tmp_path / "run" / files.BEST_TOTAL)["epoch"] == 3 - epoch
