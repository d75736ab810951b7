"""Members of a network that are trained together, observed from outside."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

from detr_exp import build
from detr_exp.model.member import Member
from detr_exp.signals import Interrupted
from detr_exp.structures import leaves
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.elastic import WHOLE, ElasticTraining, Members
from detr_exp.trainer.trainer import Trainer
from detr_exp.training import train_in

ELASTIC = ("trainer/elastic=full", "trainer.elastic.image_size=[0.5,1.0]")
MEMBERS = Members((1, 2, None), (5, None), ((32, 32), None), sandwich=False, num_random=1, names=["loss_class"])


def step_of(cfg, folder, members=None, batches=None):
    """One step of SGD with rate 1: the change of the parameters is the gradient; and the terms."""
    torch.manual_seed(0)
    trainer, run = build.trainer(cfg), build.run(cfg, folder)
    state = trainer.start(run)
    state.optimizer = torch.optim.SGD(state.parameters, lr=1.0)
    state.optimizer.param_groups[0]["initial_lr"] = 1.0
    state.schedule = lambda step: 1.0
    state.network.train()
    for module in state.network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    if members is not None:
        object.__setattr__(state.members, "of_step", lambda seed, step: members)
    state.loader.batch_sampler.set_epoch(0)
    window = [batch for batch, _ in zip(state.loader, range(state.grad_accum_steps))]
    before = [p.detach().clone() for p in state.parameters]
    terms, _ = trainer.train_step(run, state, window)
    change = torch.cat([(old - new.detach()).flatten() for old, new in zip(before, state.parameters)])
    return change, dict(zip(state.term_names, terms.tolist())), state


def test_members_of_a_step_depend_on_seed_and_step_alone():
    steps = [MEMBERS.of_step(seed, step) for seed in (0, 1) for step in range(100)]
    assert steps == [MEMBERS.of_step(seed, step) for seed in (0, 1) for step in range(100)]
    assert steps[:100] != steps[100:]
    counts = Counter(member for members in steps for member in members)
    assert set(counts) == set(MEMBERS)
    assert len(MEMBERS) == 12
    assert min(counts.values()) > 4, "each is sampled as often as any other"


def test_what_is_listed_more_often_is_sampled_more_often():
    words = ["model.num_queries=20", *ELASTIC, "trainer.elastic.layers=[1.0,0.3,1.0,1.0,0.34]"]
    cfg = build.compose(["model=rtdetrv2_tiny", "data=shapes", *words])
    trainer, network = build.trainer(cfg), build.network(cfg)
    members = trainer.settings.elastic.members(network, build.data(cfg), build.criterion(cfg), False)
    assert list(members.layers) == [1, None, None, None]
    assert len(members) == len(set(members)) == 2 * 3 * 2
    counts = Counter(member.layers for step in range(400) for member in members.of_step(0, step))
    assert 0.68 < counts[None] / counts.total() < 0.82


def test_a_sandwich_begins_with_the_largest_and_has_the_smallest_without_repeats():
    sandwich = replace(MEMBERS, sandwich=True, num_random=2)
    for step in range(50):
        members = sandwich.of_step(0, step)
        assert members[0] == WHOLE
        assert Member(1, 5, (32, 32)) in members
        assert len(set(members)) == len(members) <= 4


def test_the_step_of_several_members_is_the_mean_of_their_steps(small, tmp_path):
    """Each as a network that computes as this member alone."""
    cfg = small(*ELASTIC, "model.num_denoising=0", "trainer.clip_max_norm=null")
    one, two = Member(1, 5), Member(None, None, (32, 32))
    (first, terms, _), (second, _, _), (both, joined, state) = (
        step_of(cfg, tmp_path, members) for members in ([one], [two], [one, two])
    )
    assert (first - second).norm() > 1e-2
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-5)
    assert joined.keys() == terms.keys() == {"loss_class", "loss_bbox", "loss_giou", "total", "grad_norm"}
    assert joined["total"] == pytest.approx(sum(joined[f"loss_{name}"] for name in ("class", "bbox", "giou")), rel=1e-5)
    assert state.network.member == WHOLE
    assert state.network.image_size == (64, 64)
    whole, _, _ = step_of(cfg, tmp_path, [WHOLE])
    alone, _, _ = step_of(small("model.num_denoising=0", "trainer.clip_max_norm=null"), tmp_path)
    torch.testing.assert_close(whole, alone, rtol=0, atol=0)


def test_parameters_that_no_member_uses_are_decayed_as_all_others(small, tmp_path):
    cfg = small(*ELASTIC, "optim.weight_decay=0.5")
    trainer, run = build.trainer(cfg), build.run(cfg, tmp_path)
    state = trainer.start(run)
    object.__setattr__(state.members, "of_step", lambda seed, step: [Member(1)])
    unused = state.network.decoder.dec_bbox_head[1].layers[0].weight
    before = unused.detach().clone()
    state.network.train()
    state.loader.batch_sampler.set_epoch(0)
    trainer.train_step(run, state, [next(iter(state.loader))])
    (group,) = [g for g in state.optimizer.param_groups if any(p is unused for p in g["params"])]
    factor = 1 - 0.5 * group["lr"]
    torch.testing.assert_close(unused.detach(), before * factor)


def test_a_resumed_run_repeats_the_undisturbed_one(small, fit, tmp_path, monkeypatch):
    words = (*ELASTIC, "trainer.max_steps=5", "trainer.elastic.sandwich=true", "teacher=largest")
    undisturbed = fit(*words, folder="undisturbed")
    step = Trainer.train_step

    def step_then_signal(self, run, state, window):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, run, state, window)

    monkeypatch.setattr(Trainer, "train_step", step_then_signal)
    with pytest.raises(Interrupted):
        train_in(tmp_path / "resumed", small(*words))
    monkeypatch.undo()
    train_in(tmp_path / "resumed", small(*words, "trainer.resume=auto"))
    one, two = (files.load(tmp_path / name / files.NEWEST) for name in ("undisturbed", "resumed"))
    assert one["step"] == 5
    for part in ("model", "optimizer", "ema"):
        found, wanted = list(leaves(two[part])), list(leaves(one[part]))
        assert len(found) == len(wanted) > 1
        assert all(map(torch.equal, found, wanted)), part
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == 5
    assert all(line["train/loss_teacher_class"] > 0 for line in logged)
    best = files.load(undisturbed / files.BEST_TOTAL)
    assert tuple(best["image_size"]) == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rfdetr", "lwdetr", "dfine_tiny", "deimv2_atto", "ecseg_s", "ecpose_s"])
def test_other_families_are_elastic_too(small, words_of_family, tmp_path, family):
    words = {
        **{name: words_of_family(name) for name in ("ecseg_s", "ecpose_s")},
        "rfdetr": (
            *("model=rfdetr_seg", "loss=ia_bce", "model.image_size=[64,64]", "model.hidden_dim=32"),
            *("model.backbone.width=32", "model.backbone.num_heads=2", "model.backbone.patch_size=8"),
            *("model.backbone.out_blocks=[1,2]", "model.dim_feedforward=32", "model.num_heads=2"),
            *("model.num_cross_heads=4", "model.num_layers=2", "model.num_queries=20", "model.num_groups=2"),
            "model.backbone.num_windows=1",
        ),
        "lwdetr": (
            *("model=lwdetr_tiny", "loss=ia_bce", "model.image_size=[128,128]", "model.hidden_dim=32"),
            *("model.backbone.width=32", "model.backbone.num_heads=2", "model.backbone.depth=2"),
            *("model.backbone.windowed=[0]", "model.backbone.taps=[0,1]", "model.backbone.num_windows=2"),
            *("model.dim_feedforward=32", "model.num_heads=2", "model.num_cross_heads=4", "model.num_layers=2"),
            *("model.num_queries=12", "model.num_groups=2"),
        ),
        "deimv2_atto": ("model=deimv2_atto", "loss=mal", "model.image_size=[128,128]", "model.num_queries=12"),
        "dfine_tiny": ("model=dfine_tiny", "loss=dfine", "model.image_size=[64,64]", "model.num_queries=20"),
    }[family]
    cfg = small(*words, *ELASTIC, "trainer.elastic.sandwich=true", "teacher=largest", "teacher.threshold=0.01")
    change, terms, _ = step_of(cfg, tmp_path)
    assert change.isfinite().all()
    assert terms["loss_teacher_class"] > 0


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ((*ELASTIC, "data.multi_scale=[64,96]"), r"one of them chooses the sizes: data.multi_scale=null"),
        (("teacher=largest",), r"trainer/elastic is none.*trainer.elastic.sandwich=true"),
        ((*ELASTIC, "teacher=largest"), "trainer.elastic.sandwich is false"),
        ((*ELASTIC, "teacher=largest", "+teacher.cache=ram", "data/augment=none"), "which changes in each step"),
        ((*ELASTIC, "trainer.elastic.num_random=0"), "trainer.elastic.num_random=1"),
        (
            (*ELASTIC, "model.image_size=[64,64]", "trainer.elastic.image_size=[0.5]", "model.num_queries=30"),
            r"queries are too many.*: trainer\.elastic\.queries=\d+, or a larger trainer\.elastic\.image_size",
        ),
        ((*ELASTIC, "trainer.elastic.layers=[]"), r"trainer.elastic.layers=\[1.0\]"),
        ((*ELASTIC, "trainer.elastic.queries=[0]"), r"trainer.elastic.queries is 0"),
    ],
)
def test_what_does_not_fit_is_refused(small, tmp_path, words, needed):
    def start():
        cfg = small(*words)
        build.trainer(cfg).start(build.run(cfg, tmp_path))

    with pytest.raises(ValueError, match=needed):
        start()


def test_shares_are_whole_numbers_of_the_network(small):
    cfg = small("trainer/elastic=full", "model.image_size=[64,96]")
    elastic = build.trainer(cfg).settings.elastic
    assert isinstance(elastic, ElasticTraining)
    data = build.data(cfg)
    network = build.network(cfg, data)
    members = elastic.members(network, data, build.criterion(cfg, data), compiled=False)
    assert members.layers == [1, None]
    assert members.queries == [5, 10, None]
    assert members.image_sizes == [(32, 64), (64, 64), None]
    assert network.member == WHOLE
