"""The examples of `docs/kubernetes`: their schema, and the commands in them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from detr_exp.config.compose import composition, config_loader, refuse_unready

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "kubernetes"


def loaded(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def templates(name: str) -> list[Any]:
    spec = loaded(name)["spec"]
    if name == "indexed_job.yaml":
        return [spec["template"]]
    cluster = spec["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_job_meets_the_published_schema() -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    checker.validate(loaded("indexed_job.yaml"), checker.latest_version(), strict=True)


def test_the_pods_of_the_ray_cluster_meet_the_published_schema() -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for template in templates("ray_job.yaml"):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": template}
        checker.validate(pod, checker.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["indexed_job.yaml", "ray_job.yaml"])
def test_its_volumes_are_there(name: str) -> None:
    for template in templates(name):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {mount["name"] for one in template["spec"]["containers"] for mount in one["volumeMounts"]}
        assert mounts == volumes


def test_the_words_of_the_job_compose() -> None:
    (container,) = templates("indexed_job.yaml")[0]["spec"]["containers"]
    program, *words = container["args"]
    assert program == "detr_exp.train"
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in words]
    cfg = composition(config_loader(), "config", [word for word in words if not word.startswith("hydra.")]).cfg
    refuse_unready(cfg)
    assert cfg.seed == 3


def test_the_words_of_the_sweep_compose() -> None:
    shell, option, line = shlex.split(loaded("ray_job.yaml")["spec"]["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    words = shlex.split(line.partition("--multirun ")[2])
    assert "hydra/launcher=ray" in words
    single = [word.partition(",")[0] for word in words if not word.startswith("hydra.sweep")]
    refuse_unready(composition(config_loader(), "config", single).cfg)
