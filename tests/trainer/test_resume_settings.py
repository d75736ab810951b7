"""Settings that are changed when a run resumes: each has an effect, is refused, or changes no number."""

from pathlib import Path

import pytest
import torch

from detr_exp import build
from detr_exp.config.compose import compose
from detr_exp.config.keys import FIXED, FREE, is_under
from detr_exp.inference.detector import load
from detr_exp.ops import products
from detr_exp.tracker.base import RunRecord
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.origin import IDENTITY_TAG, find_checkpoint
from detr_exp.training import train_in
from detr_exp.values import flat

FEW = ("data.train=4", "data.val=2", "data.test=2", "trainer.num_pictures=0")
OTHERS = ("lr", "lr_backbone", "weight_decay", "scheduler", "warmup", "warmup_unit", "warmup_shape")
OF_TRAINER = (
    "_target_",
    "epochs",
    "overfit_batches",
    "max_steps",
    "eval_batch_size",
    "clip_max_norm",
    "ema_decay",
    "ema_tau",
    "ema_update_interval",
    "eval_interval",
    "eval_every_steps",
    "evaluate_weights",
    "monitor",
    "compute_val_loss",
    "skip_best_epochs",
    "smooth_alpha",
    "early_stopping",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "early_stopping_use_ema",
    "deterministic",
    "log_every_steps",
    "log_per_class_metrics",
)
OF_HARDWARE = (
    *("_target_", "device", "amp", "eval_amp", "channels_last", "gradient_checkpointing", "compile", "threads"),
    "products",
)
OF_DATA = (
    "_target_",
    "root",
    "source",
    "augment",
    "train",
    "val",
    "test",
    "multi_scale",
    "stop_epoch",
    "on_error",
    "fit",
    "tiles",
    "val_sample",
)
ACTS = (
    "loss",
    "matcher",
    "teacher",
    *(f"optim.{name}" for name in OTHERS),
    *(f"trainer.{name}" for name in (*OF_TRAINER, "restart_epoch")),
    *(f"trainer.hardware.{name}" for name in (*OF_HARDWARE, "strategy", "sync_bn")),
    *(
        f"data.{name}"
        for name in (*OF_DATA, "phases", "repeat_threshold", "keep_empty", "keypoint_flip_pairs", "keypoint_sigmas")
    ),
)


