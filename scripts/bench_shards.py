"""Training samples from shards beside those from files: in a folder, and with 20 ms of latency for every read.

python scripts/bench_shards.py [--rounds 7] [--dry]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench_data import IMAGES, SIDE, folder_of
from measure import Row, Section, beside, interleaved, run

from detr_exp import build
from detr_exp.data.sampler import Key
from detr_exp.data.shard_writing import write_shards
from detr_exp.data.shards import Place
from detr_exp.data.table import TableSplit

LATENCY, WORKERS, MANY = 0.02, 2, 480
TEXT = f"""
{IMAGES} images of 640 x 480 pixels with the training pipeline of `data/augment=rtdetr`, from JPEG files and from shards
of the same files. The first row is CPU time of this process. The second is the time on the wall of {WORKERS} loader
workers for epochs of {MANY} images: shards at an address whose every read takes {1000 * LATENCY:.0f} ms longer, beside
files in a folder. Each is a ratio of times: 1.05 is a throughput of 0.95.
"""


def samples(words: list[str]) -> Any:
    cfg = build.compose([*words, "data/augment=rtdetr", "data.num_workers=0"])
    network = SimpleNamespace(image_size=(SIDE, SIDE), stride=32, tasks=("boxes",))
    return build.data(cfg).loader("train", network=network, batch_size=1, seed=0, training=True).dataset


def seconds_of(words: list[str]) -> float:
    """Seconds on the wall of two epochs by workers that are there already."""
    cfg = build.compose([*words, "data/augment=rtdetr", f"data.num_workers={WORKERS}"])
    network = SimpleNamespace(image_size=(SIDE, SIDE), stride=32, tasks=("boxes",))
    loader = build.data(cfg).loader("train", network=network, batch_size=4, seed=0, training=True)
    ends = []
    for _ in range(3):
        for _ in loader:
            pass
        ends.append(time.perf_counter())
    return ends[2] - ends[0]


def slow_read(self: Place, name: str, start: int, length: int) -> bytes:
    time.sleep(LATENCY)
    return read(self, name, start, length)


read = Place.read


def pair(folder: Path, count: int) -> tuple[list[str], Path]:
    """Overrides of a set of files, and the folder of its shards."""
    files, shards = folder / "files", folder / "shards"
    folder_of(files, [(480, 640)] * count)
    shards.mkdir()
    words = ["data=coco", f"data.root={files}"]
    split = build.data(build.compose(words)).train
    assert isinstance(split, TableSplit)
    write_shards(split, "train", shards, 10**6, lambda line: None)
    return words, shards


def bench(rounds: int) -> Section:
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        files, shards = pair(Path(few), IMAGES)
        ours, theirs = samples(["data=shards", f"data.root={shards}"]), samples(files)
        keys = [Key(0, i, SIDE, SIDE) for i in range(IMAGES)]
        calls = {"shards": lambda: ours.__getitems__(keys), "files": lambda: theirs.__getitems__(keys)}
        local = beside("shards in a folder", interleaved(calls, rounds), "shards", "files", gate=1 / 0.95)
        files, shards = pair(Path(many), MANY)
        afar = ["data=shards", f"data.root=file://{shards}"]
        Place.read = slow_read  # type: ignore[method-assign]
        ratios = [seconds_of(afar) / seconds_of(files) for _ in range(rounds)]
        Place.read = read  # type: ignore[method-assign]
    far = Row(f"shards {1000 * LATENCY:.0f} ms away", statistics.median(ratios), "files in a folder", gate=1 / 0.95)
    return Section("Shards", [local, far], text=TEXT, packages=("fsspec",))


if __name__ == "__main__":
    sys.exit(run("shards", bench, __doc__))
