"""Members of a checkpoint side by side: shared evaluations are separate ones, points have names, one is exported."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import detr_exp
from detr_exp import pareto
from detr_exp.config.compose import compose
from detr_exp.config.mistakes import ConfigError
from detr_exp.inference import shared
from detr_exp.inference.detector import load
from detr_exp.inference.members import chosen, file_of, grid_of
from detr_exp.inference.on_data import on_data, open_detector
from detr_exp.inference.shared import evaluate_members
from detr_exp.model.member import Member
from detr_exp.runs import members_page
from detr_exp.runs.members_page import Point
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.console import Console

DATA = ["data=shapes", "data.source.size=64", "data.train=8", "data.val=6", "data.test=0", "data.num_workers=0"]
SIZES = ("64", "96x64")
GRID = ["pareto.layers=[1,3]", "pareto.queries=[5,20]", "pareto.image_sizes=[64,[96,64]]", "pareto.rounds=2"]
FEW = ["pareto.resamples=5", "metric=pycocotools"]


@pytest.fixture(scope="module")
def checkpoint(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, beside which points can be written."""
    return shutil.copy(files.resolve(trained), tmp_path_factory.mktemp("found") / "best.pth")


def test_points_are_written_named_and_exported(command: Callable[..., int], checkpoint: Path) -> None:
    words = [f"checkpoint={checkpoint}", *DATA, *GRID, *FEW]
    assert command(pareto.main, *words, "pareto.export=fast", "format=torchscript", "hydra.run.dir=out") == 0
    found = json.loads(Path("out/members.json").read_text())
    assert json.loads(file_of(checkpoint).read_text()) == found
    names = [point["name"] for point in found["points"]]
    assert set(names) == {f"l{layers}-q{queries}-{size}" for layers in (1, 3) for queries in (5, 20) for size in SIZES}
    timed = [point["name"] for point in found["points"] if point["latency_ms"] is not None]
    assert {*found["front"], *found["names"].values()} <= set(timed)
    assert_page(Path("out/pareto.html").read_text(), names)
    fast = detr_exp.load(checkpoint, at="fast")
    assert fast.opened.at == f"fast ({found['names']['fast']})"
    extra = {"detr_exp.json": ""}
    torch.jit.load("out/model.torchscript", _extra_files=extra)
    assert json.loads(extra["detr_exp.json"])["member"] == fast.opened.at


def test_shared_evaluations_are_separate_ones(trained: Path) -> None:
    cfg = compose([f"checkpoint={trained}", *DATA, *FEW], config_name="pareto")
    members = [
        Member(layers, queries, size) for size in ((64, 64), (96, 64)) for layers, queries in ((1, 7), (3, None))
    ]
    found = evaluate_members(on_data(open_detector(cfg), cfg), "val", members)
    seen = {member: (dict(metric.images), values) for size in found for member, metric, values in size}
    assert list(seen) == members
    for member, (images, values) in seen.items():
        alone = on_data(load(trained, at=member), cfg)
        metric = alone.metric("val")
        expected = alone.evaluate(alone.loader("val"), metric)
        assert values == {name: value for name, value in expected.items() if not name.startswith("time/")}
        for number, detections in metric.images.items():
            assert len(detections.scores) == (member.queries or 20)
            assert np.array_equal(images[number].scores, detections.scores)
            assert np.array_equal(images[number].boxes, detections.boxes)


def test_members_share_what_they_have_in_common(trained: Path) -> None:
    """A pass of backbone and encoder for each size, one of the decoder for each number of queries at it."""
    cfg = compose([f"checkpoint={trained}", *DATA, *FEW, "batch_size=3"], config_name="pareto")
    opened, passes = on_data(open_detector(cfg), cfg), Counter[str]()
    network, batches = opened.detector.network, 2
    for part in ("backbone", "encoder", "decoder"):
        network.get_submodule(part).register_forward_hook(lambda *_, part=part: passes.update([part]))
    members = grid_of(network, [1, 2, 3], [3, 7, 20], [64, [96, 64]])
    assert len(members) == 18
    passes.clear()
    found = [one for size in evaluate_members(opened, "val", members) for one in size]
    assert len(found) == len(members)
    assert passes == {"backbone": 2 * batches, "encoder": 2 * batches, "decoder": 2 * 3 * batches}


@pytest.mark.slow
def test_a_search_of_all_members_finds_the_front_of_the_grid(trained: Path) -> None:
    pytest.importorskip("optuna")
    seen = []
    for more in ([], ["pareto.search=9"]):
        cfg = compose([f"checkpoint={trained}", *DATA, *GRID, *FEW, "metric=fast", *more], config_name="pareto")
        opened = on_data(open_detector(cfg), cfg)
        members = grid_of(opened.detector.network, *pareto._grid(cfg), fine=bool(more))
        _, points = pareto._evaluated(opened, cfg, members, Console("none"))
        seen.append({point.name: (point.values, point.timed) for point in points})
    assert seen[0] == seen[1]
    assert len(seen[0]) == 8
    assert any(timed for _, timed in seen[0].values())


