"""Files that are complete at any time, and messages for damaged ones."""

import pickle
import zipfile

import pytest
import torch

from detr_exp.trainer import checkpoint as files


def state(value: float = 1.0) -> dict:
    return {"format": files.FORMAT, "model": {"w": torch.full((64, 64), value)}}


def test_round_trip(tmp_path):
    files.save(state(2.0), tmp_path / "checkpoint.pth")
    assert torch.equal(files.load(tmp_path / "checkpoint.pth")["model"]["w"], torch.full((64, 64), 2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    files.save(state(1.0), path)

    class Full:
        """A file on a disk that is full after a few bytes."""

        def __init__(self, file):
            self.file = file
            self.flush = file.flush

        def write(self, content):
            if self.file.tell() + len(content) > 5000:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Full(file)))
    with pytest.raises(ValueError, match=r"No space left.*previous checkpoint.pth is untouched"):
        files.save(state(2.0), path)
    monkeypatch.undo()
    assert files.load(path)["model"]["w"][0, 0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_flipped_byte_is_noticed_and_another_file_offered(tmp_path):
    path = tmp_path / "checkpoint.pth"
    files.save(state(), path)
    files.save(state(), tmp_path / "checkpoint_1.pth")
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
    content = bytearray(path.read_bytes())
    middle = entry.header_offset + 2048
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*also in this folder: checkpoint_1\.pth"):
        files.load(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    files.save(state(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        files.load(path)


def test_foreign_file_points_to_model_weights(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"model\.weights="):
        files.load(tmp_path / "other.pth")


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    torch.save({"format": 1, "payload": Malicious()}, tmp_path / "bad.pth", pickle_module=pickle)
    with pytest.raises(
        ValueError, match=r"more than tensors and plain values and was not opened \(it asks for \w+\.\w+"
    ):
        files.load(tmp_path / "bad.pth")


def test_newer_format_is_refused(tmp_path):
    files.save(state() | {"format": files.FORMAT + 1}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="update detr_exp"):
        files.load(tmp_path / "checkpoint.pth")


def test_prune_keeps_the_newest_numbers(tmp_path):
    for name in ("checkpoint_2.pth", "checkpoint_10.pth", "checkpoint_9.pth", "checkpoint_best_total.pth"):
        (tmp_path / name).touch()
    files.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint_10.pth",
        "checkpoint_9.pth",
        "checkpoint_best_total.pth",
    ]


def test_resolve_prefers_the_best(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        files.resolve(tmp_path)
    (tmp_path / files.NEWEST).touch()
    assert files.resolve(tmp_path).name == files.NEWEST
    (tmp_path / files.BEST_TOTAL).touch()
    assert files.resolve(tmp_path).name == files.BEST_TOTAL


def test_switches_and_numbers_are_names():
    assert [str(files.resolve(name)) for name in (True, 5)] == ["True", "5"]


def test_config_hash_ignores_order():
    assert files.config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == files.config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert files.config_hash({"a": 1}) != files.config_hash({"a": 2})
