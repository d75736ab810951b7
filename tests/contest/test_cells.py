"""The proof suite with programs that train nothing: what is done, what is repeated, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_exp import proof
from detr_exp.contest.job import ANNOTATIONS
from tests.contest.conftest import BOX

# as any program may be written: it knows the files, and nothing of this project
PROGRAM = """
import json, pathlib, sys
job = json.load(open(sys.argv[1]))
folder, options = pathlib.Path(job["folder"]), job["options"]
with open(options["log"], "a") as log:
    log.write(f"{folder.parent.name}/{folder.name} {job['epochs']}\\n")
if job["seed"] == options.get("fails"):
    sys.exit("no such luck")
held_out = json.load(open(f"{job['root']}/held_out/ANNOTATIONS"))
x, y, w, h = options["box"]
found = [
    {"image_id": image["id"], "category_id": 3, "bbox": [x + job["seed"] * options["scatter"], y, w, h], "score": 0.5}
    for image in held_out["images"]
]
(folder / "run").mkdir()
(folder / "run" / "weights").write_text("large")
json.dump(found, open(folder / "detections.json", "w"))
facts = {"cpu_seconds": 2 + 3 * job["epochs"], "steps": job["epochs"], "parameters": 5}
json.dump(facts, open(folder / "facts.json", "w"))
"""
Suite = Callable[..., int]


@pytest.fixture
def suite(command: Callable[..., int], squares: Path, tmp_path: Path) -> Suite:
    """The command with one set of squares and two contenders: one finds every square, the other one none."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("ANNOTATIONS", ANNOTATIONS))

    def run(*words: str, good: str = "", folds: str = "null") -> int:
        common = "program:'python program.py'"
        log = f"log:{tmp_path}/log"
        return command(
            proof.main,
            f"+sets.squares={{root:{squares},folds:{folds}}}",
            f"+contenders.good={{{common},options:{{{log},box:{BOX},scatter:0{good}}}}}",
            f"+contenders.bad={{{common},options:{{{log},box:[30,20,5,5],scatter:0}}}}",
            "only=[squares,good,bad]",
            "budget=20",
            "resamples=40",
            "reference=good",
            "page=page.md",
            "results=cells",
            *words,
        )

    return run


def trained(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def test_every_cell_is_trained_once_for_the_epochs_that_fit(suite: Suite, tmp_path: Path) -> None:
    assert suite("seeds=[0,1]") == 0
    done = trained(tmp_path)
    assert [line.split()[1] for line in done if "good-rehearsal" in line] == ["1", "2"]
    assert {line.split()[1] for line in done if "rehearsal" not in line} == {"6"}, "2 s + 6 x 3 s are 20 s"
    assert len(done) == 2 * (2 + 2), "a rehearsal and two seeds of two contenders"
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()}
    assert set(cells) == {f"squares-{name}-{seed}" for name in ("good", "bad") for seed in (0, 1)}
    assert (cells["squares-good-0"]["mAP"], cells["squares-bad-0"]["mAP"]) == (1, 0)
    assert cells["squares-good-1"]["epochs"] == 6
    assert not list((tmp_path / "outputs").rglob("weights")), "what is large is not kept"
    assert suite("seeds=[0,1,2]") == 0
    assert len(trained(tmp_path)) == len(done) + 2, "only the new seed, without another rehearsal"
    page = (tmp_path / "page.md").read_text()
    assert "| bad | 3 | 0.000 | 0.000 .. 0.000" in page
    assert page.count("bad has learned nothing") == 1


def test_epochs_may_be_given_in_place_of_a_budget(suite: Suite, tmp_path: Path) -> None:
    assert suite("seeds=[0]", "epochs=3") == 0
    assert [line.split()[1] for line in trained(tmp_path)] == ["3", "3"], "without a rehearsal"
    page = (tmp_path / "page.md").read_text()
    assert "with the same number of epochs. Each training has 3 epochs, one thread" in page
    assert suite("seeds=[0,1]") == 2, "not beside cells of a budget"


