"""Grids: what runs, what is written down, and what a second start does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp.config.compose import Composer, config_loader
from detr_exp.config.grid import refuse_before_start

Sweep = Callable[..., Any]
GRID = "optim.lr=1e-3,2e-3,3e-3,4e-3"


def statuses(lines: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(line["number"], line["status"]) for line in lines]


def broken(cfg: DictConfig) -> float:
    if cfg.optim.lr == 1e-3:
        raise KeyError("no such thing")
    if cfg.optim.lr == 2e-3:
        sys.exit("leaving")
    return float("nan") if cfg.optim.lr == 3e-3 else 100 * cfg.optim.lr


def fixed(cfg: DictConfig) -> float:
    return 100 * cfg.optim.lr


def test_a_failure_is_written_down_and_repeated_only_when_asked_for(sweep: Sweep) -> None:
    first = sweep(broken, GRID)
    assert first.status == 1
    assert statuses(first.lines) == [(0, "failed"), (1, "failed"), (2, "nan"), (3, "ok")]
    assert first.lines[0]["reason"] == "KeyError: 'no such thing'"
    assert first.lines[1]["reason"] == "it called sys.exit('leaving')"
    assert first.lines[3]["metric"] == 0.4
    assert first.lines[3]["overrides"] == ["optim.lr=0.004"]
    assert {path.name for path in Path("s").iterdir() if path.is_dir()} == {
        f"{line['overrides'][0].removeprefix('optim.')}-{line['hash']}" for line in first.lines
    }
    ranked = [line.split()[:2] for line in first.out.split("best first")[1].splitlines()[2:6]]
    assert ranked == [["3", "0.004"], ["0", "0.001"], ["1", "0.002"], ["2", "0.003"]]
    assert "3 of 4 runs failed" in first.err

    again = sweep(fixed, GRID)
    assert again.status == 1, "what has failed has failed"
    assert again.lines == first.lines, "nothing was run"
    assert "4 of 4 runs have ended before" in again.out

    retried = sweep(fixed, GRID, "sweep_retry=failed")
    assert retried.status == 0
    assert statuses(retried.lines[4:]) == [(0, "ok"), (1, "ok"), (2, "ok")]

    wider = sweep(fixed, "optim.lr=4e-3,5e-3,1e-3")
    assert wider.status == 0
    assert [line["metric"] for line in wider.lines[7:]] == [0.5], "only what is new"


def test_fail_fast_starts_nothing_after_a_failure(sweep: Sweep) -> None:
    done = sweep(broken, "optim.lr=4e-3,1e-3,5e-3", "sweep_fail_fast=true")
    assert statuses(done.lines) == [(0, "ok"), (1, "failed")]
    assert "not run" in done.out
    assert done.status == 1


def test_a_sweep_that_was_stopped_goes_on(sweep: Sweep) -> None:
    resumed: list[str | None] = []

    def stopped(cfg: DictConfig) -> float:
        resumed.append(cfg.trainer.resume)
        if len(resumed) == 2:  # as a training that has saved its state on SIGTERM
            (Path(HydraConfig.get().runtime.output_dir) / "run.json").write_text("{}")
            sys.exit(143)
        return 1.0

    first = sweep(stopped, "optim.lr=1e-3,2e-3,3e-3")
    assert first.status == 143
    assert statuses(first.lines) == [(0, "ok"), (1, "killed")]
    second = sweep(stopped, "optim.lr=1e-3,2e-3,3e-3")
    assert second.status == 0
    assert statuses(second.lines[2:]) == [(1, "ok"), (2, "ok")]
    assert resumed[2] == "auto"
    assert resumed[3] is None


def test_another_configuration_is_refused_with_the_difference(sweep: Sweep) -> None:
    assert sweep(fixed, GRID).status == 0
    other = sweep(fixed, GRID, "trainer.epochs=3")
    assert other.status == 2
    assert "trainer.epochs was 12 and is 3" in other.err
    assert len(other.lines) == 4
    assert sweep(fixed, GRID, "data.num_workers=0").status == 0, "changes no number"


@pytest.mark.slow
def test_another_configuration_of_any_of_many_runs_is_refused(sweep: Sweep) -> None:
    words = ("seed=0,3,4", "optim.lr=1e-3,2e-3")  # 3 is no extreme
    assert sweep(fixed, *words).status == 0
    assert sweep(fixed, *words).status == 0, "their numbers differ as they are to"
    (third,) = [path for path in Path("s").glob("*/.hydra/config.yaml") if is_third(path.read_text())]
    text = third.read_text()
    for key, now in (("  epochs: 12", "  epochs: 13"), ("seed: 3\n", "seed: 7\n"), ("seed: 3\n", "seed: 3\nmine: 1\n")):
        assert key in text
        third.write_text(text.replace(key, now))
        assert sweep(fixed, *words).status == 2, now
    third.write_text(text)
    assert sweep(fixed, *words).status == 0


def is_third(text: str) -> bool:
    return "\nseed: 3\n" in text and "  lr: 0.002\n" in text


def test_of_many_numbers_only_the_extremes_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []
    original = Composer.compose

    def count(self: Composer, overrides: list[Any]) -> Any:
        composed.append([str(one.input_line) for one in overrides])
        return original(self, overrides)

    monkeypatch.setattr(Composer, "compose", count)
    refuse_before_start(config_loader(), "config", ["seed=range(5000)", "optim.lr=1e-3,1,2e-3,3e-3,2,3"])
    others = [{"seed=1"}, {"seed=4999"}, *({f"optim.lr={value}"} for value in ("1", "3", "0.002", "0.003"))]
    first = {"seed=0", "optim.lr=0.001"}
    assert sorted(sorted(set(one) - first) for one in composed) == sorted(sorted(one) for one in [set(), *others])


def test_one_sweep_at_a_time_in_a_folder(sweep: Sweep) -> None:
    Path("s").mkdir()
    with FileLock("s/.lock"):
        refused = sweep(fixed, GRID)
    assert refused.status == 2
    assert "in use by a sweep" in refused.err


def test_seeds_give_a_mean_and_a_deviation(sweep: Sweep) -> None:
    done = sweep(lambda cfg: cfg.seed + 10 * cfg.optim.lr, "seed=1,2,3", "optim.lr=1e-3,2e-3")
    first, second = (line.split() for line in done.out.split("over seeds, best first")[1].splitlines()[2:4])
    assert first == ["optim.lr=0.002", "2.0200", "1.0000", "-0.4641", "..", "4.5041", "3"]
    assert second == ["optim.lr=0.001", "2.0100", "1.0000", "-0.4741", "..", "4.4941", "3"]


def test_a_word_that_is_not_known_is_refused(sweep: Sweep) -> None:
    refused = sweep(fixed, GRID, "sweep_retry=all")
    assert refused.status == 2
    assert "sweep_retry=failed" in refused.err
    refused = sweep(fixed, GRID, "sweep_fail_fast=no")
    assert refused.status == 2, "a text, which would mean yes"
    assert "sweep_fail_fast is 'no'" in refused.err
    assert "not a list of values" in sweep(fixed, "optim.lr=interval(1,2)").err


def test_every_choice_is_composed_before_hydra_composes_anything(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_exp import cli

    def refuse(*args: Any) -> None:
        raise AssertionError("Hydra was started")

    monkeypatch.setattr(cli.hydra, "main", refuse)
    for overrides, message in (
        (["data=shapes,coco", "loss=focal,vfl"], "data.root must be given"),
        (["loss=focal,mal,ce", "loss.focal_gamma=1,2"], "loss=ce has no key focal_gamma"),
        (["optim.lr=1e-3,2e-3", "optim.lrr=1,2"], "did you mean optim.lr?"),
        (["seed=1,2", "optim.lr=1e-3,-1"], "optim.lr is -1; it must be"),
        (["seed=0,1.5"], "seed is 1.5; it must be"),
    ):
        assert command(lambda: cli.main(fixed, "config", ""), "--multirun", *overrides) == 2
        assert message in capsys.readouterr().err
        assert not list(Path().iterdir()), "no folder"


def test_runs_that_a_file_adds_to_are_composed_as_well(sweep: Sweep) -> None:
    for overrides in (["sweep=focal_gamma", "hydra/launcher=basic"], ["hydra/sweeper=grid"]):
        refused = sweep(fixed, *overrides, "data=shapes,coco")
        assert refused.status == 2
        assert "data.root must be given" in refused.err
        assert not Path("s").exists()


@pytest.mark.slow
def test_a_recipe_may_say_what_is_tried(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    from detr_exp import cli

    recipe = Path("conf/experiment/mine.yaml")
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      data.root: /a,/b\n")
    overrides = ["--multirun", "--config-dir=conf", "experiment=mine", "hydra.sweep.dir=s", "tracker=none", "data=coco"]
    assert command(lambda: cli.main(fixed, "config", ""), *overrides) == 0
    assert "2 runs" in capsys.readouterr().out
    assert command(lambda: cli.main(fixed, "config", ""), *overrides, "loss=focal,ce", "loss.focal_gamma=3") == 2
    assert "loss=ce has no key focal_gamma" in capsys.readouterr().err


def test_the_same_command_has_the_same_folder(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    from detr_exp import cli

    for overrides in ([GRID, "seed=1"], ["seed=1", GRID], [GRID, "seed=2"], [GRID, "seed=1", "sweep_retry=failed"]):
        assert command(lambda: cli.main(fixed, "config", ""), "--multirun", "tracker=none", *overrides) == 0
    assert len(list(Path("outputs/sweeps").iterdir())) == 2


def seeded(cfg: DictConfig) -> float:
    """Results that grow with the learning rate, by far more than they scatter over seeds."""
    return 100 * cfg.optim.lr + 0.002 * ((7 * cfg.seed + int(cfg.optim.lr * 1e3)) % 3)


RACE = ("seed=0,1,2,3,4", "optim.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3", "hydra.sweeper.race=true")


def test_a_race_gives_further_seeds_only_to_points_that_may_win(sweep: Sweep) -> None:
    done = sweep(seeded, *RACE)
    assert done.status == 0
    tried = [tuple(sorted(line["overrides"])) for line in done.lines]
    assert len(tried) == len(set(tried)) == 10, "the worst two had one seed, and the best was plain after two"
    assert "race: after 2 of 5 seeds 1 of 6 points may still win" in done.out
    assert "race: 10 of 30 runs, 67% saved" in done.out
    best, *others = (line.split() for line in done.out.split("who left it")[1].splitlines()[2:8])
    assert [row[-1] for row in (best, *others)] == ["2", "2", "2", "2", "1", "1"], "those that left early come last"
    assert best[0] == "optim.lr=0.006"
    values = [line["metric"] for line in done.lines if "optim.lr=0.006" in line["overrides"]]
    half = 12.7062 * np.std(values, ddof=1) / 2**0.5
    assert float(best[3]) == pytest.approx(np.mean(values) - half, abs=1e-4)
    assert float(best[5]) == pytest.approx(np.mean(values) + half, abs=1e-4)
    again = sweep(seeded, *RACE)
    assert again.lines == done.lines, "the same race, and nothing was run"
    full = sweep(seeded, "seed=0,1", RACE[1])
    assert len(full.lines) == 12, "without a race all the others follow"


@pytest.mark.slow
def test_a_race_that_was_stopped_goes_on_as_it_would_have(sweep: Sweep) -> None:
    runs: list[int] = []

    def stopped(cfg: DictConfig) -> float:
        runs.append(1)
        if len(runs) == 9:
            (Path(HydraConfig.get().runtime.output_dir) / "run.json").write_text("{}")
            sys.exit(143)
        return seeded(cfg)

    assert sweep(stopped, *RACE).status == 143
    done = sweep(seeded, *RACE)
    assert done.status == 0
    assert len({line["hash"] for line in done.lines}) == 10


@pytest.mark.slow
def test_a_point_without_a_result_loses_the_race(sweep: Sweep) -> None:
    def fails(cfg: DictConfig) -> float:
        return float("nan") if cfg.optim.lr == 6e-3 and cfg.seed == 1 else seeded(cfg)

    done = sweep(fails, *RACE)
    assert done.status == 1, "it is told as ever"
    assert "race: after 2 of 5 seeds 1 of 6 points" in done.out
    assert done.lines[-1]["overrides"] != ["seed=2", "optim.lr=0.006"]


@pytest.mark.parametrize("words", [("optim.lr=1e-3,2e-3",), ("seed=0,1,2,3",), ("seed=0,1", "optim.lr=1e-3,2e-3")])
def test_a_race_needs_points_and_seeds(sweep: Sweep, words: tuple[str, ...]) -> None:
    refused = sweep(seeded, *words, "hydra.sweeper.race=true")
    assert (refused.status, refused.lines) == (2, [])
    assert "sweep both: seed=0,1,2,3,4" in refused.err


@pytest.mark.slow
def test_the_table_says_what_became_of_choosing_by_half_of_the_images(sweep: Sweep, trained: Path) -> None:
    def task(cfg: DictConfig) -> float:
        folder = Path(HydraConfig.get().runtime.output_dir)
        for name in ("run.json", "config.yaml"):
            shutil.copy(trained / name, folder)
        here, there = {0: (0.5, 0.3), 1: (0.4, 0.45)}[cfg.seed]
        lines = [{"step": 1, "val/mAP": here, "held_out/mAP": there}, {"step": 2, "best/held_out_mAP": there}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return here

    found = sweep(task, "seed=0,1")
    assert found.status == 0
    rows = [line.split() for line in found.out.splitlines() if " ok " in line]
    assert [row[2:4] for row in rows] == [["0.5000", "0.3"], ["0.4000", "0.45"]]
    assert "the best was chosen at 0.4500 on half of the validation images, 0.3750 on the other half" in found.out
