"""Members of a checkpoint: the same words for all commands, and the same numbers as a network that is built so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detr_exp
from detr_exp import benchmark, evaluate, export, predict
from detr_exp.config.compose import compose
from detr_exp.config.mistakes import ConfigError
from detr_exp.inference.members import chosen, file_of
from detr_exp.model.member import Member
from detr_exp.published.places import digests
from detr_exp.trainer import checkpoint as files

AT = ["at.layers=1", "at.queries=9", "at.image_size=[96,64]"]
MEMBER = {"layers": 1, "queries": 9, "image_size": [96, 64]}


@pytest.fixture(scope="module")
def smaller(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in a checkpoint whose config describes the member."""
    state = files.load(files.resolve(trained), needs=())
    model = state["config"]["model"]
    model |= {"num_layers": 1, "num_queries": 9, "image_size": [96, 64], "eval_idx": -1}
    model["decoder"]["eval_idx"] = -1
    later = tuple(
        f"decoder.{part}.{index}." for part in ("layers", "dec_bbox_head", "dec_score_head") for index in (1, 2)
    )
    state["model"] = {name: tensor for name, tensor in state["model"].items() if not name.startswith(later)}
    path = tmp_path_factory.mktemp("smaller") / "checkpoint.pth"
    torch.save(state, path)
    return path


def test_evaluations_are_those_of_the_network_that_is_built_so(
    command: Callable[..., int], trained: Path, smaller: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data=shapes", "data.source.size=64", "data.train=8", "data.val=4", "data.test=0", "data.num_workers=0"]
    assert command(evaluate.main, f"checkpoint={trained}", *AT, *data, "hydra.run.dir=member") == 0
    assert "at l1-q9-96x64" in capsys.readouterr().out
    assert command(evaluate.main, f"checkpoint={smaller}", *data, "hydra.run.dir=alone") == 0
    found, alone = (json.loads(Path(name, "metrics.json").read_text()) for name in ("member", "alone"))
    assert found.pop("member") == "l1-q9-96x64"
    timed = {name for name in alone if name.startswith("time/")}
    assert {name: found[name] for name in found if name not in timed} == {
        name: alone[name] for name in alone if name not in timed
    }


def test_predictions_and_the_threshold(
    command: Callable[..., int], trained: Path, capsys: pytest.CaptureFixture[str], smaller: Path
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save("a.png")
    assert command(predict.main, f"checkpoint={trained}", "source=a.png", "draw=false", *AT) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "at l1-q9-96x64, scores above" in shown
    assert "(best F1 of the whole network, not measured at l1-q9-96x64)" in shown
    member, alone = detr_exp.load(trained, at=MEMBER), detr_exp.load(smaller)
    assert "at l1-q9-96x64" in repr(member)
    (one,), (other,) = member.predict("a.png", threshold=0), alone.predict("a.png", threshold=0)
    assert len(one) == 9 * len(member.classes) or len(one) == 9
    assert torch.equal(one.boxes, other.boxes)
    with pytest.raises(ConfigError, match=r"at.layers=2 is settled.*load\(..., at=...\)"):
        member.evaluate(["at.layers=2"])


def test_exported_files_are_small_and_say_so(command: Callable[..., int], trained: Path) -> None:
    words = [f"checkpoint={trained}", "format=torchscript", "export.max_map_drop=null", "export.images=2"]
    assert command(export.main, *words, "hydra.run.dir=whole") == 0
    assert command(export.main, *words, *AT, "hydra.run.dir=member") == 0
    whole, member = Path("whole/model.torchscript"), Path("member/model.torchscript")
    assert member.stat().st_size < whole.stat().st_size
    extra = {"detr_exp.json": ""}
    made = torch.jit.load(member, _extra_files=extra)
    facts = json.loads(extra["detr_exp.json"])
    assert (facts["member"], facts["threshold_of"], facts["image_size"]) == ("l1-q9-96x64", None, [96, 64])
    _, boxes = made(torch.rand(2, 3, 96, 64))
    assert boxes.shape == (2, 9, 4)


def test_a_benchmark_names_the_member(trained: Path, tmp_path: Path) -> None:
    words = ["benchmark.forms=[folded]", "benchmark.rounds=1", "benchmark.batch_sizes=[]", "trainer/hardware=cpu"]
    (row,) = benchmark.benchmark_in(tmp_path, compose([f"checkpoint={trained}", *AT, *words], config_name="benchmark"))
    assert row.name.endswith(" l1-q9-96x64")
    folded = detr_exp.load(trained).opened.network.deploy()
    assert row.parameters < sum(parameter.numel() for parameter in folded.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["at.layers=9"], "at.layers is 9, but the decoder gives predictions after 1 to 3 layers"),
        (["at.queries=21"], "at.queries is 21, but the network was trained with 20"),
        (["at.image_size=[100,64]"], "at.image_size is [100, 64], but its sides must be multiples of 32"),
        (["at.image_size=[32,32]", "at.queries=20", "at.layers=0"], "at.layers is 0"),
        (["at=balanced"], "at holds several keys"),
        (["at.name=balanced"], "python -m detr_exp.pareto checkpoint="),
        (["at.name=balanced", "at.layers=1"], "leave one of them out"),
        (["model.eval_idx=1"], "at.layers=N"),
        (["model.num_queries=50"], "at.queries=N"),
        (["model.image_size=[32,32]"], "at.image_size="),
    ],
)
def test_mistakes(
    command: Callable[..., int],
    trained: Path,
    words: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert command(evaluate.main, f"checkpoint={trained}", *words) == 2
    assert message in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"depth": 1}, "at has 'depth'; it takes layers, queries, image_size"),
        ({"layers": 1.5}, "at.layers is 1.5; it needs whole numbers"),
        ({"layers": True}, "at.layers is True"),
        ({"image_size": 320}, r"at.image_size is 320.*at.image_size=\[320,320\]"),
        ({"image_size": "64"}, "at.image_size is '64'"),
        ("small", r"at.name is small, and only checkpoints have named points"),
    ],
)
def test_mistakes_in_python(at: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(at, None)  # type: ignore[arg-type]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A checkpoint with a file of points."""
    path = tmp_path / "best.pth"
    path.write_bytes(b"weights")
    point = {"name": "l2-q9-64", "layers": 2, "queries": 9, "image_size": [64, 64], "threshold": 0.4}
    content = {"sha256": digests(path)["sha256"], "points": [point], "names": {"fast": "l2-q9-64"}}
    file_of(path).write_text(json.dumps(content))
    return path


def test_points_have_names(named: Path) -> None:
    for name, shown in (("fast", "fast (l2-q9-64)"), ("l2-q9-64", "l2-q9-64")):
        assert chosen(name, named) == (Member(2, 9, (64, 64)), shown, 0.4)
        assert chosen({"name": name, "layers": None}, named) == chosen(name, named)
    with pytest.raises(ConfigError, match=r"did you mean at.name=fast.*has l2-q9-64, fast"):
        chosen("fats", named)


def test_points_of_another_state(named: Path) -> None:
    named.write_bytes(b"trained further")
    with pytest.raises(ConfigError, match=r"another state of best.pth.*detr_exp.pareto checkpoint="):
        chosen("fast", named)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": [], "names": []}', '{"points": [{}], "names": {}}'])
def test_damaged_files_of_points(named: Path, content: str) -> None:
    file_of(named).write_text(content)
    with pytest.raises(ConfigError, match=r"cannot be read .*detr_exp.pareto checkpoint="):
        chosen("fast", named)