def test_a_stopped_suite_resumes_with_the_same_command(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert suite("seeds=[0,1]", good=",fails:1") == 2
    said = capsys.readouterr().err
    assert "squares-good-1" in said
    assert "no such luck" in said
    done = len(trained(tmp_path))
    (tmp_path / "cells" / "squares-bad-0.json").unlink()  # its trainings are in the working folder
    assert suite("seeds=[0]", good=",fails:1") == 0
    assert len(trained(tmp_path)) == done
    assert suite("seeds=[0,1]", "minutes=0", good=",fails:1") == 0, "no further cell is started"
    assert len(trained(tmp_path)) == done


def test_all_images_of_all_folds_are_scored_together(suite: Suite, tmp_path: Path) -> None:
    assert suite("seeds=[0]", folds="5") == 0
    cell = json.loads((tmp_path / "cells" / "squares-good-0.json").read_text())
    assert (cell["images"], cell["mAP"], cell["epochs"], cell["steps"]) == (10, 1, 1, 5)
    assert cell["cpu_seconds"] == 5 * 5
    assert len([line for line in trained(tmp_path) if "good-0" in line]) == 5


def test_results_of_other_settings_or_versions_are_not_mixed(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert suite("seeds=[0]") == 0
    done = len(trained(tmp_path))
    assert suite("seeds=[0,1]", good=",more:1") == 2
    assert "this command has options" in capsys.readouterr().err
    assert len(trained(tmp_path)) == done, "refused before anything is trained"
    path = tmp_path / "cells" / "squares-good-0.json"
    cell = json.loads(path.read_text())
    cell["conditions"]["cpu"] = "another machine"
    path.write_text(json.dumps(cell))
    assert suite("seeds=[0]", "train=false") == 2
    assert "has cpu" in capsys.readouterr().err
    assert suite("seeds=[0]", "train=false", "may_differ=[cpu]") == 0
    assert "differ in cpu: " in (tmp_path / "page.md").read_text()


def test_the_page_says_what_was_trained_otherwise_than_is_configured_now(suite: Suite, tmp_path: Path) -> None:
    assert suite("seeds=[0]", good=",gentle:{a:1}") == 0
    assert " was trained with " not in (tmp_path / "page.md").read_text()
    assert suite("seeds=[0]", "train=false", good=",gentle:{a:2},more:3") == 0
    said = "*good* was trained with `gentle.a=1`, where the configuration now has `gentle.a=2`, `more=3`."
    assert said in (tmp_path / "page.md").read_text()


def test_detections_of_unknown_images_are_refused(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    program = tmp_path / "program.py"
    program.write_text(program.read_text().replace('image["id"], "cat', '99, "cat'))
    assert suite("seeds=[0]") == 2
    assert "a detection is of image 99" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    suite: Suite, capsys: pytest.CaptureFixture
) -> None:
    assert suite("seeds=[0]", "+contenders.good.packages=[no_such_package]") == 2
    assert "contenders.good needs no_such_package" in (said := capsys.readouterr().err)
    assert "pip install -e '.[proof]'" in said


def test_only_names_what_there_is(suite: Suite, capsys: pytest.CaptureFixture) -> None:
    assert suite("only=[sqares]") == 2
    assert "only names sqares; there are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "cells", "page"),
    [((), "proof", "proof.md"), (("epochs=14",), "proof/epochs", "proof_epochs.md")],
    ids=["budget", "epochs"],
)
def test_the_pages_in_docs_are_those_of_the_cells_in_docs(
    command: Callable[..., int], tmp_path: Path, words: tuple[str, ...], cells: str, page: str
) -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert command(proof.main, *words, "train=false", f"results={docs / cells}", "page=page.md") == 0
    assert (tmp_path / "page.md").read_text() == (docs / page).read_text(), "python -m detr_exp.proof train=false"
