"""How long a user waits before anything happens: help, a mistake.

    python scripts/bench_start.py

Prints CPU time beside that of `import torch` in the same Python, the median of interleaved rounds; exit status 1 when a
gate is missed.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 7
GATE = 0.25
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "--help": ["-m", "detr_exp.train", "--help"],
    "a mistyped key": ["-m", "detr_exp.train", "loss.focal_gama=2"],
    "a mistyped option": ["-m", "detr_exp.train", "model=rtdetrv3"],
}


def cpu_seconds(words: list[str], folder: str) -> float:
    """CPU time of one process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        rounds = [{name: cpu_seconds(words, folder) for name, words in COMMANDS.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in COMMANDS}
    reference = medians.pop("import torch")
    print(f"start-up, CPU seconds, median of {ROUNDS}; import torch takes {reference:.2f}")
    missed = False
    for name, seconds in medians.items():
        ratio = seconds / reference
        missed |= ratio > GATE
        verdict = "MISSED" if ratio > GATE else "ok"
        print(f"  {name:<18} {seconds:.2f}  {ratio:.2f} of import torch  gate {GATE}  {verdict}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
