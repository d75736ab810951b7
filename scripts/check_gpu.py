"""What only a GPU can show, in one command and ten minutes; results are written into docs/performance.md.

    python scripts/check_gpu.py --data <BCCD> [--only parity,waits] [--minutes 10] [--dry]
    python scripts/check_gpu.py --rehearse          # the same lines in tiny sizes on the CPU; writes no page

| part | what it measures |
|---|---|
| parity | outputs, loss and gradient norm of the same weights on CPU and GPU, in float32, bf16 and fp16 |
| waits | how often a training step makes the host wait for the device |
| steps | training images/s and peak memory: eager, compiled, in CUDA graphs, beside rfdetr and transformers |
| batch_size | what `trainer.batch_size=auto` chooses, and the memory that a step of it takes |
| engines | inference beside ONNX Runtime (CUDA, TensorRT) |
| ranks | two ranks by gloo on one device against one process |
| training | BCCD to a stated mAP |

Every part is a process of its own, so that one that fails, hangs or loses the device loses no other. Results are kept
in `--results`; `--only` repeats some parts, and the page has the newest of each. Nothing is downloaded: what is not
installed, or not on this machine, is left out with a sentence.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Size, missing, one_rank, sentence
from measure import Row, Section, commit, device, write

SECONDS = {"parity": 60, "waits": 40, "steps": 240, "batch_size": 40, "engines": 60, "ranks": 40, "training": 240}
TEXT = """
A ratio is ours divided by theirs, or what was stated divided by what was reached. Steps are the trainer's own, with
bf16 autocast, four batches in turn with other numbers of objects; the peers get one batch, bf16 autocast and the fused
AdamW, eager and compiled, and the better of the two counts. Times are wall clock, after warm-up.
"""


def in_process(part: str, size: Size, seconds: float) -> dict[str, Any]:
    """The result of a part that is run in a process of its own, for at most `seconds`; of one that ends early, or is
    ended, the rows that it had."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--part", part, "--results", str(result), "--device", size.device]
        command += ["--rehearse"] * size.rehearsal + (["--data", str(size.data)] if size.data else [])
        fault, process = "", subprocess.Popen(command, start_new_session=True)
        try:
            if status := process.wait(seconds):
                fault = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            fault = f"not done within {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # its ranks and loader workers, too, which would share the device
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else described([], size)
    return found | {"rows": found["rows"] + ([asdict(Row(part, math.nan, fault=fault))] if fault else [])}


def measured(part: str, size: Size, result: Path) -> None:
    """Run a part in this process; its rows are in the file as soon as they are measured."""
    rows: list[Row] = []
    try:
        for row in PARTS[part](size):
            rows.append(row)
            result.write_text(json.dumps(described(rows, size)), encoding="utf-8")
    except Exception as error:
        rows.append(Row(part, math.nan, fault=sentence(error)))
    result.write_text(json.dumps(described(rows, size)), encoding="utf-8")


def described(rows: Sequence[Row], size: Size) -> dict[str, Any]:
    """Rows of a part with when, where and on which commit they were measured."""
    return {
        "rows": [asdict(row) for row in rows],
        "made_by": f"{datetime.date.today()}, commit {commit()}; {where_measured(size.device)}",
    }


def where_measured(where: str) -> str:
    import torch

    if where != "cuda":
        return device()
    found = torch.cuda.get_device_properties(0)
    packages = [name for name in ("torch", "transformers", "rfdetr", "onnxruntime") if not missing(name)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages if name != "onnxruntime")
    return (
        f"{found.name} ({found.total_memory / 2**30:.0f} GiB), CUDA {torch.version.cuda}; "
        f"Python {platform.python_version()}, {versions}"
    )


def write_page(results: Mapping[str, Any]) -> None:
    """The newest result of every part, as one section of the page."""
    kept = {part: results[part] for part in PARTS if part in results}
    rows = [Row(**row) for result in kept.values() for row in result["rows"]]
    made: dict[str, list[str]] = {}
    for part, result in kept.items():
        made.setdefault(result["made_by"], []).append(part)
    lines = [f"{', '.join(parts)}: {how}" for how, parts in made.items()]
    section = Section("On a GPU", rows, TEXT, made_by="`python scripts/check_gpu.py`; " + "; ".join(lines) + ".")
    write("gpu", section, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some parts, with commas between")
    parser.add_argument("--data", type=Path, help="the folder of BCCD, in any layout")
    parser.add_argument("--results", type=Path, default=Path("outputs/check_gpu.json"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; writes no page")
    parser.add_argument("--dry", action="store_true", help="leave docs/performance.md as it is")
    parser.add_argument("--device", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    size = Size(given.device or ("cpu" if given.rehearse else "cuda"), given.rehearse, given.data)
    if given.rank:
        one_rank(given.rank, size)
        return 0
    if given.part:
        measured(given.part, size, given.results)
        return 0
    chosen = given.only.split(",") if given.only else list(PARTS)
    if wrong := [part for part in chosen if part not in PARTS]:
        parser.error(f"--only has {wrong[0]!r}; use some of {', '.join(PARTS)}")
    import torch

    if size.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; on a CPU use --rehearse")
    return run_parts(chosen, size, given)


def run_parts(chosen: Sequence[str], size: Size, given: argparse.Namespace) -> int:
    """Run the parts one after another, and keep what they measured after each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the part, too
    until = time.monotonic() + 60 * given.minutes
    results = json.loads(given.results.read_text(encoding="utf-8")) if given.results.exists() else {}
    given.results.parent.mkdir(parents=True, exist_ok=True)
    missed = False
    for part in chosen:
        left = min(SECONDS[part], until - time.monotonic()) if not size.rehearsal else until - time.monotonic()
        if left < 5:
            print(f"{part}: no time left; python scripts/check_gpu.py --only {part}", flush=True)
            missed = True
            continue
        results[part] = in_process(part, size, left)
        given.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
        for row in (Row(**row) for row in results[part]["rows"]):
            name, value, peer, gate, verdict, detail = row.cells()
            print(f"  {name:<62} {value:>7} {gate:>9}  {verdict}  {detail} {peer and f'beside {peer}'}", flush=True)
            missed |= row.is_missed
    if not (size.rehearsal or given.dry):
        write_page(results)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
