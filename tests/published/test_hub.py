"""Files of the Hugging Face hub, from a server that plays it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from detr_exp.model.backbone.timm_backbone import TimmBackbone
from detr_exp.published import fetch, places

REPO = "owner/tiny-detr"
FILE = f"/{REPO}/resolve/main/model.safetensors"


pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def tensors(host: Any, tmp_path: Path) -> bytes:
    save_file({"weight": torch.arange(500.0)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    host.files[FILE] = content
    host.files[FILE.replace("model.safetensors", "config.json")] = json.dumps({"id2label": {"0": "cat"}}).encode()
    return content


def fetched(word: str) -> Path:
    found = fetch.fetch(word)
    assert found is not None
    return found.path


@pytest.mark.parametrize("word", [f"hf:{REPO}", f"hf:{REPO}@main", f"hf:{REPO}@main/model.safetensors"])
def test_a_repository_is_fetched_once_with_the_names_of_its_classes(word: str, host: Any, tensors: bytes) -> None:
    path = fetched(word)
    assert path.read_bytes() == tensors
    assert json.loads(path.with_name("config.json").read_text())["id2label"] == {"0": "cat"}
    asked = len(host.asked)
    assert fetched(word) == path
    assert len(host.asked) == asked


def test_the_older_kind_of_file_is_taken_where_there_is_no_other(host: Any, content: bytes) -> None:
    host.files[f"/{REPO}/resolve/main/pytorch_model.bin"] = content
    assert fetched(f"hf:{REPO}").name == "pytorch_model.bin"


def test_the_token_goes_to_the_hub_alone(host: Any, tensors: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetched(f"hf:{REPO}")
    asked = [headers for _, path, headers in host.asked if path.startswith(f"/{REPO}/")]  # the client asks more
    assert {headers.get("authorization", headers.get("Authorization")) for headers in asked} == {"Bearer hf_secret"}
    host.asked.clear()
    host.files["/plain.pth"] = tensors
    fetched(f"{host.url}/plain.pth")
    assert not any("hf_secret" in str(headers) for _, _, headers in host.asked)


def test_a_redirect_to_another_host_carries_no_token(
    host: Any, tensors: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    host.files["/bucket"] = tensors
    bucket = f"to {host.url.replace('127.0.0.1', 'localhost')}/bucket"
    host.plan = [bucket, bucket]  # for both questions what the file is
    assert fetched(f"hf:{REPO}").read_bytes() == tensors
    there = [headers for _, path, headers in host.asked if path == "/bucket"]
    assert there
    assert all("hf_secret" not in str(headers) for headers in there)
    assert any("hf_secret" in str(headers) for _, path, headers in host.asked if path == FILE)


def test_what_changes_after_its_first_use_is_refused(host: Any, tensors: bytes, tmp_path: Path, cache: Path) -> None:
    fetched(f"hf:{REPO}")
    recorded = json.loads((cache / places.RECORD).read_text())
    assert recorded[f"hf:{REPO}@main/model.safetensors"]["sha256"] == hashlib.sha256(tensors).hexdigest()
    for path in (tmp_path / "hub").rglob("*"):
        if path.is_file():
            path.unlink()
    host.files[FILE] = tensors[:-4] + bytes(4)
    with pytest.raises(ValueError, match="at the first use it was"):
        fetched(f"hf:{REPO}")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hf:owner/absent", "there is no such repository, or it is private and HF_TOKEN is not set"),
        (f"hf:{REPO}@main/absent.pth", r"holds no absent\.pth"),
    ],
)
def test_it_says_why_it_does_not_come(word: str, message: str, tensors: bytes, cache: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fetched(word)
    assert f"python -m detr_exp.weights fetch {word}" in str(caught.value)


@pytest.mark.parametrize("why", ["ours", "theirs", "no network"])
def test_offline_the_answer_comes_at_once(
    why: str, host: Any, tensors: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = fetched(f"hf:{REPO}")
    if why == "ours":
        monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    elif why == "theirs":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert fetched(f"hf:{REPO}") == path
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"other-detr is not on this machine.*put it at .*other-detr/model\.safetens"):
        fetched("hf:owner/other-detr")
    assert time.monotonic() - begun < 1


def test_timms_backbones_come_through_the_same_door(host: Any, tmp_path: Path) -> None:
    plain = timm.create_model("resnet10t", pretrained=False)
    torch.manual_seed(1)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    address = timm.models.get_pretrained_cfg("resnet10t").hf_hub_id
    host.files[f"/{address}/resolve/main/model.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    made = TimmBackbone(name="resnet10t", out_strides=[8, 16], freeze_norm=False, pretrained=True, options={})
    for name, tensor in made.body.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    asked = len(host.asked)
    TimmBackbone(name="resnet10t", out_strides=[8, 16], freeze_norm=False, pretrained=True, options={})
    assert len(host.asked) == asked
