"""Exported weights give the same outputs where they are read again."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from detr_exp.build import compose, network
from detr_exp.export_weights import IN_FOLDER, export_weights_in
from detr_exp.inference.detector import load
from detr_exp.model.pretrained import load_weights
from detr_exp.trainer import checkpoint as files

SIZES = [
    "model.image_size=[96,96]",
    "model.backbone.widths=[8,12,16,24]",
    "model.num_queries=20",
    "model.eval_idx=1",
    "data.num_classes=3",
]
WORDS = ["model=rtdetrv2_tiny", *SIZES]
DFINE = ["model=dfine_tiny", *SIZES]
DEIM = [*DFINE, "model.ffn_activation=silu", "model.head_activation=silu"]
ATTO = ["model=deimv2_atto", *(word for word in SIZES if "widths" not in word)]
EC = ["model=ecdet_s", *(f"model.backbone.body.{key}" for key in ("width=32", "num_heads=2", "depth=2", "taps=[0,1]"))]
EC += ["model.backbone.channels=192", *(word for word in SIZES if "widths" not in word)]
POSE = ["model=ecpose_s", *EC[1:], "model.keypoint_counts=[2,0,1]", "loss=pose", "matcher=pose"]
POINTS = {"names": [["a", "b"], [], ["c"]], "flip_pairs": [[]] * 3, "skeletons": [[]] * 3, "sigmas": [0.05, 0.05]}
NAMES = ["ape", "bee", "cat"]


@pytest.fixture
def checkpoint(request, tmp_path):
    cfg = compose(getattr(request, "param", WORDS))
    torch.manual_seed(0)
    made = network(cfg)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    state = {
        "format": files.FORMAT,
        "config": OmegaConf.to_container(cfg, resolve=True),
        "classes": NAMES,
        "category_ids": [1, 2, 3],
        "model": made.state_dict(),
    }
    if "keypoint_counts" in cfg.model:
        state["keypoints"] = POINTS | {"flippable": False}
    files.save(state, tmp_path / "checkpoint.pth")
    return made.eval(), tmp_path / "checkpoint.pth"


def exported(checkpoint, folder, form):
    settings = {"checkpoint": str(checkpoint), "format": form, "allow_targets": []}
    return export_weights_in(folder, OmegaConf.create(settings))


@pytest.mark.parametrize(
    ("checkpoint", "name", "cells"),
    [
        (WORDS, "rtdetrv2.pth", 189),
        (DFINE, "dfine.pth", 189),
        (DEIM, "deim_dfine.pth", 189),
        (ATTO, "deimv2.pth", 45),
        (EC, "ec.pth", 189),
        (POSE, "ecpose.pth", 189),
    ],
    indirect=["checkpoint"],
    ids=["rtdetrv2", "dfine", "deim", "deimv2", "ec", "poses"],
)
def test_official(checkpoint, name, cells, tmp_path):
    made, path = checkpoint
    written = exported(path, tmp_path / "out", "official")
    assert written.name == name
    state = torch.load(written, weights_only=True)["model"]
    assert state["decoder.anchors"].shape[:2] == (1, cells)
    again = network(load(path).cfg).eval()
    load_weights(again, written, NAMES)
    images = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(again(images).pred.logits, made(images).pred.logits, rtol=0, atol=0)


@pytest.mark.parametrize("checkpoint", [[*DFINE, "model.head_activation=silu"]], indirect=True)
def test_official_files_have_one_activation(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"relu in its layers and silu in its perceptrons.*format=safetensors"):
        exported(checkpoint[1], tmp_path / "out", "official")
    assert not (tmp_path / "out").exists()


def test_a_folder_for_transformers_is_read_again_with_the_same_numbers(checkpoint, tmp_path):
    made, path = checkpoint
    folder = exported(path, tmp_path / "out", "hf")
    assert {file.name for file in folder.iterdir()} == set(IN_FOLDER)
    shorter = ["model.num_layers=2", "model.eval_idx=-1"]  # the third layer is not evaluated, and so not written
    again = network(compose([*WORDS, *shorter, f"model.weights={folder}"])).eval()
    images = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(again(images).pred.logits, made(images).pred.logits, rtol=0, atol=0)
    assert exported(path, tmp_path / "former name", "huggingface") == tmp_path / "former name"


@pytest.mark.parametrize(("form", "name"), [("hf", "README.md"), ("official", "rtdetrv2.pth")])
def test_no_file_is_overwritten(checkpoint, tmp_path, form, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"has {name} already, and no file is overwritten; .*hydra\.run\.dir="):
        exported(checkpoint[1], tmp_path, form)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "onnx"}, "'onnx'; use one of safetensors, hf, official"),
        ({"format": "official", "push": "a/b"}, "push=a/b is for format=hf, and the format is official"),
        ({"format": "safetensors", "licence": "mit"}, "licence=mit is for format=hf"),
        ({"format": "hf", "licence": "my own terms"}, "'my own terms'; the hub needs an identifier"),
    ],
)
def test_settings_are_refused_before_anything_is_read(settings, message, tmp_path):
    cfg = OmegaConf.create({"checkpoint": "absent.pth", "allow_targets": []} | settings)
    with pytest.raises(ValueError, match=message):
        export_weights_in(tmp_path / "out", cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["hf", "official"])
def test_a_network_with_a_custom_decoder_has_no_published_format(checkpoint, tmp_path, monkeypatch, form):
    detector = load(checkpoint[1])
    detector.network.decoder = torch.nn.Identity()
    monkeypatch.setattr("detr_exp.inference.detector.load", lambda *_, **__: detector)
    with pytest.raises(ValueError, match=rf"holds Identity, and format={form} .*; .*format=safetensors"):
        exported(checkpoint[1], tmp_path / "out", form)
