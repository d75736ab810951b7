"""The offline files of Weights & Biases, opened: they hold the same numbers as the run folder."""

from __future__ import annotations

import json
import struct
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="pip install 'detr_exp[wandb]'")

from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from detr_exp.tracker.follower import Tail
from detr_exp.tracker.tracker import Tracker
from detr_exp.tracker.wandb import WandbView

BLOCK, HEAD, FULL, LAST = 32768, struct.Struct("<IHB"), 1, 4  # of LevelDB's log, in which the records are


def records(folder: Path) -> list[Record]:
    """What the newest offline file says."""
    data = max(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime).read_bytes()
    assert data[:4] == b":W&B"
    found, parts, place = [], b"", 7
    while place < len(data):
        if BLOCK - place % BLOCK < HEAD.size:  # what is left of a block has no room for a head
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEAD.unpack_from(data, place)
        parts += data[place + HEAD.size : place + HEAD.size + length]
        place += HEAD.size + length
        if kind in (FULL, LAST):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(folder: Path) -> dict[int, dict[str, object]]:
    """step -> values, where a step may have several rows."""
    rows: dict[int, dict[str, object]] = {}
    for record in records(folder):
        for line in [record.history] if record.HasField("history") else []:
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in line.item}
            rows.setdefault(values["_step"], {}).update(values)
    return rows


def test_every_number_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tracking_uri=None, project="blood", run="first", tensorboard=False, wandb=True)
    words = ["optim.lr=1e-4", "loss=focal"]
    tracker.start(run_dir=tmp_path, config={"optim": {"lr": 1e-4}}, choices={"loss": "focal"}, overrides=words)
    tracker.follower = None  # each turn of its thread is made below, so that images come between numbers of one step
    tail = Tail(WandbView(), tmp_path, tracker.record)
    Image.new("RGB", (4, 4)).save(tmp_path / "found.png")
    for step in range(1, 4):
        tracker.log(step, {"train/loss": 1 / step, "bad": float("nan")})
        tracker.image(tmp_path / "found.png", "predictions", step)
        tail.advance()
        tracker.log(step, {"val/mAP": step / 7, "val/mAP_small": -1.0})
        tail.advance()
    tracker.finish()
    tail.advance(closing=True)
    assert (tail.refusal, tail.failures, tail.closed) == (None, 0, True)
    import_module("wandb").teardown()  # its service writes the rest of the file
    wanted: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        values = {k: v for k, v in line.items() if v is not None and k not in ("step", "time/unix")}
        wanted.setdefault(line["step"], {}).update(values)
    assert "val/mAP_small" not in wanted[1], "without small objects"
    found = history(tmp_path)
    assert {step: {name: row[name] for name in wanted[step]} for step, row in found.items()} == wanted
    assert all(row["predictions._type"] == "image-file" for row in found.values())
    (config,) = [record.run.config for record in records(tmp_path) if record.HasField("run")]
    given = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in config.update}
    assert (given["optim.lr"], given["loss"]) == (1e-4, "focal"), "numbers are numbers, for axes"