@pytest.fixture(scope="module")
def stored(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    train_in(folder, small(*FEW, "trainer.max_steps=1"))
    return folder


@pytest.fixture
def resumed(small, stored, tmp_path):
    """Overrides -> run and state after resuming the stored run with them, before training."""

    def start(*words):
        cfg = small(*FEW, "trainer.max_steps=2", *words)
        run = build.run(cfg, tmp_path, resume_from=stored / files.NEWEST)
        return build.trainer(cfg).start(run)

    return start


@pytest.mark.parametrize("data", ["shapes", "auto", "coco", "yolo", "voc", "shards", "many"])
def test_every_key_is_of_one_class(data):
    root = [] if data in ("shapes", "many") else ["data.root=/data"]
    for words in ([f"data={data}"], [f"data={data}", "loss=mal", "metric=fast", "optim/scheduler=multistep"]):
        keys = flat(build.plain(compose([*words, *root])))
        wrong = [key for key in keys if sum(is_under(key, prefixes) for prefixes in (FREE, FIXED, ACTS)) != 1]
        assert not wrong


def rates(state):
    return sorted({group["initial_lr"] for group in state.optimizer.param_groups})


def decays(state):
    return sorted({group["weight_decay"] for group in state.optimizer.param_groups})


@pytest.mark.filterwarnings("ignore:optim.warmup takes")
@pytest.mark.parametrize(
    ("word", "found", "value"),
    [
        ("optim.lr=5e-3", rates, [5e-3]),
        ("optim.weight_decay=0.5", decays, [0.0, 0.5]),
        ("trainer.ema_decay=0.5", lambda state: state.ema.decay_at(10**6), 0.5),
        ("trainer.ema_tau=7", lambda state: state.ema.tau, 7),
        ("trainer.ema_update_interval=3", lambda state: state.ema.update_interval, 3),
        ("trainer.skip_best_epochs=1", lambda state: state.best["ema"].skip_epochs, 1),
        ("trainer.smooth_alpha=0.5", lambda state: state.best["ema"].smooth_alpha, 0.5),
        ("optim.warmup=1", lambda state: state.schedule(0), 0.5),
        ("optim/scheduler=cosine", lambda state: state.schedule(state.total_steps), 0.0),
    ],
)
def test_changed_settings_act(resumed, capsys, word, found, value):
    assert found(resumed()) != value
    assert found(resumed(word)) == pytest.approx(value)
    assert "resumed with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.betas=[0.5,0.9]", r"optim\.betas was \[0\.9, 0\.999\] and is \[0\.5, 0\.9\]"),
        ("optim.param_groups.norm.weight_decay=0.1", r"optim\.param_groups\.norm\.weight_decay was 0\.0 and is 0\.1"),
        ("+optim.param_groups.head={match: score, lr: 0.01}", r"optim\.param_groups\.head\.lr was None and is 0\.01"),
        ("trainer.ema_copy_first=true", r"trainer\.ema_copy_first was False and is True"),
        ("trainer.auto_batch_target_effective=32", r"auto_batch_target_effective was 16 and is 32"),
        ("optim.lr_backbone=1e-5", r"in groups of .* give groups of .* optim\.lr_backbone"),
    ],
)
def test_settings_that_cannot_act_are_refused(resumed, word, told):
    with pytest.raises(ValueError, match=rf"{told}.*model\.weights="):
        resumed(word)


def test_products_stay_with_the_run_unless_others_are_asked_for(resumed, capsys, monkeypatch):
    monkeypatch.setattr(products, "fastest", lambda: "onednn")  # as on another processor than the stored run's
    assert resumed().products == "torch"
    assert "hardware.products" not in capsys.readouterr().out
    assert resumed("trainer.hardware.products=onednn").products == "onednn"
    assert "resumed with trainer.hardware.products=onednn (was torch)" in capsys.readouterr().out


def test_products_that_were_asked_for_are_no_change_where_they_could_not_be_used(small, stored, tmp_path, capsys):
    saved = files.load(stored / files.NEWEST)
    saved["config"]["trainer"]["hardware"]["products"] = "onednn"  # on a GPU, hence `torch`
    files.save(saved, stored / "on_gpu.pth")
    cfg = small(*FEW, "trainer.max_steps=2", "trainer.hardware.products=onednn")
    build.trainer(cfg).start(build.run(cfg, tmp_path, resume_from=stored / "on_gpu.pth"))
    assert "hardware.products" not in capsys.readouterr().out


def test_a_run_goes_on_with_the_products_of_its_checkpoint(small, stored, resumed, tmp_path, monkeypatch):
    saved = files.load(stored / files.NEWEST)
    assert saved["products"] == "torch"
    before = stored / "with_onednn.pth"
    files.save(saved | {"products": "onednn"}, before)
    cfg = small(*FEW, "trainer.max_steps=2")

    def resume():
        return build.trainer(cfg).start(build.run(cfg, tmp_path, resume_from=before))

    state = resume()
    assert state.state_dict()["products"] == "onednn"
    assert any(isinstance(part, products.Linear) for part in state.network.modules())
    assert state.precision.memory_format is torch.channels_last
    monkeypatch.setattr(products, "is_there", lambda: False)
    with pytest.raises(ValueError, match=r"this build of torch cannot .*trainer\.hardware\.products=torch"):
        resume()


def test_another_metric_begins_its_best_anew(resumed, capsys):
    assert resumed("trainer.monitor=val/mAP").best["ema"].best_raw is not None, "which was watched before"
    for words in (["trainer.monitor=val/loss"], ["trainer.smooth_alpha=0.5"], ["metric.eval_max_dets=3"]):
        state = resumed(*words)
        assert state.best["ema"].best_raw is None
        assert state.best["ema"].count == 0
        assert "the search for the best starts again from here" in capsys.readouterr().out


