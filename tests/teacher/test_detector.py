"""A detector as the teacher of trainings, observed from outside."""

import json
import os
import signal

import pytest
import torch

from detr_exp import build
from detr_exp.inference.detector import load
from detr_exp.model.member import Member
from detr_exp.signals import Interrupted
from detr_exp.structures import leaves
from detr_exp.teacher.detector import DetectorTeacher
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

OF_RTDETR = (
    "model.num_layers=2",
    "model.hidden_dim=32",
    "model.dim_feedforward=32",
    "model.num_heads=4",
    "model.neck.hidden_dim=32",
    "model.neck.dim_feedforward=32",
    "model.backbone.widths=[8,16,24,32]",
)
OF_RFDETR = (
    "model.backbone.width=32",
    "model.backbone.num_heads=2",
    "model.backbone.patch_size=8",
    "model.backbone.out_blocks=[1,2]",
    "model.hidden_dim=32",
    "model.dim_feedforward=32",
    "model.num_heads=2",
    "model.num_cross_heads=4",
    "model.num_layers=1",
    "model.num_groups=2",
)
FAMILIES = {
    "rtdetr": ("model=rtdetrv2_tiny", *OF_RTDETR),
    "dfine": ("model=dfine_tiny", "loss=dfine", *OF_RTDETR),
    "rfdetr": ("model=rfdetr", "loss=ia_bce", *OF_RFDETR),
    "masks": ("model=rfdetr_seg", "loss=ia_bce", *OF_RFDETR),
    "keypoints": ("model=rfdetr_keypoint", "loss=ia_bce", *OF_RFDETR),
}


@pytest.fixture(scope="module")
def words(tiny_run):
    """Overrides of a tiny run of a family."""
    rest = [word for word in tiny_run if not word.startswith(("model=", "trainer.max_steps"))]

    def make(family: str, *more: str) -> list[str]:
        return [*rest, "trainer.num_pictures=0", "trainer.log_every_steps=1", *FAMILIES[family], *more]

    return make


