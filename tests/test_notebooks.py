"""The notebooks of the documentation: small, without output, and run from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detr_exp.config.compose import compose

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
# changed for a test: what takes long, and the folder of the data
QUICK = {
    "finetune": {'words = [start, f"data.root={data}"': 'words = [*{tiny}, "data=auto", f"data.root={data}"'},
    "sweep": {'small = "': 'small = "{tiny_line} ', " seed=0,1": "", "data.train=32 data.val=16 trainer.epochs=2 ": ""},
}


def code(path: Path) -> list[str]:
    cells: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_both_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(QUICK)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_small_without_output_and_with_words_that_exist(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert path.stat().st_size < 10_000
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert cell["execution_count"] is None
            compile("".join(cell["source"]), path.name, "exec")
    for old in QUICK[path.stem]:
        assert old in "\n".join(code(path)), "the test changes it"


def test_the_words_compose() -> None:
    names: dict[str, Any] = {}
    exec(code(DOCS / "finetune.ipynb")[0], names)
    compose([names["start"], f"data.root={names['data']}"])
    lines = [line for line in code(DOCS / "sweep.ipynb")[0].splitlines() if line.startswith(("small", "swept"))]
    exec("\n".join(lines), names)
    compose([*names["small"].split(), *(word.partition(",")[0] for word in names["swept"].split())])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_it_runs(
    name: str, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install 'detr_exp[test]'")
    client = pytest.importorskip("nbclient", reason="pip install 'detr_exp[test]'")
    pytest.importorskip("ipykernel", reason="pip install 'detr_exp[test]'")
    if name == "finetune":
        pytest.importorskip("supervision", reason="the notebook draws with it")
        monkeypatch.setenv("BCCD", str(request.getfixturevalue("real_data") / "bccd_coco"))
        tiny_run = [word for word in tiny_run if not word.startswith("data")] + ["data.num_workers=0"]
    notebook = nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for old, new in QUICK[name].items():
            new = new.replace("{tiny}", repr(tiny_run)).replace("{tiny_line}", " ".join(tiny_run))
            cell.source = cell.source.replace(old, new)
    nbformat.validate(notebook)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    html = "".join(output.get("data", {}).get("text/html", "") for output in shown)
    assert "AP50" in html if name == "finetune" else "<iframe" in html
    texts = "".join(output.get("text", "") for output in shown)
    if name == "finetune":
        assert "did you mean trainer.epochs" in texts, "the mistake suggests the key"
        lines = [output for output in shown if "epoch 1/1" in output.get("data", {}).get("text/plain", "")]
        assert len(lines) <= 1, "one line that changes"
