"""Shards beside the files they were made of: the same samples, whoever reads them, and damage that is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import kill_and_resume
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from detr_exp import build, shard
from detr_exp.config.compose import compose
from detr_exp.data import index
from detr_exp.data.content import Category
from detr_exp.data.dataset import DataSet
from detr_exp.data.image import ImageError
from detr_exp.data.part import Part
from detr_exp.data.shards import KEY, OWN, Place, ShardSplit
from detr_exp.data.tiles import TiledSplit, Tiles

NETWORK = SimpleNamespace(image_size=(64, 64), stride=32, tasks=("boxes", "masks"))
COUNT = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A set of JPEG files that are decoded at a smaller scale, one of them turned, and a PNG."""
    root = tmp_path_factory.mktemp("files")
    for split, count in (("train", COUNT), ("valid", 3)):
        (root / split).mkdir()
        rng = np.random.default_rng(count)
        images, annotations = [], []
        for i in range(count):
            name = f"image {i}.{'png' if i == 2 else 'JPG'}"
            pixels = np.kron(rng.integers(0, 256, (20, 30, 3)), np.ones((12, 12, 1))).astype(np.uint8)
            image, exif = Image.fromarray(pixels), Image.Exif()
            if i == 3:
                exif[0x0112] = 6
            image.save(root / split / name, exif=exif)
            width, height = (240, 360) if i == 3 else (360, 240)
            images.append({"id": 7 * i + 1, "file_name": name, "width": width, "height": height})
            box = [20 + i, 30, 100, 90]
            outline = [[box[0], 30, box[0] + 100, 30, box[0] + 50, 120]]
            own = {"id": i, "image_id": 7 * i + 1, "category_id": 4 + i % 2, "bbox": box, "segmentation": outline}
            annotations += [own] * (i != 5)
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 4, "name": "a"}, {"id": 5, "name": "b c"}]
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def written(files: Path, out: Path, megabytes: float = 0.05) -> Path:
    shard.shard(compose([f"data.root='{files}'", f"out='{out}'", f"megabytes={megabytes}"], config_name="shard"))
    return out


@pytest.fixture
def shards(files, tmp_path) -> Path:
    return written(files, tmp_path / "shards")


def opened(root: Path | str, layout: str = "shards") -> DataSet:
    return build.data(compose([f"data={layout}", f"data.root='{root}'", "data.num_workers=0"]))


def samples(data: DataSet, *, workers: int = 0, training: bool = True, start: int = 0, **ranks: int) -> list:
    data.loading.num_workers = workers
    loader = data.loader("train", network=NETWORK, batch_size=2, seed=3, training=training, **ranks)
    if training:
        loader.batch_sampler.set_epoch(1)
        loader.batch_sampler.set_start(start)
    return [
        (batch.image_ids, batch.images, batch.targets.boxes, batch.targets.labels, batch.targets.masks)
        for batch in loader
    ]


def same(first: list, second: list) -> bool:
    pairs = [pair for one, other in zip(first, second, strict=True) for pair in zip(one, other, strict=True)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_they_are_tar_files_with_the_files_as_they_were(files, shards) -> None:
    import tarfile

    names = sorted(path.name for path in shards.iterdir())
    assert len([name for name in names if name.startswith("train-")]) > 2
    found = {}
    for path in sorted(shards.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    assert found["000000003.jpg"] == (files / "train" / "image 3.JPG").read_bytes()
    assert len(found) == COUNT


def test_the_same_samples_as_from_files(files, shards) -> None:
    plain, packed = opened(files, "auto"), opened(shards)
    packed.check()
    assert packed.classes == plain.classes
    assert packed.fingerprint == plain.fingerprint
    assert packed.train.truth() == plain.train.truth()
    whole = samples(plain)
    assert same(samples(packed), whole)
    assert same(samples(packed, training=False), samples(plain, training=False))
    assert same(samples(packed, start=2), whole[2:])  # in the middle of a shard
    ranks = [samples(packed, rank=rank, world_size=2) for rank in range(2)]
    assert [ids for ids, *_ in ranks[0]] == [ids for ids, *_ in samples(plain, rank=0, world_size=2)]
    assert same(ranks[1], samples(plain, rank=1, world_size=2))


def test_workers_read_the_same(files, shards) -> None:
    data = opened(shards)
    assert same(samples(data, workers=1, start=1), samples(data, start=1))
    copy = pickle.loads(pickle.dumps(data.train))
    assert (copy.image(4) == data.train.image(4)).all()


def test_an_interrupted_writing_keeps_complete_shards(files, shards) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards.glob("*.tar")}
    (shards / "train.index").unlink()
    (shards / "train-00001.tar").unlink()
    cut = shards / "train-00002.tar"
    cut.write_bytes(cut.read_bytes()[:-2000])
    written(files, shards)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards.glob("*.tar")}
    assert {name for name in after if after[name][0] != before[name][0]} == {"train-00001.tar", "train-00002.tar"}
    assert {name: one[1] for name, one in after.items()} == {name: one[1] for name, one in before.items()}


