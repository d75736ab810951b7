"""Find objects in an image with a file of `python -m detr_exp.export`, without PyTorch: numpy, onnxruntime, and what
detr_exp reads images with (Pillow, OpenCV). Files exported with and without the steps around the network will do.

python scripts/onnx_predict.py model.onnx photo.jpg found.jpg [threshold]
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

from detr_exp.data.image import FIRST_FRAME, ImageError, has_more_frames, read_image


def main(model: str, photo: str, drawn: str, threshold: str = "") -> None:
    session = onnxruntime.InferenceSession(model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["detr_exp"])
    try:
        pixels = read_image(Path(photo))
    except ImageError as error:
        sys.exit(f"error: {error}")
    if has_more_frames(Path(photo)):
        print(f"{photo}: {FIRST_FRAME}", file=sys.stderr)
    image = Image.fromarray(pixels)
    size = np.array([[image.height, image.width]])
    images = pixels[None]
    if session.get_inputs()[0].type == "tensor(float)":  # else it resizes inside
        height, width = content_of(size[0], facts)
        canvas = Image.new("RGB", facts["image_size"][::-1], tuple(facts["fill"]))
        canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR))
        images = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    given = {"images": images, "image_sizes": size}
    found = session.run(facts["outputs"], {entry.name: given[entry.name] for entry in session.get_inputs()})
    outputs = {name: value[0] for name, value in zip(facts["outputs"], found)}
    if "scores" not in outputs:
        outputs = detections(outputs["logits"], outputs["boxes"], size[0], facts)
    drawing = ImageDraw.Draw(image)
    for score, label, box in zip(outputs["scores"], outputs["labels"], outputs["boxes"]):
        if score > float(threshold or facts["threshold"]):
            corners = [round(float(side), 1) for side in box]
            word = f"{facts['classes'][label]} {score:.2f}"
            drawing.rectangle(corners, outline="red", width=2)
            drawing.text((corners[0] + 3, corners[1] + 2), word, fill="red")
            print(word, *corners)
    image.save(drawn)


def content_of(size: Any, facts: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of an image of (height, width) `size` in the input: all of it, or what keeps its proportions."""
    height, width = facts["image_size"]
    if facts.get("fit") != "letterbox":
        return height, width
    across, down = (2 * size[1] * height + size[0]) // (2 * size[0]), (2 * size[0] * width + size[1]) // (2 * size[1])
    return max(1, min(int(down), height)), max(1, min(int(across), width))


def detections(logits: Any, boxes: Any, size: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """What `export.postprocess=true` does inside: scores, labels and boxes in pixels, best first."""
    if facts["activation"] == "softmax":  # the last column is the background; a query has its best class
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores = (scores / scores.sum(1, keepdims=True))[:, :-1]
        queries, labels = np.arange(len(scores)), scores.argmax(1)
    else:
        scores = 1 / (1 + np.exp(-logits))
        queries, labels = (part.ravel() for part in np.indices(scores.shape))
    best = np.argsort(-scores[queries, labels], kind="stable")[: len(logits)]
    queries, labels = queries[best], labels[best]
    center, half = boxes[queries, :2], boxes[queries, 2:].clip(0) / 2
    whole = size * facts["image_size"] / content_of(size, facts)  # what the input measures in pixels of the image
    corners = np.concatenate([center - half, center + half], axis=1) * np.tile(whole[::-1], 2)
    if facts["cuts_boxes"]:
        corners = corners.clip(0, np.tile(size[::-1], 2))
    return {"scores": scores[queries, labels], "labels": labels, "boxes": corners}


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5 or not Path(sys.argv[1]).is_file():
        print(f"error: it takes a file that exists: {' '.join((__doc__ or '').split()[-6:])}", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
