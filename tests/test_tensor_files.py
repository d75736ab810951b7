"""Files that travel and are not what they should be: one sentence and exit status 2, whatever they are opened as."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from detr_exp import build, tensor_files
from detr_exp.cli import status_of
from detr_exp.config.compose import compose
from detr_exp.export_weights import write_safetensors
from detr_exp.inference.detector import load
from detr_exp.model.pretrained import load_weights, read_weights
from detr_exp.model.pretrained_rtdetr import to_huggingface, to_official

WORDS = ["model=rtdetrv2_tiny", "data=shapes", "model.image_size=[64,64]", "model.num_queries=20"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


class Code:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code in a file was executed",)


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def compressed(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
    return file.getvalue()


def image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def flipped(content: bytes) -> bytes:
    """With another byte in the middle of every 4096."""
    changed = bytearray(content)
    for place in range(min(2048, len(content) // 2), len(content), 4096):
        changed[place] ^= 0x55
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a pointer of git-lfs": lambda content: POINTER,
    "a web page": lambda content: b"\n<!DOCTYPE html><html><body>404</body></html>",
    "half of it": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-30],
    "the first bytes": lambda content: content[:20],
    "other bytes": flipped,
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"weights\n",
    "a picture": lambda content: image(),
    "JSON": lambda content: b'{"model": {}}',
    "code": lambda content: saved({"format": 1, "model": Code()}),
    "code, bare": lambda content: pickle.dumps(Code()),
    "as torch wrote long ago, with code": lambda content: saved({"a": Code()}, _use_new_zipfile_serialization=False),
    "a list": lambda content: saved([torch.zeros(1)]),
    "a tensor": lambda content: saved(torch.zeros(1)),
    "other tensors": lambda content: saved({"weight": torch.zeros(1)}),
    "numbers for names": lambda content: saved({1: torch.zeros(1), "model": {2: torch.zeros(1)}}),
    "names of ours on other things": lambda content: saved({"format": 1, "model": [1], "ema": 3, "classes": "abc"}),
    "names of others on other things": lambda content: saved({"ema": [1], "model": 2, "callbacks": {"a": 3}}),
    "compressed": compressed,
    "an archive of something else": lambda content: zipped(),
    "a header of another size": lambda content: (2**40).to_bytes(8, "little") + b"{" + content[9:],
    "a header that is no JSON": lambda content: (20).to_bytes(8, "little") + b"{" + b"x" * 19,
}


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


def program() -> bytes:
    """Of TorchScript: an archive with code."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/code/__torch__.py", "")
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"\x08\x08\x12\x07pytorch", b'<?xml version="1.0"?>\n<net name="Model0" version="11">', program()]
)
def test_exported_files_are_called_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.pth is an exported network.*give its checkpoint instead; or none"):
        tensor_files.read(tmp_path / "a.pth", "; or none")


@pytest.fixture(scope="module")
def network() -> Any:
    return build.network(compose(WORDS))


