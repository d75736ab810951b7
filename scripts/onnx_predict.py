"""Find objects in a picture with a file of `python -m detr_exp.export`, without detr_exp: numpy, Pillow, onnxruntime.

python scripts/onnx_predict.py model.onnx photo.jpg found.jpg [threshold]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def main(model: str, photo: str, drawn: str, threshold: str = "") -> None:
    session = onnxruntime.InferenceSession(model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["detr_exp"])
    picture = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    height, width = facts["image_size"]
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    images = np.asarray(resized, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    logits, boxes = (output[0] for output in session.run(["logits", "boxes"], {"images": images}))
    if facts["activation"] == "softmax":  # the last column is the background
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores = (scores / scores.sum(1, keepdims=True))[:, :-1]
    else:
        scores = 1 / (1 + np.exp(-logits))
    canvas = ImageDraw.Draw(picture)
    queries, labels = np.nonzero(scores > float(threshold or facts["threshold"]))
    for query, label in sorted(zip(queries, labels), key=lambda pair: -scores[pair]):
        x, y, w, h = boxes[query] * (picture.width, picture.height, picture.width, picture.height)
        box = [round(float(side), 1) for side in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        word = f"{facts['classes'][label]} {scores[query, label]:.2f}"
        canvas.rectangle(box, outline="red", width=2)
        canvas.text((box[0] + 3, box[1] + 2), word, fill="red")
        print(word, *box)
    picture.save(drawn)


if __name__ == "__main__":
    main(*sys.argv[1:])
