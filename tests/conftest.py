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
from hydra._internal.config_repository import ConfigRepository

from detr_exp.config.compose import CONF_DIR
from detr_exp.ops import products

# the same numbers on every processor; DETR_EXP_TEST_PRODUCTS=onednn runs all tests with the other library
products.fastest = functools.wraps(products.fastest)(lambda: os.environ.get("DETR_EXP_TEST_PRODUCTS", "torch"))
# two processes of two threads each on two cores are slower than two of one
torch.set_num_threads(1)


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


OPTIONS = {str(CONF_DIR), "hydra.conf", ""}
read_once("load_config")
read_once("get_group_options")

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
