"""Exported weights give the same outputs where they are read again."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from detr_exp.build import compose, network
from detr_exp.export_weights import export_weights_in
from detr_exp.inference.detector import load
from detr_exp.model.pretrained import load_weights
from detr_exp.trainer import checkpoint as files

WORDS = [
    "model=rtdetrv2_tiny",
    "model.image_size=[96,96]",
    "model.backbone.widths=[8,12,16,24]",
    "model.num_queries=20",
    "model.eval_idx=1",
    "data.num_classes=3",
]
NAMES = ["ape", "bee", "cat"]


@pytest.fixture
def checkpoint(tmp_path):
    cfg = compose(WORDS)
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
    files.save(state, tmp_path / "checkpoint.pth")
    return made.eval(), tmp_path / "checkpoint.pth"


def exported(checkpoint, folder, form):
    settings = {"checkpoint": str(checkpoint), "format": form, "allow_targets": []}
    return export_weights_in(folder, OmegaConf.create(settings))


def test_official(checkpoint, tmp_path):
    made, path = checkpoint
    written = exported(path, tmp_path / "out", "official")
    state = torch.load(written, weights_only=True)["model"]
    assert state["decoder.anchors"].shape == (1, 189, 4)
    again = network(compose(WORDS)).eval()
    load_weights(again, written, NAMES)
    images = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(again(images).pred.logits, made(images).pred.logits, rtol=0, atol=0)


def test_transformers_loads_a_folder_with_all_keys_and_gives_the_same_outputs(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    made, path = checkpoint
    folder = exported(path, tmp_path / "out", "huggingface")
    theirs, report = transformers.RTDetrV2ForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert [theirs.config.id2label[label] for label in range(3)] == NAMES
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected, outputs = theirs.eval()(pixel_values=images), made(images)
    torch.testing.assert_close(outputs.pred.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.pred.boxes, expected.pred_boxes, rtol=0, atol=1e-4)
    processor = transformers.RTDetrImageProcessor.from_pretrained(folder)
    assert (processor.size["height"], processor.size["width"]) == (96, 96)
    assert not processor.do_normalize


def test_mistakes(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"'onnx'; use one of safetensors, huggingface, official"):
        exported(checkpoint[1], tmp_path / "out", "onnx")


@pytest.mark.parametrize("form", ["huggingface", "official"])
def test_a_network_with_a_custom_decoder_has_no_published_format(checkpoint, tmp_path, monkeypatch, form):
    detector = load(checkpoint[1])
    detector.network.decoder = torch.nn.Identity()
    monkeypatch.setattr("detr_exp.inference.detector.load", lambda *_, **__: detector)
    with pytest.raises(ValueError, match=rf"holds Identity, and format={form} .*; .*format=safetensors"):
        exported(checkpoint[1], tmp_path / "out", form)
