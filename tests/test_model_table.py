"""docs/models.md says what the recipes build."""

from __future__ import annotations

import re

import model_table as table
import pytest
import torch

from detr_exp.config.compose import CONF_DIR

SMALL = ("rtdetrv2_r18vd_120e_coco", "rtdetrv2_r18vd_120e_voc", "rfdetr_nano_coco", "rfdetr_keypoint_coco")
HEADERS = {path.stem: path.read_text() for path in (CONF_DIR / "experiment").glob("*.yaml")}


def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return table.of_recipe(name)


PAGE = table.DOCUMENT.read_text(encoding="utf-8")
CELLS = [
    line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith(("| rt", "| rf", "| d", "| lw"))
]
ROWS = {name: cells for name, *cells in CELLS}


def test_every_published_recipe_has_its_row() -> None:
    families = {name for name in HEADERS if name.startswith(("rtdetr", "rfdetr", "dfine", "deim", "lwdetr"))}
    assert set(ROWS) == {name for name in families if "# Published: nothing" not in HEADERS[name]}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_and_its_header_agree(name: str) -> None:
    said = table.published(name)
    _, parameters, gigaflops, theirs, accuracy, ours, _, source = ROWS[name]
    cells = [parameters, theirs, accuracy, ours, source]
    assert cells == [said[key] for key in ("parameters", "GFLOPs", "accuracy", "ours", "source")]
    cost = re.search(r"# Cost: (\d+) GFLOPs", HEADERS[name])
    assert cost is None or int(cost[1]) == pytest.approx(float(gigaflops), abs=0.55)


@pytest.mark.parametrize("name", SMALL)
def test_parameters_are_those_the_recipe_builds(name: str) -> None:
    built = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert ROWS[name][0] == f"{built:,}"


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert table.page() == PAGE


COUNTED = [name for name, cells in ROWS.items() if cells[3] != "–"]


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in COUNTED])
def test_operations_are_those_the_authors_count(name: str) -> None:
    """Nothing folded, as theirs."""
    assert table.gigaflops(on_meta(name)) == pytest.approx(float(ROWS[name][3]), rel=0.02)
