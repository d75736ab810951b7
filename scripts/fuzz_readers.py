"""Damage what the readers read, for as long as one likes: nothing may come of it but a refusal in our words.

    python scripts/fuzz_readers.py                        every reader in turn, ten minutes together
    python scripts/fuzz_readers.py coco yolo --seconds 60 these, a minute together

The inputs are those of a sound data set, checkpoint or text, changed by libFuzzer, which follows what of the package
is reached (atheris: `pip install -e '.[fuzz]'`), and by `changed`, which knows JSON. A finding is any exception but a
refusal, twenty seconds for one input, or more than four gigabytes; it is printed with its place, its input is kept in
`outputs/fuzz/`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS, MEGABYTES = 20, 4096  # for one input, and of a process
KEPT = Path("outputs/fuzz")
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, 3e8),
    *(float("nan"), float("inf"), -float("inf"), "", "0", "nan", "a.png", "../../a.png", "/etc/passwd", "no", "1e3"),
    *("\x1b[2J", "\x00", "\udce9", "x" * 5000, "é", "${oc.env:HOME}", "\\${a}", "???", [], [[]], {}, [None] * 100),
    *([1e9] * 7, {"": {}}, {"_target_": "os.system", "command": "false"}, {"_target_": "detr_exp.build.data"}),
]


class Reader(NamedTuple):
    """What is fuzzed.

    Attributes:
        seeds: sound inputs.
        read: takes an input and a folder of its own; raises what it raises.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]


# ----------------------------------------------------------------------------------------------------- data sets


def coco_seeds() -> list[bytes]:
    images = [{"id": n, "file_name": f"{n}.png", "width": 30, "height": 20} for n in (1, 2)]
    categories = [{"id": 3, "name": "cup", "supercategory": "none", "keypoints": ["a", "b"], "skeleton": [[1, 2]]}]
    one = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
    shapes = [
        {"segmentation": [[1, 2, 11, 2, 11, 14]], "keypoints": [2, 3, 2, 0, 0, 0], "num_keypoints": 1},
        {"segmentation": {"size": [20, 30], "counts": [100, 20, 480]}, "keypoints": [0] * 6, "num_keypoints": 0},
        {"segmentation": {"size": [20, 30], "counts": "T3P1:"}, "iscrowd": 1},
        {},
    ]
    return [
        json.dumps({"images": images, "categories": categories, "annotations": [one | shape, one | {"id": 2}]}).encode()
        for shape in shapes
    ]


def read_coco(data: bytes, folder: Path) -> None:
    for split in ("train", "valid"):
        _images(folder / split)
        (folder / split / "_annotations.coco.json").write_bytes(data)
    _use(folder)


def yolo_seeds() -> list[bytes]:
    named = b"path: .\ntrain: images/train\nval: images/train\n"
    return [
        named + b"names: [cup, ball]\n\0" + b"0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.1 0.1\n",
        named + b"nc: 2\nnames: {0: cup, 1: ball}\n\0" + b"0 0.1 0.1 0.9 0.1 0.5 0.9\n",
        named + b"names: [cup]\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\n\0" + b"0 0.5 0.5 0.2 0.2 0.4 0.4 2 0 0 0\n",
    ]


def read_yolo(data: bytes, folder: Path) -> None:
    described, _, labels = data.partition(b"\0")
    _images(folder / "images/train")
    (folder / "labels/train").mkdir(parents=True)
    (folder / "data.yaml").write_bytes(described)
    (folder / "labels/train/1.txt").write_bytes(labels)
    _use(folder)


def voc_seeds() -> list[bytes]:
    box = b"<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>15</ymax></bndbox>"
    size = b"<size><width>30</width><height>20</height><depth>3</depth></size>"
    one = b"<object><name>cup</name><difficult>0</difficult>" + box + b"</object>"
    return [b"<annotation><filename>1.png</filename>" + size + one * n + b"</annotation>" for n in (1, 2)]


def read_voc(data: bytes, folder: Path) -> None:
    for split in ("train", "valid"):
        _images(folder / split)
        for n in (1, 2):
            (folder / split / f"{n}.xml").write_bytes(data)
    _use(folder)