@pytest.fixture(scope="module")
def whole(trained: Path, network: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every kind of file that is read, as it should be."""
    folder = tmp_path_factory.mktemp("whole")
    state = network.state_dict()
    points = {"num_points": list(compose(WORDS).model.num_points)}
    theirs = {name: tensor.contiguous().clone() for name, tensor in to_huggingface(state, **points).items()}
    save_file(theirs, folder / "hf.safetensors")
    official = to_official(state, **points, spatial_shapes=network.spatial_shapes())
    best = trained / "checkpoint_best_total.pth"
    return {
        "checkpoint.pth": best.read_bytes(),
        "checkpoint.safetensors": write_safetensors(folder, best).read_bytes(),
        "official.pth": saved({"ema": {"module": official}}),
        "model.safetensors": (folder / "hf.safetensors").read_bytes(),
        "backbone.pth": saved(network.backbone.state_dict()),
    }


def opened(path: Path, network: Any) -> None:
    """What a user does with such a file."""
    if path.name.startswith("checkpoint"):
        load(path)
    elif path.name.startswith("backbone"):
        build.network(compose([*WORDS, f"model.backbone.pretrained={path}"]))
    else:
        load_weights(network, path)


KINDS = ["checkpoint.pth", "checkpoint.safetensors", "official.pth", "model.safetensors", "backbone.pth"]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_whole_is_opened(name: str, whole: dict[str, bytes], network: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(whole[name])
    opened(tmp_path / name, network)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name: str, damage: str, whole: dict[str, bytes], network: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(DAMAGE[damage](whole[name]))
    with pytest.raises(ValueError, match=name) as caught:
        opened(tmp_path / name, network)
    assert status_of(caught.value) == 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    if damage == "a pointer of git-lfs":
        assert "git lfs pull" in str(caught.value)


VALUES = [None, 3, -1.5, "text", [], {}, [None], {"a": 1}, torch.zeros(2), {"model": {"_target_": "os.system"}}]
KEYS = ["model", "model.backbone", "model.image_size", "loss", "trainer.hardware"]
NAMES = ["format", "model", "config", "classes", "category_ids", "keypoints", "threshold"]


def is_refused(path: Path, value: Any) -> bool:
    """Whether a checkpoint is; in a sentence, if so."""
    found: list[Exception] = []
    try:
        load(path)
    except Exception as error:
        found.append(error)
    assert [status_of(error) for error in found] in ([], [2]), (value, found)
    assert all("checkpoint.pth" in str(error) or "_target_" in str(error) for error in found), (value, found)
    return bool(found)


@pytest.mark.parametrize("name", ["config", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "config")])
def test_a_checkpoint_of_ours_with_something_else_in_it(name: str, trained: Path, tmp_path: Path) -> None:
    """It is opened all the same, or refused in a sentence."""
    state = torch.load(trained / "checkpoint_best_total.pth", weights_only=True)
    path = tmp_path / "checkpoint.pth"
    refused = 0
    for value in [..., *VALUES]:
        changed = {key: kept for key, kept in state.items() if key != name} | ({} if value is ... else {name: value})
        torch.save(changed, path)
        refused += is_refused(path, value)
    assert refused >= 5


@pytest.mark.parametrize("key", [KEYS[0], *(pytest.param(key, marks=pytest.mark.slow) for key in KEYS[1:])])
def test_a_stored_config_with_something_else_in_it(key: str, trained: Path, tmp_path: Path) -> None:
    state = torch.load(trained / "checkpoint_best_total.pth", weights_only=True)
    path = tmp_path / "checkpoint.pth"
    for value in [..., None, 3, "text", [None], {"a": 1}, "${oc.env:HOME}", "???", {"_target_": "os.system"}]:
        config = json.loads(json.dumps(state["config"]))
        *above, last = key.split(".")
        place = config
        for part in above:
            place = place[part]
        place.pop(last)
        if value is not ...:
            place[last] = value
        torch.save(state | {"config": config}, path)
        is_refused(path, value)


def test_our_own_safetensors_with_a_header_of_something_else(whole: dict[str, bytes], tmp_path: Path) -> None:
    for header in ("{bad", "[]", "3", '{"format": 1}', '{"format": "x"}', "[" * 5000):
        save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors", {tensor_files.HEADER: header})
        with pytest.raises(ValueError, match=r"a\.safetensors") as caught:
            load(tmp_path / "a.safetensors")
        assert status_of(caught.value) == 2


BESIDE = ["", "{bad", "[]", "3", '{"id2label": {"LABEL_0": "a"}}', '{"id2label": ["a"]}', '{"id2label": {"0": 1}}']


@pytest.mark.parametrize("text", [*BESIDE, POINTER.decode(), "[" * 5000, "\xff\xfe"])
def test_a_config_beside_the_weights_that_is_none(text: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(whole["model.safetensors"])
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json does not name the classes.*remove it") as caught:
        read_weights(tmp_path)
    assert status_of(caught.value) == 2


def test_what_a_file_is_its_content_says(whole: dict[str, bytes], network: Any, tmp_path: Path) -> None:
    for name, other in (("model.safetensors", "model.bin"), ("official.pth", "official.safetensors")):
        (tmp_path / other).write_bytes(whole[name])
        assert read_weights(tmp_path / other).state


@pytest.mark.parametrize("kind", ["folder", "absent", "unreadable"])
def test_what_is_no_file(kind: str, network: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.symlink_to(path)
    for open_it in (load, lambda path: load_weights(network, path)):
        with pytest.raises(ValueError, match=r"checkpoint\.pth") as caught:
            open_it(path)
        assert status_of(caught.value) == 2
