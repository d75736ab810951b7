"""Opening 100,000 images: the first time, and again from the index.

python scripts/bench_open.py [--rounds 3] [--dry]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from measure import Row, Section, run
from PIL import Image

IMAGES, OBJECTS, CLASSES = 100_000, 7, 80
HEIGHT, WIDTH = 48, 64
LINKS = 30_000  # names of one file; file systems allow some more
TEXT = f"""
A COCO set of {IMAGES:,} training and {IMAGES // 20:,} validation images, {OBJECTS} boxes each, opened by a process of
its own: categories, both splits, and the checks before a training (`data.check`: the header of every image, and where
they were found correct before, whether a file has changed). What a process needs for its imports is left out. The files
are small ones in the cache of the system, so what is measured is work and not the disk. "First" is with an empty cache
folder. Before there was an index (commit cd146c7) the first opening took 4.54 s and 630 MB beside
2.14 s and 92 MB: 2.12 times as fast now (2026-11-29, commit fffc715 and the pause of the garbage collector after it, on
two loaded cores of an Intel Xeon with AMX, both commits in turns, medians of 5).
"""


def write_set(root: Path) -> None:
    """Small images under many names, and their annotations."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("valid", IMAGES // 20)):
        folder = root / split
        folder.mkdir(parents=True)
        for i in range(count):
            path = folder / f"{i:012d}.jpg"
            if i % LINKS:
                os.link(folder / f"{i - i % LINKS:012d}.jpg", path)
            else:
                Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
        names = [{"id": i + 1, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(count)]
        sides = rng.uniform(3, 30, (count * OBJECTS, 2))
        boxes = np.concatenate([rng.random(sides.shape) * ((WIDTH, HEIGHT) - sides), sides], 1).round(2).tolist()
        objects = [
            {
                "id": i + 1,
                "image_id": i // OBJECTS + 1,
                "category_id": i % CLASSES + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, box in enumerate(boxes)
        ]
        classes = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)]
        content = {"images": names, "annotations": objects, "categories": classes}
        (folder / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")


def memory(name: str) -> float:
    """Megabytes of this process, by their name in `/proc/self/status`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) / 1000 if found else float("nan")


def open_set(root: str) -> None:
    """Open, and write what that took; in a process of its own."""
    import torch

    from detr_exp import build
    from detr_exp.data import coco, loader, shapes, voc, yolo  # noqa: F401 - imports are not measured

    torch.set_num_threads(1)
    cfg = build.compose(["data=coco", f"data.root={root}"])
    before, start = memory("VmRSS"), time.process_time()
    data = build.data(cfg)
    if (count := len(data.train) + len(data.val or ())) != IMAGES + IMAGES // 20:
        raise RuntimeError(f"{count} images were opened")
    opened, kept = time.process_time() - start, memory("VmRSS") - before
    data.check()
    found = {"open": opened, "check": time.process_time() - start, "memory": kept}
    found |= {"after": memory("VmRSS") - before, "peak": memory("VmHWM") - before}
    print(json.dumps(found))


def bench(rounds: int) -> Section:
    with tempfile.TemporaryDirectory(prefix="bench_open-") as folder:
        write_set(Path(folder) / "set")
        time.sleep(3)  # what has changed just now is not trusted
        first, again = [], []
        for turn in range(rounds):
            cache = str(Path(folder) / f"cache{turn}")
            for found in (first, again):
                command = [sys.executable, __file__, "--open", str(Path(folder) / "set")]
                done = subprocess.run(
                    command, env={**os.environ, "XDG_CACHE_HOME": cache}, check=True, capture_output=True, text=True
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
    of_first, of_again = ({name: median(one[name] for one in found) for name in found[0]} for found in (first, again))
    return Section(
        f"Opening {IMAGES:,} images",
        [
            Row("first: CPU seconds", of_first["open"], detail=f"{of_first['check']:.2f} s with checks"),
            Row("first: peak memory, MB", of_first["peak"], detail=f"{of_first['after']:.0f} MB afterwards"),
            Row("again: CPU seconds", of_again["open"], gate=1, detail=f"{of_again['check']:.2f} s with checks"),
            Row("again: CPU seconds with checks", of_again["check"]),
            Row(
                "again: memory, MB", of_again["memory"], gate=150, detail=f"{of_again['peak']:.0f} MB peak with checks"
            ),
        ],
        text=TEXT,
        packages=("torch", "numpy"),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--open"]:
        open_set(sys.argv[2])
    else:
        sys.exit(run("open", bench, __doc__, rounds=3))