def test_a_split_without_objects_is_said(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose([f"checkpoint={trained}", *DATA, *GRID, *FEW, "metric=fast"], config_name="pareto")
    opened = on_data(open_detector(cfg), cfg)
    members = [Member(1, 5, (64, 64)), Member(3, 5, (64, 64))]

    def nothing(*_: object) -> Iterator[list[object]]:
        yield [
            (member, metric, {"mAP": -1.0, "mAP50": -1.0}) for member in members for metric in opened.metrics("val", 1)
        ]

    monkeypatch.setattr(shared, "evaluate_members", nothing)
    with pytest.raises(ValueError, match=r"val has nothing to measure mAP on.*another split, data.split="):
        pareto._evaluated(opened, cfg, members, Console("none"))


def assert_page(page: str, names: list[str]) -> None:
    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.opened: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            assert tag not in ("script", "link")
            self.opened += [] if tag == "meta" else [tag]

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.opened.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert not checker.opened
    assert all(f"<td>{name}</td>" in page for name in names)
    assert "at.name=balanced" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pareto.form=onx"], "pareto.form is 'onx'; use one of eager, folded"),
        (["pareto.layers=2"], "pareto.layers is 2; it needs a list: pareto.layers=[1,2]"),
        (["pareto.layers=[1,9]"], "at.layers is 9, but the decoder gives predictions after 1 to 3 layers"),
        (["pareto.image_sizes=[65]"], "at.image_size is [65, 65], but its sides must be multiples of 32"),
        (["pareto.metric=map"], "pareto.metric is map, which is not measured"),
        (
            ["pareto.export=slow", "pareto.image_sizes=[64]", "pareto.layers=[1]"],
            "pareto.export is slow, and the points",
        ),
        (["pareto.export=fast", "format=onx"], "format is 'onx'; use one of onnx"),
    ],
)
def test_mistakes(
    command: Callable[..., int], trained: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["pareto.queries=[5]", "pareto.rounds=1", "pareto.resamples=2", "metric=pycocotools"]
    assert command(pareto.main, f"checkpoint={trained}", *DATA, *few, *words) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    with pytest.raises(ConfigError, match=r"python -m detr_exp.pareto"):
        chosen("fast", trained / "checkpoint_best_total.pth")


def test_a_grid_has_what_the_network_can(trained: Path) -> None:
    network = detr_exp.load(trained).opened.network
    members = grid_of(network, None, None, None)
    assert {member.layers for member in members} == {1, 2, 3}
    assert {member.queries for member in members} == {20, 13, 7, 3}
    assert {member.image_size for member in members} == {(64, 64), (32, 32)}
    assert len(members) == 24
    assert len(grid_of(network, [2], None, [[32, 96]])) == 4
    assert network.member == Member()


def point(name: str, gain: float, latency: float, noise: float = 0.0, draws: object = None, **extent: object) -> Point:
    values = dict(layers=1, queries=1, image_size=(32, 32)) | extent
    drawn = None if draws is None else np.asarray(draws, dtype=float)
    return Point(
        name, metric="mAP", values={"mAP": gain}, timed=True, draws=drawn, latency=latency, noise=noise, **values
    )


def test_a_front_knows_the_noise_of_both_axes() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(0, 0.05, 400)  # luck of the draw that all share

    def member(name: str, gain: float, latency: float, own: float) -> Point:
        return point(name, gain, latency, 0.05, gain + images + generator.normal(0, own, 400))

    quick, middle, slow = (
        member("quick", 0.3, 5, 0.001),
        member("middle", 0.4, 10, 0.001),
        member("slow", 0.5, 20, 0.001),
    )
    lucky = member("lucky", 0.502, 30, 0.01)  # cannot be told to be better than slow
    level = member("level", 0.397, 9.97, 0.001)  # nor this to be quicker than middle
    worse = member("worse", 0.35, 15, 0.001)
    front = members_page.front_of([lucky, worse, level, slow, middle, quick])
    assert [one.name for one in front] == ["quick", "middle", "slow"]
    assert members_page.names_of(front) == {"fast": "quick", "balanced": "middle", "accurate": "slow"}


def test_one_point_has_all_names() -> None:
    (alone,) = members_page.front_of([point("only", 0.1, 1.0)])
    assert set(members_page.names_of([alone]).values()) == {"only"}


def test_what_a_smaller_member_reaches_is_not_timed() -> None:
    small, large = point("small", 0.4, 0, layers=1), point("large", 0.4, 0, layers=2)
    wide, lost = point("wide", 0.5, 0, image_size=(32, 64)), point("lost", float("nan"), 0)
    every = [small, large, wide, lost]
    assert [one.name for one in every if not members_page.is_beaten(one, every)] == ["small", "wide"]
