"""A folder for transformers: loaded by its auto classes it gives our numbers, from the photograph to the boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from PIL import Image
from rfdetr_peer import _fill_zeros

from detr_exp import build, transformers_folder
from detr_exp.data.pixels import pixels_of_array
from detr_exp.data.render import resized_plainly
from detr_exp.inference.detector import Detector, load
from detr_exp.model.pretrained import load_weights
from detr_exp.model.pretrained_rfdetr import from_rfdetr, to_rfdetr
from detr_exp.trainer import checkpoint as files

NAMES = ["ape", "bee", "cat"]
RFDETR = [
    *(f"model.{key}=64" for key in ("hidden_dim", "dim_feedforward", "num_queries")),
    *("model.num_groups=2", "model.num_layers=2", "model.backbone.width=96", "model.backbone.out_blocks=[1,3]"),
]
DFINE = ["model.num_queries=20", "model.eval_idx=1", "model.neck.depth_mult=1.0", "model.edge_scale=8.0"]
SMALL = {
    "rtdetrv2": ["model=rtdetrv2_tiny", "model.image_size=[96,128]", "model.num_queries=20", "model.eval_idx=1"],
    "dfine": ["model=dfine_tiny", "model/backbone=hgnetv2_b0", "model.image_size=[96,128]", *DFINE],
    "lwdetr": [
        *("model=lwdetr_large", "model.image_size=[64,128]", "model.num_queries=20", "model.num_groups=2"),
        *("model.hidden_dim=48", "model.dim_feedforward=64", "model.num_layers=2", "model.neck.num_bottlenecks=1"),
        *("model.backbone.width=48", "model.backbone.depth=3", "model.backbone.windowed=[0,2]"),
        "model.backbone.taps=[0,2]",
    ],
    "rfdetr": ["model=rfdetr", "model.image_size=[96,96]", *RFDETR],  # with fewer cells than queries
    "rfdetr_seg": ["model=rfdetr_seg", "model.image_size=[96,96]", *RFDETR],
}


def detector(folder: Path, *words: str) -> Detector:
    """A network with random weights in which nothing is zero, from a checkpoint."""
    cfg = build.compose([*words, "data.num_classes=3", "trainer/hardware=cpu", "trainer.hardware.amp=null"])
    torch.manual_seed(0)
    network: Any = build.network(cfg)
    _fill_zeros(network)
    state = {"config": OmegaConf.to_container(cfg, resolve=True), "classes": NAMES, "category_ids": [1, 2, 3]}
    files.save(state | {"format": files.FORMAT, "model": network.state_dict()}, folder / "checkpoint.pth")
    return load(folder / "checkpoint.pth")


def photograph(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", SMALL)
def test_a_member_of_a_network(kind: str, tmp_path: Path) -> None:
    """What it writes is compared with ours, and refused where it differs."""
    whole = detector(tmp_path, *SMALL[kind])
    # transformers ties the heads of layers, which fails where there is one
    layers, size = {"rfdetr": (1, [192, 192]), "lwdetr": (1, [128, 64])}.get(kind[:6], (3, [64, 96]))
    ours = load(whole.path, at={"layers": layers, "queries": 11, "image_size": size})
    config = transformers_folder.write_in(tmp_path / "hf", ours)
    assert (config["decoder_layers"], config["num_queries"]) == (layers, 11)
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["size"]["height"] == size[0]


@pytest.mark.parametrize("kind", SMALL)
def test_the_auto_classes_of_transformers_give_our_detections(kind: str, tmp_path: Path) -> None:
    ours = detector(tmp_path, *SMALL[kind])
    config = transformers_folder.write_in(tmp_path / "hf", ours)
    has_masks = kind == "rfdetr_seg"
    auto = transformers.AutoModelForInstanceSegmentation if has_masks else transformers.AutoModelForObjectDetection
    theirs, report = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    assert config["architectures"] == [type(theirs).__name__]
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert not theirs.training

    image = pixels_of_array(photograph(150, 200))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    network = ours.network
    resized = resized_plainly(image, network.image_size).copy()
    inputs = processor(Image.fromarray(resized if has_masks else image), return_tensors="pt")
    pixels = (torch.from_numpy(resized).permute(2, 0, 1) / 255 - network.pixel_mean) / network.pixel_std
    assert ((inputs["pixel_values"][0] - pixels) * network.pixel_std * 255).abs().max() < 1.1  # levels of grey

    with torch.inference_mode():
        outputs = theirs(pixel_values=pixels[None])
    sizes = [image.shape[:2]]
    (wanted,) = ours.predict(image, threshold=0.0)
    if has_masks:
        process = processor.post_process_instance_segmentation
        (found,) = process(outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True)
        filled = wanted.masks.flatten(1).any(1)  # transformers leaves out empty masks
        assert [one["label_id"] for one in found["segments_info"]] == wanted.labels[filled].tolist()
        assert (found["segmentation"] != wanted.masks[filled]).float().mean() < 1e-3
    else:
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        torch.testing.assert_close(found["scores"], wanted.scores[: len(found["scores"])], atol=1e-4, rtol=0)
        assert torch.equal(found["labels"], wanted.labels[: len(found["scores"])])
        height, width = image.shape[:2]
        within = torch.tensor([width, height, width, height])
        boxes = [boxes.clamp(torch.zeros(4), within) for boxes in (found["boxes"], wanted.boxes)]
        torch.testing.assert_close(boxes[0], boxes[1][: len(boxes[0])], atol=0.05, rtol=0)


def test_class_rows_of_rfdetr_are_read_again_by_name(tmp_path: Path) -> None:
    made = detector(tmp_path, *SMALL["rfdetr"])
    transformers_folder.write_in(tmp_path / "hf", made)
    for names in (NAMES, ["cat", "dog", "ape", "bee"], ["red", "blue", "green"]):
        cfg = build.compose([*SMALL["rfdetr"], f"data.num_classes={len(names)}"])
        again: Any = build.network(cfg)
        own = {name: tensor.clone() for name, tensor in again.state_dict().items()}
        load_weights(again, tmp_path / "hf", names)
        for name, axis in again.class_tensors().items():
            mine, theirs = again.state_dict()[name], made.network.state_dict()[name]
            for row, label in enumerate(names):
                kept = (theirs, NAMES.index(label)) if label in NAMES else (own[name], row)
                assert torch.equal(mine.select(axis, row), kept[0].select(axis, kept[1]))
        assert torch.equal(again.head.box.layers[0].weight, made.network.state_dict()["head.box.layers.0.weight"])


@pytest.mark.parametrize("kind", ["rfdetr", "rfdetr_seg"])
def test_names_of_rfdetr_there_and_back(kind: str, tmp_path: Path) -> None:
    network = detector(tmp_path, *SMALL[kind]).network
    state = network.state_dict()
    back = from_rfdetr(to_rfdetr(state, network.num_queries), network)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL["rtdetrv2"], "loss=ce"], "background class .softmax., .*format=safetensors"),
        ([*SMALL["rtdetrv2"], "model.num_points=[4,4,2]"], r"cannot express this model\.num_points"),
        ([*SMALL["dfine"], "model.head_activation=silu"], r"cannot express this model\.head_activation"),
        (["model=dfine_tiny"], r"cannot express this model\.backbone; .*HGNetV2"),
        ([*SMALL["lwdetr"], "model.neck.squeeze=true"], r"cannot express this model: .*model\.neck\.squeeze=true only"),
        ([*SMALL["rfdetr"], "model.neck.levels=[P3,P4]"], r"cannot express this model\.neck\.levels"),
        ([*SMALL["rfdetr"], "model.image_size=[96,128]"], r"cannot express this model\.image_size"),
        (["model=rfdetr_seg_tiny"], r"cannot express model\.backbone=detr_exp\.model\.backbone\.presnet\.PResNet"),
        ([*SMALL["rtdetrv2"], "model.backbone.widths=[16,16,32,64]"], "does not build the same network"),
    ],
)
def test_what_transformers_cannot_build_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        transformers_folder.write_in(tmp_path / "hf", detector(tmp_path, *words))
    assert not list(tmp_path.glob("hf/*"))


def test_keypoints_are_refused(tmp_path: Path) -> None:
    made = detector(tmp_path, *SMALL["rtdetrv2"])
    made.network = type("RFDETRKeypoint", (), {"activation": "sigmoid"})()
    with pytest.raises(ValueError, match=r"holds RFDETRKeypoint, and format=hf is for .*; use format=safetensors"):
        transformers_folder.write_in(tmp_path / "hf", made)


def test_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = detector(tmp_path, *SMALL["rtdetrv2"])
    right = transformers_folder._for_transformers(made)
    monkeypatch.setattr(
        transformers_folder, "_for_transformers", lambda _: (right[0] | {"activation_function": "relu"}, right[1])
    )
    with pytest.raises(
        ValueError, match=r"does not build the same network \(its outputs differ by .*format=safetensors"
    ):
        transformers_folder.write_in(tmp_path / "hf", made)
    assert not list((tmp_path / "hf").iterdir())
    monkeypatch.setattr(
        transformers_folder, "_for_transformers", lambda _: (right[0] | {"decoder_layers": 1}, right[1])
    )
    with pytest.raises(ValueError, match=r"does not build the same network \(.*format=safetensors"):
        transformers_folder.write_in(tmp_path / "hf", made)


def test_normalisation_is_that_of_the_network(tmp_path: Path) -> None:
    made = detector(tmp_path, *SMALL["rtdetrv2"], "model.pixel_mean=[0.5,0.4,0.3]", "model.pixel_std=[0.2,0.2,0.2]")
    transformers_folder.write_in(tmp_path / "hf", made)
    said = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert said["do_normalize"]
    assert np.allclose(said["image_mean"] + said["image_std"], [0.5, 0.4, 0.3, 0.2, 0.2, 0.2])