def image_seeds() -> list[bytes]:
    from PIL import Image

    made = []
    for mode, form in [("RGB", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP")]:
        file = io.BytesIO()
        Image.new(mode, (30, 20)).save(file, form)
        made.append(file.getvalue())
    return made


def read_image(data: bytes, folder: Path) -> None:
    from detr_exp.data import image

    path = folder / "a.png"
    path.write_bytes(data)
    image.read_image(path)


def _images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for n in (1, 2):
        (folder / f"{n}.png").write_bytes(_png())


def _png(made: list[bytes] = []) -> bytes:  # noqa: B006 - made once
    if not made:
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (30, 20), (200, 90, 10)).save(file, "PNG")
        made.append(file.getvalue())
    return made[0]


def _use(folder: Path) -> None:
    """Read everything of a data set and load one batch, as a training with masks or keypoints would."""
    from types import SimpleNamespace

    from detr_exp.data.augment import Augment
    from detr_exp.data.auto import auto
    from detr_exp.data.dataset import DataSet

    data = DataSet(source=auto, root=str(folder), augment=Augment(flip=0.5, iou_crop=0.5), num_workers=0)
    data.check()
    network = SimpleNamespace(
        image_size=(32, 32),
        stride=32,
        tasks=("boxes", *["masks"] * data.train.has_masks, *["keypoints"] * (data.keypoints is not None)),
    )
    for split in data.content.read:
        data.split(split).truth()
        next(iter(data.loader(split, network=network, batch_size=2, seed=0, training=split == "train")), None)


# -------------------------------------------------------------------------------------------- checkpoints and texts


def _network(made: list[Any] = []) -> Any:  # noqa: B006 - made once
    if not made:
        from detr_exp import build

        words = ["model=rtdetrv2_tiny", "model.image_size=[64,64]", "model.num_queries=4", "data.num_classes=2"]
        cfg = build.compose([*words, "data=shapes", "model.num_denoising=0"])
        made += [build.network(cfg), build.plain(cfg)]
    return made


def _checkpoint() -> dict[str, Any]:
    network, config = _network()
    return {
        "format": 1,
        "kind": "inference",
        "model": {name: tensor for name, tensor in network.state_dict().items() if tensor.numel() < 300},
        "config": config,
        "classes": ["a", "b"],
        "category_ids": [0, 1],
        "keypoints": None,
        "metrics": {"mAP": 0.5},
    }


def weight_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    tensors = {"decoder.enc_score_head.bias": torch.zeros(2), "a.num_batches_tracked": torch.tensor(1)}
    made = [b"S" + save(tensors), b"S" + save(tensors, {"detr_exp": json.dumps({"format": 1})})]
    for content in (tensors, {"model": tensors}, {"ema": {"module": tensors}, "args": {"a": 1}}, {"format": 1}):
        file = io.BytesIO()
        torch.save(content, file)
        made.append(b"Z" + file.getvalue())
        made.append(b"P" + _pickled(file.getvalue()))
    return made


def read_weights(data: bytes, folder: Path) -> None:
    """The first byte says what the rest is: safetensors, a file of torch, or the pickle inside of one."""
    from detr_exp.model.pretrained import load_weights

    kind, content = data[:1], data[1:]
    path = folder / ("a.safetensors" if kind == b"S" else "a.pth")
    path.write_bytes(_with_pickle(content) if kind == b"P" else content)
    load_weights(_network()[0], str(path), ["a", "b"])


def _pickled(file: bytes) -> bytes:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def _with_pickle(content: bytes) -> bytes:
    """A file of torch whose checksums are right and whose pickle is `content`."""
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in (("data.pkl", content), ("byteorder", b"little"), ("data/0", bytes(64)), ("version", b"3")):
            archive.writestr(f"archive/{name}", part)
    return file.getvalue()


def config_seeds() -> list[bytes]:
    rest = {name: value for name, value in _checkpoint().items() if name != "model"}
    return [json.dumps(rest).encode()]


def read_config(data: bytes, folder: Path) -> None:
    """Everything of a checkpoint but its tensors, as JSON."""
    import torch

    import detr_exp

    try:
        content = json.loads(data)
    except ValueError:
        return
    tensors = {"model": _checkpoint()["model"]}
    torch.save(content | tensors if isinstance(content, dict) else content, folder / "a.pth")
    detr_exp.load(folder / "a.pth")


def text_seeds() -> list[bytes]:
    return [
        b"data.api_key=k1 http://me:p@ss/w@host:5/x?token=k2&x=1 Authorization: Bearer k3",
        b'{"token": "k1", "credentials": {"user": "k2"}} a.password=[k3,{b: k4}],c=2',
        b"Cookie: a=b; c=d\npassword='k\\'5' ghp_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    ]


def read_text(data: bytes, folder: Path) -> None:
    """Masking ends, in linear time, and finds nothing more to mask in what it made."""
    from detr_exp.terminal import printable
    from detr_exp.tracker.secrets import masked

    text = data.decode(errors="surrogateescape")
    started = time.process_time()
    printable(text).encode()
    spent = time.process_time() - started
    if spent > 0.5 + len(text) * 1e-4:
        raise TimeoutError(f"{spent:.1f} s for {len(text)} characters")
    masked({"password": text, text: [text]})


READERS = {
    "coco": Reader(coco_seeds, read_coco),
    "yolo": Reader(yolo_seeds, read_yolo),
    "voc": Reader(voc_seeds, read_voc),
    "image": Reader(image_seeds, read_image),
    "weights": Reader(weight_seeds, read_weights),
    "config": Reader(config_seeds, read_config),
    "text": Reader(text_seeds, read_text),
}


# ------------------------------------------------------------------------------------------------------- fuzzing


def tried(reader: Reader, data: bytes) -> BaseException | None:
    """What came of an input that should not have: anything but success and a refusal, which ends with status 2."""
    from detr_exp.cli import status_of

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        reader.read(data, folder)
    except Exception as error:
        return None if status_of(error) == 2 else error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def changed(data: bytes, draw: random.Random) -> bytes:
    """JSON with some of its values replaced, taken out, doubled, exchanged or renamed; other bytes damaged."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _damaged(data, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        value = _change(value, draw)
    return json.dumps(value).encode()


def _change(value: Any, draw: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(STRANGE)
    holder, key = draw.choice(places)
    what = draw.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(holder[key])))
    elif what == 2:
        other, at = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif what == 3 and isinstance(holder, dict):
        holder[draw.choice(["id", "name", "_target_", "x\x1b", key.upper()])] = holder.pop(key)
    elif what == 4 and isinstance(holder[key], int | float):
        holder[key] *= draw.choice([-1, 0, 1e3, 1e9, 0.001])
    else:
        holder[key] = json.loads(json.dumps(draw.choice(STRANGE)))
    return value


def _places(value: Any) -> Any:
    """Every (mapping or list, key) of a nested value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items:
        yield value, key
        yield from _places(item)


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes cut, doubled, exchanged for others, or with a strange word put in."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(made) + 1)
        what = draw.randrange(5)
        if what == 0:
            del made[at : at + draw.choice((1, 2, 8, 10**6))]
        elif what == 1:
            made[at:at] = made[at : at + draw.choice((4, 40))] * draw.choice((1, 3, 50))
        elif what == 2:
            made[at : at + 1] = bytes([draw.randrange(256)])
        else:
            word = json.dumps(draw.choice(STRANGE)).strip('"').encode()
            made[at : at + draw.choice((0, 1, 3))] = word
    return bytes(made)


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["detr_exp"]):
        import detr_exp.cli
        import detr_exp.data.auto
        import detr_exp.data.dataset
        import detr_exp.inference.detector
        import detr_exp.model.pretrained
        import detr_exp.tracker.secrets  # noqa: F401
    import logging

    logging.disable(logging.CRITICAL)
    reader, found = READERS[name], set()
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(reader.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        error = tried(reader, data)
        if error is None:
            return
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "detr_exp" in frame.filename]
        place = (
            f"{type(error).__name__} {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else repr(error)
        )
        if place not in found:
            found.add(place)
            KEPT.mkdir(parents=True, exist_ok=True)
            kept = KEPT / f"{name}-{len(found)}"
            kept.write_bytes(data)
            print(f"FINDING {name}: {place}: {str(error)[:200]!r} ({kept})", file=sys.stderr, flush=True)

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        return changed(data, draw)[:most] if draw.random() < 0.5 else atheris.Mutate(data, most)

    KEPT.mkdir(parents=True, exist_ok=True)
    options = [
        *(f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-max_len=20000"),
        *(f"-artifact_prefix={KEPT}/{name}-", "-print_final_stats=1", str(corpus)),
    ]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutated)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="reader", help=", ".join(READERS))
    parser.add_argument("--seconds", type=int, default=600, help="for all of them together")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.readers or list(READERS)
    if unknown := set(names) - set(READERS):
        parser.error(f"no reader is called {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    if args.one:
        fuzz(names[0], args.seconds)
        return 0
    failed = False
    for name in names:
        command = [sys.executable, __file__, name, "--one", "--seconds", str(args.seconds // len(names))]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        runs = re.search(r"number_of_executed_units:\s*(\d+)", result.stderr)
        findings = [line for line in result.stderr.splitlines() if line.startswith(("FINDING", "SUMMARY", "=="))]
        print(f"{name}: {runs[1] if runs else '?'} inputs, {len(findings)} findings", *findings, sep="\n  ", flush=True)
        if runs is None:
            print(result.stderr[-2000:])
        failed = failed or bool(findings) or runs is None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
