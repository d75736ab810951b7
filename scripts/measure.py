"""How the bench scripts measure, judge and write down: `scripts/bench_<name>.py` is a function and one line.

    def bench(rounds: int) -> Section:
        times = interleaved({"ours": ours, "peer": theirs}, rounds)
        return Section("Matching", [beside("7 layers", times, gate=0.10)], text="What was compared, and how.")

    if __name__ == "__main__":
        sys.exit(run("matcher", bench, __doc__))

Contenders take turns in one process with one thread, and only CPU time counts, so that other work on the machine does
not. A ratio is the median of the rounds' ratios. `run` prints the section, writes it into `docs/performance.md` in
place of the one before (`--dry` leaves the page alone) and returns 1 where a gate is missed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}  # before anything with threads is imported

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
ORDER = (
    *("steps", "checkpointing", "criterion", "matcher", "deformable", "open", "data", "shards", "evaluation"),
    *("inference", "start", "sweep", "many_runs", "tracking", "profile", "gpu"),
)
HEAD = """\
# Performance

How long things take beside others who do the same, on the machine that each part names. Written by `make bench`, which
runs `scripts/bench_*.py` and fails where a gate is missed; each script can be run alone. A ratio is our time divided by
theirs: below 1 we are faster. Both take turns in one process with one thread, and what is compared is CPU time, the
median of the rounds, so that other work on the machine counts for neither. Milliseconds are for orientation.
"""


@dataclass(frozen=True)
class Row:
    """One measured number; lower is better.

    Attributes:
        part: what was measured.
        value: a ratio, a share or a count; NaN: not measured, as `skipped` says.
        peer: beside what; empty for a count.
        gate: the largest value that is fine; None: only shown.
        detail: the numbers behind it, e.g. "12.1 / 30.3 ms".
        skipped: why the gate does not count on this machine.
        fault: what makes it a miss whatever the value, e.g. that results differ.
    """

    part: str
    value: float
    peer: str = ""
    gate: float | None = None
    detail: str = ""
    skipped: str = ""
    fault: str = ""

    @property
    def is_missed(self) -> bool:
        return bool(self.fault) or (self.gate is not None and not self.skipped and not self.value <= self.gate)

    @property
    def verdict(self) -> str:
        if self.is_missed:
            return f"MISSED: {self.fault}" if self.fault else "MISSED"
        return f"not judged: {self.skipped}" if self.skipped else ("ok" if self.gate is not None else "")

    def cells(self) -> list[str]:
        gate = "" if self.gate is None else f"<= {number(self.gate, 2)}"
        return [self.part, number(self.value), self.peer, gate, self.verdict, self.detail]


@dataclass(frozen=True)
class Section:
    """A part of the page: its rows, what a reader should know, and packages whose versions matter.

    `made_by` stands in place of the line about command, date and device, where that of `run` would be wrong.
    """

    title: str
    rows: Sequence[Row]
    text: str = ""
    packages: Sequence[str] = field(default=("torch",))
    made_by: str = ""


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """CPU seconds of each call in each round; every round calls all of them once, in turn.

    Args:
        prepare: called before the call of the same name, and not timed.
    """
    for call in list(calls.values()) * warmup:
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if prepare is not None and name in prepare:
                prepare[name]()
            gc.collect()
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return times


def memory_as_it_comes() -> None:
    """Undo what `keep_freed_memory` did to this process: what glibc adapts itself to where tensors are large."""
    import ctypes

    from detr_exp.trainer.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

    allocator = ctypes.CDLL(None)
    for setting, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20)):
        allocator.mallopt(setting, value)
    allocator.malloc_trim(0)


def ratio(times: Mapping[str, Sequence[float]], ours: str = "ours", peer: str = "peer") -> float:
    """Median over the rounds of our time divided by the peer's."""
    return median(one / other for one, other in zip(times[ours], times[peer], strict=True))