def test_a_lost_or_cut_shard_is_named(shards) -> None:
    (shards / "train-00001.tar").unlink()
    cut = shards / "train-00000.tar"
    cut.write_bytes(cut.read_bytes()[:-512])
    with pytest.raises(
        ValueError, match=r"(?s)train-00000\.tar has \d+ bytes instead of \d+.*train-00001\.tar is lost"
    ):
        opened(shards).check()


def test_a_damaged_shard_is_named_when_it_is_read(shards) -> None:
    data = opened(shards)
    split = data.train
    assert isinstance(split, ShardSplit)
    path = shards / split.names[int(split.where["shard"][4])]
    content = bytearray(path.read_bytes())
    content[int(split.where["offset"][4]) + 700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"{path.name}/image 4\.JPG: shard {path.name} is damaged at byte"):
        split.image(4)
    path.unlink()
    with pytest.raises(ImageError, match=rf"shard {path.name} cannot be read"):
        split.image(4)


def test_an_address_gives_the_same_and_its_reads_overlap(files, shards, monkeypatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    memory.put(f"{shards}/", "/bucket/set/", recursive=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    data = opened("memory://bucket/set")
    assert same(samples(data), samples(opened(files, "auto")))
    asked = []
    monkeypatch.setattr(
        ShardSplit, "content", lambda self, i, read=ShardSplit.content: asked.append(i) or read(self, i)
    )
    loader = data.loader("train", network=NETWORK, batch_size=4, seed=0, training=True)
    keys, following = loader.batch_sampler
    found = loader.dataset.__getitems__(keys)
    assert [one.image_id for one in found] == [data.train.image_ids[key.image] for key in keys]
    wait([*data.train._coming.values()])
    assert sorted(asked) == sorted(key.image for key in keys + following)  # once each, the next batch's, too
    loader.dataset.__getitems__(following)
    assert len(asked) == 8
    memory.rm("/bucket/set/train-00001.tar")
    with pytest.raises(ValueError, match=r"train-00001\.tar is lost"):
        opened("memory://bucket/set").check()


@pytest.mark.parametrize("more", [[], ["data.tiles={size: 200}"]], ids=["whole", "tiles"])
def test_cached_images_are_not_read_again(shards, monkeypatch, more) -> None:
    words = ["data=shards", f"data.root='file://{shards}'", "data.num_workers=0", "data.cache=ram", *more]
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    data = build.data(compose(words))
    first = samples(data)
    wait([*data.train._coming.values()])
    monkeypatch.setattr(ShardSplit, "content", lambda self, index: pytest.fail(f"image {index} is read again"))
    assert same(samples(data), first)


def test_samples_of_several_images_are_read_ahead_as_well(files, shards, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    words = ["data=shards", f"data.root='file://{shards}'", "data.num_workers=0", "data.augment.mosaic=1"]
    loader = build.data(compose(words)).loader("train", network=NETWORK, batch_size=2, seed=0, training=True)
    split, (keys, *_) = loader.dataset.split, loader.batch_sampler
    monkeypatch.setattr(ShardSplit, "ahead", lambda self, indices: ahead.extend(indices))
    monkeypatch.setattr(split, "image", lambda index, smallest, read=split.image: used.append(index) or read(index))
    ahead, used = [], []
    loader.dataset.image = split.image
    loader.dataset.__getitems__(list(keys))
    assert ahead == used
    assert len(used) == 8


def test_tiles_and_parts_are_the_same_and_pass_on_what_is_used_next(files, shards, monkeypatch) -> None:
    words = ["data.num_workers=0", "data.tiles={size: 200}"]
    one, other = (
        build.data(compose([f"data={layout}", f"data.root='{root}'", *words]))
        for layout, root in (("shards", shards), ("auto", files))
    )
    assert same(samples(one), samples(other))
    asked: list[list[int]] = []
    monkeypatch.setattr(ShardSplit, "ahead", lambda self, indices: asked.append(list(indices)))
    Part(one.train, [4, 2]).ahead([1, 0])
    TiledSplit(one.train, Tiles((200, 200))).ahead([0, 1, 2, 5])
    assert asked == [[2, 4], [0, 1]]


class Ranged(SimpleHTTPRequestHandler):
    """A web server's answers to requests for parts of files."""

    refuses = False

    def log_message(self, *words: object) -> None:
        """Stay quiet."""

    def send_head(self) -> BinaryIO | None:
        if self.refuses:
            self.send_error(403)
            return None
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().send_head()
        part = path.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)


def served(root: Path, answers: type[SimpleHTTPRequestHandler]) -> tuple[ThreadingHTTPServer, str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(answers, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_a_web_server_gives_the_same(files, shards, monkeypatch) -> None:
    pytest.importorskip("aiohttp", reason="pip install aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    server, address = served(shards.parent, Ranged)
    place = f"{address}/{shards.name}"
    data = opened(place)
    data.check()
    assert same(samples(data), samples(opened(files, "auto")))
    monkeypatch.setattr(Ranged, "refuses", True)
    with pytest.raises(ImageError, match=r"shard train-0000.\.tar cannot be read \(.*403"):
        data.train.image(0)
    with pytest.raises(ValueError, match=r"which cannot be listed \(.*403.*data\.root="):
        opened(place)
    server.shutdown()
    server.server_close()


def test_a_web_server_without_ranges_is_named(shards, monkeypatch) -> None:
    pytest.importorskip("aiohttp", reason="pip install aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards.parent / "cache"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *words: None)
    server, address = served(shards, SimpleHTTPRequestHandler)
    with pytest.raises(ImageError, match="a server needs byte ranges"):
        opened(address).train.image(0)
    server.shutdown()
    server.server_close()


def test_what_is_no_set_of_shards_is_refused(files, shards, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no train\.index \(found: nothing\); write shards"):
        opened(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"data\.root is '/nowhere', which cannot be listed"):
        opened("/nowhere")
    with pytest.raises(ValueError, match=r"data\.root is 'nosuch://bucket', which this installation cannot read"):
        opened("nosuch://bucket")
    index = shards / "train.index"
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.index is damaged, or of another version"):
        opened(shards)
    with pytest.raises(ValueError, match=r"data=shapes has no files of one folder to write"):
        shard.shard(compose(["data=shapes", f"out={tmp_path}/x"], config_name="shard"))


def test_an_image_that_is_gone_is_named(files, tmp_path) -> None:
    from detr_exp.data.shard_writing import write_shards

    table = opened(files, "auto").split("val")
    table.paths.data = np.frombuffer(table.paths.data.tobytes().replace(b"image 1", b"image x"), np.uint8)
    with pytest.raises(ValueError, match=r"image x\.JPG cannot be read \(No such file"):
        write_shards(table, "val", tmp_path, 10**6, lambda line: None)


def test_places_cross_processes() -> None:
    place = pickle.loads(pickle.dumps(Place("memory://x/y/")))
    assert (place.root, place.is_remote) == ("memory://x/y", True)


# ----------------------------------------------------------------------------------------------------- a million images

MILLION, PER_IMAGE = 10**6, 3
OPENING = """
import json, sys, time, psutil
from types import SimpleNamespace
from detr_exp import build
from detr_exp.data import loader, shards  # imports are not measured
cfg = build.compose(["data=shards", f"data.root={sys.argv[1]}", "data.num_workers=0"])
before, start = psutil.Process().memory_info().rss, time.process_time()
data = build.data(cfg)
network = SimpleNamespace(image_size=(64, 64), stride=32, tasks=("boxes",))
batches = data.loader("train", network=network, batch_size=8, seed=0, training=True)
opened = time.process_time() - start
keys = next(iter(batches.batch_sampler))
objects = [len(data.train.objects(key.image)) for key in keys]
memory = psutil.Process().memory_info().rss - before
print(json.dumps([opened, memory / 1e6, len(data.train), objects]))
"""


@pytest.mark.slow
def test_a_million_images_open_in_two_seconds_and_200_megabytes(tmp_path) -> None:
    """The index of a rank; with the first batch of a shuffled epoch."""
    rng = np.random.default_rng(0)
    names = "".join(f"{i:012d}.jpg" for i in range(MILLION)).encode()
    count = MILLION * PER_IMAGE
    columns = {
        "ids": np.arange(MILLION),
        "sizes": np.full((MILLION, 2), 480),
        "starts": np.arange(0, count + 1, PER_IMAGE),
        "boxes_xywh": rng.random((count, 4)) * 200 + 1,
        "category": np.ones(count, np.int64),
        "number": np.arange(count),
        "crowd": np.zeros(count, bool),
        "area": np.full(count, 100.0),
        "paths": np.frombuffer(names, np.uint8),
        "path_ends": np.arange(16, 16 * MILLION + 1, 16),
        **{name: np.arange(MILLION) for name in OWN},
    }
    columns["shard"] = np.arange(MILLION) // (MILLION // 2)
    tars = [{"name": f"train-{i:05d}.tar", "bytes": 1 << 40} for i in range(2)]
    values = {"key": KEY, "shards": tars, "fingerprint": "0", "account": ""}
    values["categories"] = [asdict(Category(1, "a"))]
    with open(tmp_path / "train.index", "wb") as file:
        index.filling(values, columns)(file)
    for tar in tars:
        with open(tmp_path / tar["name"], "wb") as file:
            file.truncate(tar["bytes"])  # without content
    done = subprocess.run([sys.executable, "-c", OPENING, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, megabytes, images, objects = json.loads(done.stdout.splitlines()[-1])
    print(f"{seconds:.2f} s of CPU time, {megabytes:.0f} MB")
    assert (images, objects) == (MILLION, [PER_IMAGE] * 8)
    assert seconds < 2
    assert megabytes < 200


# -------------------------------------------------------------------------------------- killed in the middle of a shard

TRAINING = (
    *("trainer/hardware=cpu", "trainer.hardware.amp=null", "trainer.hardware.products=torch", "tracker=none"),
    *("trainer.epochs=2", "trainer.batch_size=1", "trainer.deterministic=true", "trainer.checkpoint_every_steps=1"),
    *("trainer.log_every_steps=1", "trainer.num_pictures=0", "trainer.resume=auto", "trainer.hardware.threads=1"),
    *("trainer.progress_bar=none", "model.image_size=[64,64]", "model.num_queries=20", "model.num_layers=1"),
)


def train_until(step: int | None, folder: Path, words: tuple[str, ...]) -> None:
    """Train; with a step, kill the training and all of its processes by SIGKILL when it has logged that step."""
    call = [sys.executable, "-m", "detr_exp.train", *TRAINING, *words, f"hydra.run.dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log")
    with open(log, "a") as out:
        process = psutil.Popen(call, stdout=out, stderr=subprocess.STDOUT, env=environment)
    metrics = folder / "metrics.jsonl"
    while step is not None and process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if any(json.loads(line).get("step", 0) >= step for line in lines if line.endswith("}")):
            for one in [process, *process.children(recursive=True)]:
                one.kill()
        time.sleep(0.02)
    status = process.wait()
    assert (status == 0) == (step is None), log.read_text()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("data.num_workers=0",), ("data.num_workers=2",), ("data.num_workers=0", "trainer.hardware.devices=2")],
    ids=["no workers", "two workers", "two ranks"],
)
def test_a_training_killed_in_the_middle_of_a_shard_ends_with_the_same_bits(files, tmp_path, words) -> None:
    words = ("data=shards", f"data.root={written(files, tmp_path / 'shards')}", *words)
    shards = sorted((tmp_path / "shards").glob("train-*.tar"))
    assert 1 < len(shards) < COUNT, "several images in one"
    train_until(None, tmp_path / "undisturbed", words)
    train_until(2, tmp_path / "killed", words)
    assert newest_checkpoint(tmp_path / "killed")["batch"] > 0, "in the middle of an epoch"
    train_until(None, tmp_path / "killed", words)
    assert kill_and_resume.compare(tmp_path / "undisturbed", tmp_path / "killed") == []


def newest_checkpoint(folder: Path) -> dict:
    from detr_exp.trainer.checkpoint import NEWEST, load

    return load(folder / NEWEST)
