"""What all tests share: one thread, no network for trackers, and where real photographs are."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra.core.default_element import InputDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from detr_exp.config.compose import CONF_DIR, Composer, Composition
from detr_exp.ops import products

# the same numbers on every processor; DETR_EXP_TEST_PRODUCTS=onednn runs all tests with the other library
products.fastest = functools.wraps(products.fastest)(lambda: os.environ.get("DETR_EXP_TEST_PRODUCTS", "torch"))
# two processes of two threads each on two cores are slower than two of one
torch.set_num_threads(1)
# no test cuts the power; waiting for the disk takes a sixth of the time of all tests
os.fsync = lambda descriptor: None


def read_once(name: str) -> None:
    """Reads of Hydra's repositories that find the options of this package alone: each is done once in a process.

    These files do not change while tests run, and reading them is half of a composition.
    """
    read, known = getattr(ConfigRepository, name), {}

    @functools.wraps(read)
    def of_known(self: ConfigRepository, *args: object, **settings: object) -> object:
        folders = tuple(source.path for source in self.get_sources())
        if not set(folders) <= OPTIONS:
            return read(self, *args, **settings)
        key = (folders, args, *settings.items())
        if key not in known:
            known[key] = pickle.dumps(read(self, *args, **settings))
        return pickle.loads(known[key])  # a copy, because overrides are written into a config that has no defaults

    setattr(ConfigRepository, name, of_known)


def compose_once() -> None:
    """Compositions of the options of this package alone: each is made once in a process, like the files it is made of.

    Tests of other things compose the same few configs again and again, which is most of what they do.
    """
    compose, known = Composer.compose, {}

    @functools.wraps(compose)
    def of_known(self: Composer, overrides: list[Override]) -> Composition:
        if not {source.path for source in self.repository.get_sources()} <= OPTIONS:
            return compose(self, overrides)
        key = (self.config_name, *(override.input_line for override in overrides))
        if key not in known:
            known[key] = pickle.dumps(compose(self, overrides))
        return pickle.loads(known[key])  # a copy, because configs are written into

    Composer.compose = of_known


def resolve_only_interpolations() -> None:
    """For each file Hydra makes a config of all choices to resolve its defaults in, which hardly ever refer to one.

    That is half of what remains of a composition.
    """
    make_map, resolve = defaults_list._create_interpolation_map, InputDefault._resolve_interpolation_impl

    @functools.wraps(make_map)
    def of_needed(overrides: object, defaults: list[InputDefault], self_added: bool) -> DictConfig:
        refers = any("${" in str(vars(default)) for default in defaults)
        return make_map(overrides, defaults, self_added) if refers else DictConfig({})

    @functools.wraps(resolve)
    def of_interpolation(self: InputDefault, known_choices: DictConfig, value: str) -> str:
        return resolve(self, known_choices, value) if "${" in value else value

    defaults_list._create_interpolation_map = of_needed
    InputDefault._resolve_interpolation_impl = of_interpolation


OPTIONS = {str(CONF_DIR), "hydra.conf", ""}
read_once("load_config")
read_once("get_group_options")
compose_once()
resolve_only_interpolations()

# pip install --no-deps --target FOLDER libreyolo==1.6.0: a second D-FINE to compare with, which is in no extra because
# what it needs replaces packages that others need
if peers := os.environ.get("DETR_EXP_PEERS"):
    sys.path.append(peers)

NEEDS_DATA = "set DETR_EXP_TEST_DATA to the folder with bccd_coco, bccd_yolo and coco_person"


# a run of a second: every word a user could say
TINY_RUN = [
    "model=rtdetrv2_tiny",
    "model.image_size=[64,64]",
    "model.num_queries=20",
    "data=shapes",
    "data.source.size=64",
    "data.train=8",
    "data.val=4",
    "data.test=0",
    "data.num_workers=0",
    "tracker=none",
    "trainer/hardware=cpu",
    "trainer.hardware.amp=null",
    "trainer.hardware.products=torch",
    "trainer.batch_size=4",
    "trainer.epochs=1",
    "trainer.max_steps=2",
    "trainer.num_pictures=0",
]


@pytest.fixture(scope="session")
def tiny_run() -> list[str]:
    """Words for a training that takes a second."""
    return list(TINY_RUN)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run, with pictures."""
    from detr_exp.config.compose import compose
    from detr_exp.training import train_in

    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, compose([*TINY_RUN, "trainer.num_pictures=1"]))
    return folder


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command's `main` in this process as a shell would, in an empty folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(main: Callable[[], None], *words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["detr_exp", *words])
        handlers = logging.getLogger().handlers[:]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
            logging.getLogger().handlers[:] = handlers
        return 0

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with data sets of real photographs; without it the test is skipped."""
    folder = Path(os.environ.get("DETR_EXP_TEST_DATA", ""))
    if not (folder / "bccd_coco").is_dir():
        pytest.skip(NEEDS_DATA)
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With DETR_EXP_REQUIRE_DATA a test that was skipped for want of data counts as failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("DETR_EXP_REQUIRE_DATA"):
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if "DETR_EXP_TEST_DATA" in str(report.longrepr)]
    if skipped:
        reporter.write_line(f"{len(skipped)} tests on real data were skipped, e.g. {skipped[0].nodeid}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
