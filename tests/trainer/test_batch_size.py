"""The largest batch that fits: the search with scripted answers, memory estimates of small networks, whole runs."""

import math

import pytest
import torch

from detr_exp import build
from detr_exp.trainer import batch_size as module
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.batch_size import (
    fits_by_trial,
    largest_that_fits,
    need_of,
    split_effective_batch,
    worst_case_batch,
)
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

ONE_STEP = ("data.train=24", "data.val=1", "trainer.max_steps=1", "trainer.num_pictures=0")
AUTO = (*ONE_STEP, "trainer.batch_size=auto")


@pytest.mark.parametrize("most", [1, 24, 128])
def test_the_search_finds_the_border_in_few_questions(most):
    for border in range(most + 10):
        asked = []

        def fits(images, border=border, asked=asked):
            asked.append(images)
            return images <= border

        assert largest_that_fits(fits, most) == min(border, most)
        assert len(asked) <= 2 * math.log2(most) + 2
        assert max(asked) <= most


@pytest.mark.parametrize(
    ("largest", "headroom", "target", "devices", "decided"),
    [
        (128, 1.0, 16, 1, (115, 1)),
        (20, 0.7, 16, 1, (12, 2)),
        (20, 1.0, 16, 1, (18, 1)),
        (4, 1.0, 16, 1, (3, 6)),
        (4, 1.0, 16, 4, (3, 2)),
        (1, 0.5, 16, 1, (1, 16)),
    ],
)
def test_what_follows_from_the_largest_batch(largest, headroom, target, devices, decided):
    assert split_effective_batch(largest, headroom, target, devices) == decided


@pytest.fixture
def parts(small, tmp_path):
    """Words -> the settings, the run and the placed network."""

    def make(*words):
        cfg = small(*words)
        settings = build.trainer(cfg).settings
        run = build.run(cfg, tmp_path)
        return settings, run, settings.hardware.place(run.network)

    return make


def test_the_tried_batch_is_the_worst_one(parts):
    settings, run, network = parts("data.multi_scale=[64,128,96]")
    batch = worst_case_batch(run, network, 3, settings.auto_batch_max_targets_per_image)
    assert batch.images.shape == (3, 128, 128, 3)
    assert batch.targets.counts == (run.data.train.most_objects,) * 3
    seen = [len(run.data.train.objects(i)) for i in range(len(run.data.train))]
    assert max(seen) <= run.data.train.most_objects
    assert worst_case_batch(run, network, 1, 2).targets.counts == (2,)


def test_the_need_grows_with_images_objects_and_size(parts):
    small, large = need_of(*parts()), need_of(*parts("data.multi_scale=[64,128]"))
    assert 2 * small.per_image < large.per_image < 4 * small.per_image, "four times the pixels, as many queries"
    trained = sum(p.numel() for p in parts()[2].parameters())
    states = pytest.approx(4 * 4 * trained, rel=0.01)  # gradient, two moments, average, in float32
    assert (small.fixed, large.fixed) == (states, states)
    assert need_of(*parts("trainer.use_ema=false")).fixed == pytest.approx(3 * 4 * trained, rel=0.01)


def test_the_need_of_one_image_tells_that_of_many(parts):
    """The oracle: what four images really keep."""
    settings, run, network = parts()
    with module.state_preserved(network):
        four = module.saved_bytes(network, lambda: module.loss_of(settings, run, network, 4))
    need = need_of(settings, run, network)
    assert four.activations == pytest.approx(4 * need.per_image, rel=0.05)


def test_a_trial_ends_where_memory_ends(parts, monkeypatch):
    """A stand-in for a device: its memory ends at five images."""
    settings, run, network = parts()
    loss_of = module.loss_of

    def loss_or_end(settings, run, network, images):
        if images > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(settings, run, network, 1)

    monkeypatch.setattr(module, "loss_of", loss_or_end)
    assert largest_that_fits(fits_by_trial(settings, run, network), 24) == 5
    assert all(parameter.grad is None for parameter in network.parameters())

    def broken(*_):
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(module, "loss_of", broken)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        fits_by_trial(settings, run, network)(1)


def free_for(monkeypatch, parts, images):
    """Let the machine have memory for so many images, and a half."""
    need = need_of(*parts())
    monkeypatch.setattr(module, "available", lambda device: need.of(images) + need.per_image // 2)


def test_auto_takes_what_fits_and_accumulates_the_rest(small, parts, tmp_path, monkeypatch):
    free_for(monkeypatch, parts, 10)
    words = (*AUTO, "trainer.auto_batch_target_effective=12", "trainer.auto_batch_ema_headroom=0.5")
    train_in(tmp_path / "run", small(*words))
    saved = files.load(tmp_path / "run" / files.NEWEST)
    assert (saved["batch_size"], saved["grad_accum_steps"], saved["batch"]) == (4, 3, 3)
    train_in(tmp_path / "plain", small(*words, "trainer.use_ema=false"))
    saved = files.load(tmp_path / "plain" / files.NEWEST)
    assert (saved["batch_size"], saved["grad_accum_steps"]) == (9, 2), "the head-room is for the average"


def test_a_resumed_run_keeps_its_batch_size(small, parts, tmp_path, monkeypatch):
    free_for(monkeypatch, parts, 10)
    train_in(tmp_path, small(*AUTO, "trainer.use_ema=false"))
    free_for(monkeypatch, parts, 20)
    train_in(tmp_path, small(*AUTO, "trainer.use_ema=false", "trainer.max_steps=2", "trainer.resume=auto"))
    saved = files.load(tmp_path / files.NEWEST)
    assert (saved["batch_size"], saved["step"]) == (9, 2)


def test_what_does_not_fit_is_said_before_anything_is_trained(small, parts, tmp_path, monkeypatch):
    free_for(monkeypatch, parts, 10)
    monkeypatch.setattr(Trainer, "train_step", None)
    message = (
        r"a step of 24 images of 64 x 64 needs at least .* GiB .* GiB are free; "
        r"use trainer\.batch_size=8 trainer\.grad_accum_steps=3, or trainer\.hardware\.gradient_checkpointing=true"
    )
    with pytest.raises(ValueError, match=message):
        train_in(tmp_path / "run", small(*ONE_STEP, "trainer.batch_size=24"))
    monkeypatch.setattr(module, "available", lambda device: 1000)
    with pytest.raises(ValueError, match=r"a step of 1 images .* use trainer.hardware.gradient_checkpointing=true, or"):
        train_in(tmp_path / "auto", small(*AUTO))


def test_looking_at_memory_changes_no_number(fit, monkeypatch):
    looked = files.load(fit(*ONE_STEP, folder="looked") / files.NEWEST)
    monkeypatch.setattr("detr_exp.trainer.trainer.refuse_too_large", lambda *_: None)
    blind = files.load(fit(*ONE_STEP, folder="blind") / files.NEWEST)
    assert all(torch.equal(looked["model"][name], tensor) for name, tensor in blind["model"].items())
