"""The script for GPUs: rehearsed on the CPU, what it keeps and what it writes."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
NAMES = ("check_gpu", "gpu_parts", "training_step", "measure")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    import check_gpu
    import measure

    monkeypatch.setattr(measure, "PAGE", tmp_path / "performance.md")
    yield check_gpu
    for name in NAMES:
        sys.modules.pop(name, None)


def test_a_part_that_fails_keeps_the_rows_it_had(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    def half(size: object):
        yield script.Row("first", 0.5, gate=1.0)
        raise RuntimeError("CUDA error: an illegal memory access | was encountered\nsecond line")

    monkeypatch.setitem(script.PARTS, "waits", half)
    script.measured("waits", script.Size("cpu", True, None), tmp_path / "result.json")
    first, second = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (first["part"], first["fault"]) == ("first", "")
    assert second["fault"] == "RuntimeError: CUDA error: an illegal memory access / was encountered"


def test_what_a_part_has_started_ends_with_it(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    alive, part = tmp_path / "alive", tmp_path / "part.py"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    part.write_text(f"import subprocess; subprocess.Popen(['sleep', '60'], stdout=open({str(alive)!r}, 'w')); exit(3)")
    monkeypatch.setattr(script, "__file__", str(part))
    (row,) = script.in_process("ranks", script.Size("cpu", True, None), 60)["rows"]
    assert row["fault"] == "ended with status 3"
    assert select.select([reader], [], [], 20)[0], "still open in a process"
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_the_page_has_the_newest_of_every_part(script: ModuleType, tmp_path: Path) -> None:
    results = {
        part: {"rows": [{"part": f"row of {part}", "value": 0.5}], "made_by": f"{day}, a device"}
        for part, day in (("waits", "Monday"), ("parity", "Friday"), ("steps", "Friday"))
    }
    script.write_page(results)
    page = (tmp_path / "performance.md").read_text()
    assert page.index("row of parity") < page.index("row of waits") < page.index("row of steps")
    assert "parity, steps: Friday, a device; waits: Monday, a device." in page


def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for words, message in (([], "torch sees no CUDA device"), (["--only", "speed"], "--only has 'speed'; use some of")):
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", *words])
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit) as ending:
            script.main()
        assert ending.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    words = ["--rehearse", "--minutes", "60", "--results", str(results)]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "check_gpu.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert list(found) == ["parity", "waits", "steps", "batch_size", "engines", "ranks", "training"]
    assert not [row for part in found.values() for row in part["rows"] if row["fault"]]
