"""The evaluate command: the numbers of the training, on any split and data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from detr_exp import evaluate
from detr_exp.config.compose import compose
from detr_exp.inference.on_data import category_ids_by_name
from detr_exp.training import train_in

Command = Callable[..., int]


def results() -> dict[str, float]:
    (path,) = Path("outputs/evaluate").glob("*/*/metrics.json")
    return json.loads(path.read_text())


def test_the_numbers_of_the_training_to_the_last_digit(command: Command, trained: Path) -> None:
    assert command(evaluate.main, f"checkpoint={trained}") == 0
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = {name.removeprefix("val/"): v for line in lines for name, v in line.items() if name.startswith("val/")}
    result = results()
    compared = [name for name in logged if name in result]
    assert {"mAP", "mAP50", "mAR", "F1"} <= set(compared)
    assert {name: result[name] for name in compared} == {name: logged[name] for name in compared}


def same_numbers(folder: Path, out: Path, tolerance: float) -> None:
    """A run's own numbers and those of the command."""
    result = evaluate.evaluate_in(out, compose([f"checkpoint={folder}", "data.num_workers=0"], config_name="evaluate"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {name.removeprefix("val/"): v for line in lines for name, v in line.items() if name.startswith("val/")}
    compared = [name for name in logged if name in result]
    assert {"mAP", "mAP50", "mAR", "F1"} <= set(compared)
    for name in compared:
        assert result[name] == pytest.approx(logged[name], rel=0, abs=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_the_numbers_of_the_training_on_photographs(
    real_data: Path, tiny_run: list[str], tmp_path: Path, layout: str
) -> None:
    overrides = [override for override in tiny_run if not override.startswith("data")]
    data = ["data=auto", f"data.root={real_data / f'bccd_{layout}'}", "data.num_workers=0"]
    train_in(tmp_path / "run", compose([*overrides, *data, "optim.lr=1e-3", "trainer.max_steps=6"]))
    same_numbers(tmp_path / "run", tmp_path / "out", tolerance=0.0)


@pytest.mark.slow
def test_the_numbers_of_a_training_on_two_processes(tiny_run: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [*tiny_run, "data.val=9", "trainer.hardware.devices=2", f"hydra.run.dir={folder}"]
    subprocess.run([sys.executable, "-m", "detr_exp.train", *overrides], check=True, cwd=tmp_path, capture_output=True)
    same_numbers(folder, tmp_path / "out", tolerance=1e-4)


def test_curves_and_confusion_matrices_are_saved(command: Command, trained: Path) -> None:
    assert command(evaluate.main, f"checkpoint={trained}", "weights=raw") == 0
    (path,) = Path("outputs/evaluate").glob("*/*/confusion.png")
    assert path.with_name("pr_curves.png").stat().st_size > 1000


def test_a_table_for_every_class(command: Command, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(evaluate.main, f"checkpoint={trained}") == 0
    assert "threshold" in capsys.readouterr().out
    (path,) = Path("outputs/evaluate").glob("*/*/classes.json")
    rows = json.loads(path.read_text())["bbox"]
    assert [row["class"] for row in rows] == ["arrow", "kite", "house", "heart", "crescent", "figure"]
    assert all(0 <= row["threshold"] <= 1 for row in rows)


def test_another_data_set_and_split(trained: Path, tmp_path: Path) -> None:
    overrides = [f"checkpoint={trained}", "data=shapes", "data.split=test", "data.num_workers=0", "data.source.size=64"]

    def objects(*more: str) -> int:
        evaluate.evaluate_in(tmp_path, compose([*overrides, *more], config_name="evaluate"))
        return sum(row["objects"] for row in json.loads((tmp_path / "classes.json").read_text())["bbox"])

    some = objects("data.test=3", "batch_size=2", "trainer/hardware=cpu", "metric=fast")
    assert 0 < some <= 24
    assert objects("data.test=12") > some


def test_a_split_that_is_not_there(command: Command, trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(evaluate.main, f"checkpoint={trained}", "data.split=test") == 2
    assert "no test split" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "checkpoint must be given: checkpoint=..."),
        (["checkpoint=absent.pth"], "absent.pth is not a file"),
        (["checkpoint=x", "data.spilt=test"], "did you mean data.split?"),
        (["checkpoint=x", "data=cocoa"], "did you mean data=coco?"),
    ],
)
def test_mistakes(command: Command, capfd: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    assert command(evaluate.main, *overrides) == 2
    assert message in capfd.readouterr().err


def detector(*classes: str) -> SimpleNamespace:
    return SimpleNamespace(classes=list(classes), path=Path("x.pth"))


def data(**ids: int) -> SimpleNamespace:
    return SimpleNamespace(classes=list(ids), category_ids=list(ids.values()))


def test_classes_are_matched_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert category_ids_by_name(detector("cat", "dog"), data(cat=3, dog=7)) == [3, 7]
    assert capsys.readouterr().out == ""
    assert category_ids_by_name(detector("cat", "dog"), data(Dog=1, Cat=2)) == [2, 1]
    assert category_ids_by_name(detector("cat", "dog", "cow"), data(cow=4, elk=9)) == [10, 11, 4]
    assert "left out: elk" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no name in common"):
        category_ids_by_name(detector("cat"), data(elk=1))


def test_a_training_is_not_overwritten_and_a_refused_command_leaves_no_files(
    command: Callable[..., int], trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command(evaluate.main, f"checkpoint={run}", f"hydra.run.dir={run}") == 2
    assert "is the folder of a training" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert command(evaluate.main, "checkpoint=nowhere", "hydra.run.dir=out") == 2
    assert not Path("out").exists()
    assert command(evaluate.main, f"checkpoint={run}", "hydra.run.dir=out") == 0
    assert Path("out/.hydra/overrides.yaml").is_file()
    assert Path("out/run.log").is_file()