def beside(
    part: str, times: Mapping[str, Sequence[float]], ours: str = "ours", peer: str = "peer", **of_row: object
) -> Row:
    """The row that compares two contenders of `interleaved`; `of_row` are further fields of `Row`.

    Without a value where ours did not take part."""
    if ours not in times:
        return Row(part, math.nan, peer, **of_row)  # type: ignore[arg-type]
    detail = f"{median(times[ours]) * 1e3:.4g} / {median(times[peer]) * 1e3:.4g} ms"
    return Row(part, ratio(times, ours, peer), peer, detail=detail, **of_row)  # type: ignore[arg-type]


def run(name: str, bench: Callable[[int], Section], doc: str | None, rounds: int = 7) -> int:
    """Measure, print, write the section `name` of the page; the exit status."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--dry", action="store_true", help="leave docs/performance.md as it is")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    section = bench(arguments.rounds)
    print(section.title)
    for row in section.rows:
        part, value, peer, gate, verdict, detail = row.cells()
        print(
            f"  {part:<58} {value:>6} {gate:>8}  {verdict:<7} {detail}{f' beside {peer}' if peer else ''}", flush=True
        )
    if section.text:
        print(section.text)
    if not arguments.dry:
        write(name, section, arguments.rounds)
    return int(any(row.is_missed for row in section.rows))


def write(name: str, section: Section, rounds: int) -> None:
    """Put the section into the page and make the table at its top anew."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    sections = dict(re.findall(r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->", page, flags=re.DOTALL))
    sections[name] = "\n".join(
        [
            f"## {section.title}\n",
            table(["part", "ratio or count", "beside", "gate", "", "behind it"], [row.cells() for row in section.rows]),
            *([f"{section.text.strip()}\n"] if section.text else []),
            f"{section.made_by or provenance(name, section.packages, rounds)}\n",
        ]
    )
    names = sorted(sections, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    blocks = [f"<!-- begin {n} -->\n{sections[n]}<!-- end {n} -->\n" for n in names]
    PAGE.write_text("\n".join([HEAD, summary([sections[n] for n in names]), *blocks]), encoding="utf-8")


def summary(sections: Sequence[str]) -> str:
    """All judged rows of all sections, each with a link to its own."""
    rows = []
    for text in sections:
        title = text.partition("\n")[0].removeprefix("## ")
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        first = text.partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]
        parts = [[cell.strip() for cell in line.strip("|").split("|")] for line in first]
        rows += [[f"[{title}](#{anchor})", *cells[:5]] for cells in parts if cells[3]]
    return table(["", "part", "ratio or count", "beside", "gate", ""], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["--:" if cell == "ratio or count" else "---" for cell in head], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "-"
    if value >= 10 or value in (0, 1):
        return f"{value:.0f}"
    return f"{value:.{digits}f}" if value >= 0.01 else f"{value:.1g}"


def provenance(name: str, packages: Sequence[str], rounds: int) -> str:
    """Command, date, commit, device and versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"`python scripts/bench_{name}.py`, {rounds} rounds, {datetime.date.today()}, commit {commit()}; "
        f"{device()}; Python {platform.python_version()}, {versions}."
    )


def commit() -> str:
    """The short hash of the commit that is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=PAGE.parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def device() -> str:
    """The processor, as far as the system tells, and that one thread was used."""
    import torch

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    name = found[1].strip() if found else platform.processor()
    units = [("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()), ("AMX", torch.cpu._is_amx_tile_supported())]
    traits = ", ".join(unit if there else f"no {unit}" for unit, there in units)
    return f"{os.cpu_count()}-core {name} ({traits}), one thread"


def is_of_the_newer_gates() -> bool:
    """Whether this processor has AVX-512 without AMX and is AMD's, for which gates of their own are meant."""
    from detr_exp.ops import products

    return products.fastest() == "onednn"


def why_bf16_is_not_judged() -> str:
    """Empty where the processor multiplies bfloat16 in a way for which there are gates."""
    import torch

    if is_of_the_newer_gates():
        return "" if torch.cpu._is_avx512_bf16_supported() else "this CPU has no AVX512-BF16"
    return "" if torch.cpu._is_amx_tile_supported() else "this CPU has no AMX"