@pytest.fixture(scope="module")
def teachers(words, tmp_path_factory):
    """Family -> the folder of a finished run of one step."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}

    def make(family: str) -> str:
        if family not in made:
            made[family] = str(folder / family)
            train_in(folder / family, build.compose(words(family, "trainer.max_steps=1", "seed=1")))
        return made[family]

    return make


@pytest.fixture
def taught(words, teachers):
    """Overrides of a run of a family that a teacher of another family teaches."""

    def make(student: str, teacher: str, *more: str) -> list[str]:
        terms = [] if any(word.startswith("loss/teacher=") for word in more) else ["loss/teacher=detr"]
        return words(student, "teacher=run", f"teacher.checkpoint={teachers(teacher)}", *terms, *more)

    return make


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def step_of(overrides, folder):
    """The terms of one step, and the state after it."""
    run, trainer = build.run(build.compose(overrides), folder), build.trainer(build.compose(overrides))
    state = trainer.start(run)
    state.network.train()
    state.loader.batch_sampler.set_epoch(0)
    window = [batch for batch, _ in zip(state.loader, range(state.grad_accum_steps))]
    terms, skipped = trainer.train_step(run, state, window)
    assert not skipped
    return dict(zip(state.term_names, terms.tolist())), state


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("rfdetr", "rtdetr"),
        pytest.param("rtdetr", "rfdetr", marks=pytest.mark.slow),
        pytest.param("rfdetr", "dfine", marks=pytest.mark.slow),
        pytest.param("dfine", "rtdetr", marks=pytest.mark.slow),
        pytest.param("masks", "rtdetr", marks=pytest.mark.slow),
        pytest.param("keypoints", "masks", marks=pytest.mark.slow),
        pytest.param("rtdetr", "keypoints", marks=pytest.mark.slow),
    ],
)
def test_any_family_teaches_any_other(taught, tmp_path, student, teacher):
    wider = [f"data.{split}=4" for split in ("train", "val")]
    terms, state = step_of(taught(student, teacher, "teacher.threshold=0.01", *wider), tmp_path)
    for name in ("class", "bbox", "giou", "maps"):
        assert 0 < terms[f"loss_teacher_{name}"] < 100
    assert state.projection is None, "both have maps of as many channels"


@pytest.mark.parametrize(
    "family", ["rtdetr", *(pytest.param(f, marks=pytest.mark.slow) for f in ("rfdetr", "keypoints"))]
)
def test_maps_alone_are_those_of_a_whole_pass(teachers, family):
    teacher = DetectorTeacher(checkpoint=teachers(family), weights=None, threshold=0.5)
    images, padding = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[1, :, 32:] = True
    with torch.no_grad():
        whole, alone = (teacher(images, padding, detects=detects) for detects in (True, False))
    assert whole.prediction is not None
    assert alone.prediction is None
    assert len(alone.maps) == len(whole.maps) == len(teacher.map_channels)
    assert all(map(torch.equal, alone.maps, whole.maps))


@pytest.mark.slow
def test_distributions_teach_distributions(taught, tmp_path):
    terms, _ = step_of(taught("dfine", "dfine", "loss/teacher=dfine", "teacher.threshold=0.01"), tmp_path)
    assert terms["loss_teacher_edges"] > 0
    terms, _ = step_of(taught("dfine", "rtdetr", "loss/teacher=dfine", "teacher.threshold=0.01"), tmp_path)
    assert "loss_teacher_edges" not in terms
    assert terms["loss_teacher_bbox"] > 0


@pytest.mark.slow
def test_only_checkpoints_to_resume_from_know_the_projection_and_none_the_teacher(
    words, taught, teachers, tmp_path, capsys
):
    wide = ("trainer.max_steps=2", "model.hidden_dim=48", "model.neck.hidden_dim=48", "trainer.evaluate_weights=both")
    train_in(tmp_path / "alone", build.compose(words("rtdetr", *wide)))
    train_in(tmp_path / "taught", build.compose(taught("rtdetr", "rtdetr", *wide)))
    assert "sha256" in capsys.readouterr().out.partition("teacher")[2]
    alone, ours = (files.load(tmp_path / name / files.NEWEST) for name in ("alone", "taught"))
    assert ours["model"].keys() == alone["model"].keys()
    assert ours["ema"]["average"].keys() == alone["ema"]["average"].keys()
    assert {name: tuple(value.shape) for name, value in ours["projection"].items()} == {
        f"levels.{level}.weight": (32, 48, 1, 1) for level in range(3)
    }
    assert ours["teacher"]["teacher"] == teachers("rtdetr")
    for name in files.BEST.values():
        best = files.load(tmp_path / "taught" / name)
        assert "projection" not in best
        assert best["model"].keys() == alone["model"].keys()
    network = load(tmp_path / "taught").network
    assert network(torch.rand(1, 3, 64, 64)).maps is None
    first, second = logged(tmp_path / "taught")
    assert 0 < first["time/teacher_share"] < 1
    assert first["train/loss_teacher_maps"] != second["train/loss_teacher_maps"]
    assert not [name for name in logged(tmp_path / "alone")[0] if "teacher" in name]


@pytest.mark.slow
def test_the_teacher_does_not_change_and_the_initial_weights_are_those_without_it(words, taught, tmp_path):
    run = build.run(build.compose(taught("rtdetr", "rtdetr")), tmp_path)
    torch.manual_seed(0)
    one = build.run(build.compose(words("rtdetr")), tmp_path).network.state_dict()
    torch.manual_seed(0)
    two = build.run(build.compose(taught("rtdetr", "rtdetr")), tmp_path).network.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    before = {name: value.clone() for name, value in run.teaching.teacher.network.state_dict().items()}
    trainer = build.trainer(build.compose(taught("rtdetr", "rtdetr")))
    state = trainer.start(run)
    state.network.train()
    state.loader.batch_sampler.set_epoch(0)
    trainer.train_step(run, state, [next(iter(state.loader))])
    teacher = run.teaching.teacher.network
    assert not teacher.training
    assert not [name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in state.network.parameters()}


def test_a_teacher_of_another_size_sees_the_images_at_its_size(taught, teachers, tmp_path):
    run = build.run(build.compose(taught("rtdetr", "rtdetr", "model.image_size=[96,96]")), tmp_path)
    seen = []
    teacher = run.teaching.teacher
    teacher.network.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-2:]))
    trainer = build.trainer(build.compose(taught("rtdetr", "rtdetr", "model.image_size=[96,96]")))
    state = trainer.start(run)
    assert set(seen) == {(64, 64)}, "also in the trial of memory"
    batch = next(iter(state.loader))
    assert batch.images.shape[1:3] == (96, 96)


def test_a_teacher_sees_whole_images_where_a_member_sees_smaller_ones(taught, tmp_path):
    """At the size of its training, however the sizes of the member and of the teacher compare, with their padding."""
    cfg = build.compose(taught("rtdetr", "rtdetr", "data.fit=letterbox", "trainer/elastic=full"))
    trainer, run = build.trainer(cfg), build.run(cfg, tmp_path)
    state = trainer.start(run)
    object.__setattr__(state.members, "of_step", lambda seed, step: [Member(image_size=(32, 32))])
    seen = []
    network = run.teaching.teacher.network
    network.register_forward_pre_hook(lambda _, given, named: seen.append((*given, *named.values())), with_kwargs=True)
    state.network.train()
    state.loader.batch_sampler.set_epoch(0)
    batch = next(iter(state.loader))
    for size in ((64, 64), (32, 32)):
        run.teaching.teacher.image_size = size
        trainer.train_step(run, state, [batch])
        images, padding_mask = seen.pop()
        assert images.shape[-2:] == padding_mask.shape[-2:] == size
        if size == batch.images.shape[1:3]:
            assert torch.equal(images, batch.pixels(torch.contiguous_format))
            assert torch.equal(padding_mask, batch.padding_mask)


def test_kept_outputs_are_computed_once_and_give_the_same_steps(taught, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = taught("rtdetr", "rtdetr", "data/augment=none", "teacher.threshold=0.01")
    terms, seen = [], []
    for cache in ("none", "disk", "disk"):
        torch.manual_seed(0)
        cfg = build.compose([*words, f"teacher.cache={cache}"])
        trainer, run = build.trainer(cfg), build.run(cfg, tmp_path / "run")
        state = trainer.start(run)
        seen.append([])
        run.teaching.teacher.network.register_forward_pre_hook(lambda _, given: seen[-1].append(len(given[0])))
        state.network.train()
        state.loader.batch_sampler.set_epoch(0)
        terms.append(trainer.train_step(run, state, [next(iter(state.loader))])[0])
    assert seen[:2] == [[4], [1, 1, 1, 1]]
    assert len(seen[2]) <= 1, "a later process reads them"
    assert torch.equal(terms[1], terms[2])
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_repeats_the_undisturbed_one(taught, tmp_path, monkeypatch):
    overrides = taught(
        "rtdetr", "rtdetr", "model.hidden_dim=48", "model.neck.hidden_dim=48", "trainer.max_steps=3", "trainer.epochs=2"
    )
    train_in(tmp_path / "undisturbed", build.compose(overrides))
    step = Trainer.train_step

    def step_then_signal(self, run, state, window):
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, run, state, window)

    monkeypatch.setattr(Trainer, "train_step", step_then_signal)
    with pytest.raises(Interrupted):
        train_in(tmp_path / "resumed", build.compose(overrides))
    monkeypatch.undo()
    train_in(tmp_path / "resumed", build.compose([*overrides, "trainer.resume=auto"]))
    one, two = (files.load(tmp_path / name / files.NEWEST) for name in ("undisturbed", "resumed"))
    assert one["step"] == 3
    for part in ("model", "projection", "optimizer", "ema"):
        found, wanted = list(leaves(two[part])), list(leaves(one[part]))
        assert len(found) == len(wanted) > 1
        assert all(map(torch.equal, found, wanted)), part


@pytest.mark.slow
def test_accumulation_takes_the_step_of_the_whole_batch(taught, tmp_path):
    """Norms see the micro-batches, so they are frozen; the projection is trained, too."""

    def gradients(batch_size: int, accumulated: int) -> torch.Tensor:
        cfg = build.compose(
            taught(
                "rtdetr",
                "rtdetr",
                *("model.hidden_dim=48", "model.neck.hidden_dim=48", "model.num_denoising=0", "data/augment=none"),
                *(f"trainer.batch_size={batch_size}", f"trainer.grad_accum_steps={accumulated}"),
                *("trainer.clip_max_norm=null", "teacher.threshold=0.01"),
            )
        )
        torch.manual_seed(0)
        trainer, run = build.trainer(cfg), build.run(cfg, tmp_path)
        state = trainer.start(run)
        state.optimizer = torch.optim.SGD(state.parameters, lr=1.0)
        state.optimizer.param_groups[0]["initial_lr"] = 1.0
        state.schedule = lambda step: 1.0
        state.network.train()
        for module in state.network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        state.loader.batch_sampler.set_epoch(0)
        before = torch.cat([p.detach().flatten().clone() for p in state.parameters])
        trainer.train_step(run, state, [batch for batch, _ in zip(state.loader, range(accumulated))])
        count = sum(p.numel() for p in run.teaching.parameters)
        change = before - torch.cat([p.detach().flatten() for p in state.parameters])
        assert count
        assert change[-count:].norm() > 1e-3
        return change

    torch.testing.assert_close(gradients(2, 2), gradients(4, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        (["loss/teacher=none"], r"no terms against a teacher; choose some: loss/teacher=detr"),
        (["teacher=none"], r"there is none; give one, teacher=run"),
        (["data.source.size=48", "model=dfine_tiny", "teacher.checkpoint="], "teacher.checkpoint is empty"),
        (
            ["teacher.checkpoint=nowhere"],
            "the teacher, teacher.checkpoint=nowhere, cannot be opened: nowhere is not a file",
        ),
        (["teacher.threshold=2"], r"teacher.threshold is 2; it must be a number in \[0, 1\]"),
        (
            ["teacher.cache=ram"],
            r"a training image is another one in each step \(data.augment.flip\): teacher.cache=none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(taught, tmp_path, more, needed):
    overrides = taught("rtdetr", "rtdetr")
    if more == ["teacher=none"]:
        overrides = [word for word in overrides if not word.startswith("teacher")]
        more = [*more, "loss/teacher=detr"]
    with pytest.raises(ValueError, match=needed):
        build.run(build.compose([*overrides, *more]), tmp_path)


def test_a_teacher_that_lacks_a_class_is_refused(taught, teachers, tmp_path):
    path = tmp_path / "other.pth"
    content = files.load(files.resolve(teachers("rtdetr")))
    names = content["classes"]
    files.save(content | {"classes": [*names[:-1], "zebra"]}, path)
    with pytest.raises(ValueError, match=rf"knows .*zebra, but the data have {names[-1]} as well; .*loss/teacher=maps"):
        build.run(build.compose(taught("rtdetr", "rtdetr", f"teacher.checkpoint={path}")), tmp_path)
    files.save(content | {"classes": [name.upper() for name in reversed(names)]}, path)
    run = build.run(build.compose(taught("rtdetr", "rtdetr", f"teacher.checkpoint={path}")), tmp_path)
    assert run.teaching.columns == list(reversed(range(len(names))))
    run = build.run(
        build.compose(taught("rtdetr", "rtdetr", f"teacher.checkpoint={path}", "loss/teacher=maps")), tmp_path
    )
    assert run.teaching.columns == []


def test_a_teacher_that_has_diverged_is_refused(teachers, tmp_path):
    content = files.load(files.resolve(teachers("rtdetr")))
    name = next(name for name, tensor in content["model"].items() if tensor.is_floating_point())
    content["model"][name][0] = torch.nan
    files.save(content, tmp_path / "diverged.pth")
    with pytest.raises(ValueError, match=r"not finite in 1 tensors .*give another teacher: teacher.checkpoint="):
        DetectorTeacher(checkpoint=str(tmp_path / "diverged.pth"), weights=None, threshold=0.3)


@pytest.mark.slow
def test_a_run_resumes_with_its_own_teacher(taught, teachers, words, tmp_path):
    wide = ("model.hidden_dim=48", "model.neck.hidden_dim=48", "trainer.max_steps=2")
    train_in(tmp_path / "run", build.compose(taught("rtdetr", "rtdetr", *wide, "trainer.max_steps=1")))

    def resumed(overrides):
        cfg = build.compose(overrides)
        run = build.run(cfg, tmp_path, resume_from=tmp_path / "run" / files.NEWEST)
        return build.trainer(cfg).start(run)

    moved = tmp_path / "moved.pth"
    files.duplicate(files.resolve(teachers("rtdetr")), moved)
    assert resumed(taught("rtdetr", "rtdetr", *wide, f"teacher.checkpoint={moved}")).step == 1
    content = files.load(moved)
    files.save(content | {"epoch": 7}, moved)
    with pytest.raises(ValueError, match="is another one"):
        resumed(taught("rtdetr", "rtdetr", *wide, f"teacher.checkpoint={moved}"))
    with pytest.raises(ValueError, match="has a projection between the maps"):
        resumed(words("rtdetr", *wide))