@pytest.mark.parametrize("word", [True, 5, "", "nowhere"])
def test_a_path_without_checkpoint_is_refused(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no such checkpoint; use trainer\.resume=auto"):
        find_checkpoint(word, tmp_path, "")


def test_a_run_without_a_checkpoint_begins_again_and_leaves_its_neighbours(tmp_path):
    """As a scheduler starts it again, beside a run of the same settings."""
    for name in ("killed", "neighbour"):
        (tmp_path / name).mkdir()
        RunRecord(name, "", name, tags={IDENTITY_TAG: "same"}, status="killed").save(tmp_path / name)
    checkpoint = tmp_path / "neighbour" / files.NEWEST
    checkpoint.touch()
    assert find_checkpoint("auto", tmp_path / "killed", "same") is None
    assert find_checkpoint("auto", tmp_path / "new", "same").samefile(checkpoint)


def test_nothing_is_left_to_judge_by_another_metric(resumed):
    with pytest.raises(ValueError, match=r"of a finished run.*instead of mAP; restore that setting.*trainer\.epochs="):
        resumed("trainer.monitor=val/loss", "trainer.max_steps=1")


def test_the_schedule_continues_at_the_same_fraction_of_an_epoch_of_other_data(small, stored, tmp_path, capsys):
    whole = tmp_path / "whole"
    train_in(whole, small(*FEW, "trainer.epochs=1"))
    cfg = small(*FEW, "data.train=12", "trainer.epochs=2")
    state = build.trainer(cfg).start(build.run(cfg, tmp_path, resume_from=whole / files.NEWEST))
    assert (state.step, state.position, state.steps_per_epoch) == (2, 6, 6)
    assert "continues at step 6 of 12" in capsys.readouterr().out


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            [],
            r"holds a run that is finished; resume it: trainer\.resume=auto; replace it: rm -r .*hydra\.run\.dir=",
        ),
        (["trainer.resume=auto", "seed=3"], "seed was 0 and is 3"),
        (["trainer.resume=auto", "optim.lr_backbone=1e-5"], "in groups of"),
        (["trainer.resume=auto", "optim.warmup=2"], r"optim\.warmup"),
        (["trainer.resume=auto", "model.image_size=[65,64]"], "must be multiples of"),
    ],
)
def test_a_refused_run_changes_nothing(small, stored, words, told):
    before = everything(stored)
    with pytest.raises(ValueError, match=told):
        train_in(stored, small(*FEW, *words), hydra_files={"config.yaml": "of another"})
    assert everything(stored) == before


def test_an_unfinished_run_is_not_replaced_either(small, stored, tmp_path):
    (tmp_path / "run.json").write_text((stored / "run.json").read_text().replace('"ok"', '"running"'))
    with pytest.raises(ValueError, match="holds a run that was killed; replace it"):
        train_in(tmp_path, small(*FEW))


def test_a_finished_run_ends_again_with_its_value(small, stored):
    cfg = small(*FEW, "trainer.max_steps=1", "trainer.resume=auto")
    best = files.load(stored / files.BEST_TOTAL)["metrics"]["mAP"]
    assert train_in(stored, cfg, hydra_files={"config.yaml": "again"}) == pytest.approx(best)
    assert (stored / ".hydra" / "config.yaml").read_text() == "again"


def test_a_batch_size_that_was_left_to_the_machine_is_known_from_the_checkpoint(stored, tmp_path):
    state = files.load(stored / files.BEST_TOTAL)
    state["config"]["trainer"]["batch_size"] = "auto"
    path = Path(tmp_path / "best.pth")
    files.save(state, path)
    assert load(path).batch_size == 2
    files.save({name: value for name, value in state.items() if name != "batch_size"}, path)
    assert load(path).batch_size == 1
