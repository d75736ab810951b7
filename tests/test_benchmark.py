"""The benchmark command: every form is timed and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detr_exp import benchmark
from detr_exp.config.compose import compose

TINY = ["model=rtdetrv2_tiny", "model.image_size=[64,64]", "model.num_queries=20", "trainer/hardware=cpu"]


def test_forms_side_by_side(command: Callable[..., int], trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"checkpoint={trained}", "benchmark.forms=[eager,folded,torchscript]", "benchmark.rounds=2"]
    assert command(benchmark.main, *overrides, "trainer/hardware=cpu", "benchmark.batch_sizes=[1,3]") == 0
    (path,) = Path("outputs/benchmark").glob("*/*/benchmark.json")
    eager, folded, exported = json.loads(path.read_text())
    assert [row["form"] for row in (eager, folded, exported)] == ["eager", "folded", "torchscript"]
    assert eager["parameters"] > folded["parameters"] == exported["parameters"]
    assert eager["gflops"] >= folded["gflops"] > 0
    for row in (eager, folded, exported):
        assert 0 < row["median"] <= row["p95"]
        assert 0 < row["all_median"] <= row["all_p95"]
        assert set(row["throughput"]) == {"1", "3"}
    assert "with all steps" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["rtdetrv2_tiny", "dfine_tiny", "deimv2_atto", "lwdetr_tiny"])
def test_overrides_instead_of_a_checkpoint(model: str, tmp_path: Path) -> None:
    overrides = [
        f"model={model}",
        *TINY[1:],
        "data.num_classes=3",
        "benchmark.forms=[bf16]",
        "benchmark.rounds=1",
        "benchmark.batch_sizes=[]",
    ]
    (row,) = benchmark.benchmark_in(tmp_path, compose(overrides, config_name="benchmark"))
    assert row.form == "bf16"
    assert row.throughput == {}


def test_an_unknown_form(command: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert command(benchmark.main, *TINY, "benchmark.forms=[eagre]") == 2
    assert "benchmark.forms has 'eagre'" in capfd.readouterr().err


def test_a_checkpoint_is_measured_as_it_is(
    command: Callable[..., int], trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(benchmark.main, f"checkpoint={trained}", "model.num_queries=10") == 2
    assert "model.num_queries=10 describes a network" in capfd.readouterr().err


def test_every_published_recipe_has_a_network() -> None:
    names = benchmark.published()
    assert "demo" not in names
    assert len(names) > 30
    with torch.device("meta"):
        assert benchmark.of_recipe("rfdetr_keypoint_coco").keypoint_counts == (17,)
        assert benchmark.of_recipe("rfdetr_nano_coco").num_classes == 91


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_memory_is_that_of_the_call() -> None:
    assert benchmark.peak_memory(lambda: torch.ones(32 * 2**20, dtype=torch.uint8).clone()) == pytest.approx(64, abs=8)
