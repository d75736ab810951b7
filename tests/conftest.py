"""What all tests share: one thread, no network for trackers, and where real photographs are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# two processes of two threads each on two cores are slower than two of one
torch.set_num_threads(1)

NEEDS_DATA = "set DETR_EXP_TEST_DATA to the folder with bccd_coco, bccd_yolo and coco_person"


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
