"""Find objects in pictures: `python -m detr_exp.predict checkpoint=... source=<picture or folder>`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli

USAGE = """\
Find objects in pictures: a COCO-style JSON file with scores, and every picture with boxes, labels and scores.

  python -m detr_exp.predict checkpoint=RUN_FOLDER source=photo.jpg
  python -m detr_exp.predict checkpoint=weights.pth source=FOLDER threshold=0.4

  checkpoint         a file, or the folder of a run: its best
  source             a picture, or a folder of pictures
  threshold          lowest score; null: where precision and recall balanced best in the checkpoint's evaluation
  batch_size         pictures at a time
  pictures           true draws what was found
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      packages of your own that the checkpoint's config names
"""

if TYPE_CHECKING:
    from PIL import Image

    from detr_exp.detector import Detector
    from detr_exp.structures import Detections

log = logging.getLogger("detr_exp.predict")


def predict(cfg: DictConfig) -> None:
    """Predict into Hydra's output folder."""
    predict_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def predict_in(folder: Path, cfg: DictConfig) -> dict[str, Any]:
    """Write `detections.json` and `pictures/` into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/predict.yaml`.

    Returns:
        what the JSON file holds: COCO's `images`, `categories` and `annotations`, these with a `score`.

    Raises:
        ValueError: the checkpoint cannot be used, or there is no picture that can be read.
    """
    from detr_exp import build
    from detr_exp.detector import load
    from detr_exp.trainer.console import Console

    hardware = build.hardware(cfg) if OmegaConf.select(cfg, "trainer.hardware") is not None else None
    detector = load(cfg.checkpoint, hardware=hardware, allow_targets=cfg.allow_targets)
    paths = find_pictures(Path(cfg.source).expanduser())
    categories = [{"id": number, "name": name} for number, name in zip(detector.category_ids, detector.classes)]
    result: dict[str, Any] = {"images": [], "categories": categories, "annotations": []}
    console = Console("rich")
    with console.progress("predicting", len(paths)) as meter:
        for start in range(0, len(paths), cfg.batch_size):
            chunk = paths[start : start + cfg.batch_size]
            opened = list(readable(chunk))
            found = detector.predict([picture for _, picture in opened], cfg.threshold)
            for (path, picture), detections in zip(opened, found):
                add(result, path, picture, detections, detector)
                if cfg.pictures:
                    draw(folder / "pictures", path, picture, detections, detector)
            meter(advance=len(chunk))
    if not result["images"]:
        raise ValueError(f"source={cfg.source}: none of {len(paths)} pictures could be read; see the warnings above")
    (folder / "detections.json").write_text(json.dumps(result, ensure_ascii=False) + "\n")
    lowest = detector.threshold if cfg.threshold is None else cfg.threshold
    counts = f"{len(result['annotations'])} objects in {len(result['images'])} pictures"
    console.line(f"{counts}, scores above {lowest:.2f}: {folder}")
    return result


def find_pictures(source: Path) -> list[Path]:
    """The picture `source`, or the pictures in the folder `source` and below, in the order of their names.

    Raises:
        ValueError: there are none.
    """
    from detr_exp.data.picture import SUFFIXES

    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        what = "holds no picture" if source.is_dir() else "does not exist"
        raise ValueError(f"source={source} {what}; give a picture or a folder with {', '.join(sorted(SUFFIXES))} files")
    return found


def readable(paths: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """The pictures that can be read; for the others a warning."""
    from detr_exp.detector import as_picture

    for path in paths:
        try:
            yield path, as_picture(path)
        except ValueError as error:
            log.warning("left out: %s", error)


def add(result: dict[str, Any], path: Path, picture: Image.Image, found: Detections, detector: Detector) -> None:
    """Add a picture and its objects in COCO's form."""
    from detr_exp.metric.coco import encode

    image_id = len(result["images"]) + 1
    result["images"].append({"id": image_id, "file_name": str(path), "width": picture.width, "height": picture.height})
    masks = None if found.masks is None else encode(found.masks)
    for i, (score, label, box) in enumerate(zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist())):
        entry = {
            "id": len(result["annotations"]) + 1,
            "image_id": image_id,
            "category_id": detector.category_ids[label],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        if masks is not None:
            entry["segmentation"] = masks[i] | {"counts": masks[i]["counts"].decode()}
        if found.keypoints is not None:
            entry["keypoints"] = found.keypoints[i].flatten().tolist()
        result["annotations"].append(entry)


def draw(folder: Path, path: Path, picture: Image.Image, found: Detections, detector: Detector) -> None:
    """Save the picture with its objects under the name of its file, numbered where that is taken."""
    import numpy as np

    from detr_exp.ops.draw import draw_objects

    folder.mkdir(parents=True, exist_ok=True)
    name, number = folder / f"{path.stem}.jpg", 1
    while name.exists():
        number += 1
        name = folder / f"{path.stem}_{number}.jpg"
    drawn = draw_objects(
        np.asarray(picture),
        boxes_xyxy_px=found.boxes.numpy(),
        labels=found.labels.tolist(),
        names=detector.classes,
        scores=found.scores.tolist(),
        masks=None if found.masks is None else found.masks.numpy(),
        keypoints_px=None if found.keypoints is None else found.keypoints.numpy(),
        skeletons=[] if detector.keypoints is None else detector.keypoints.skeletons,
    )
    drawn.save(name, quality=92)


def main() -> None:
    cli.main(predict, "predict", USAGE)


if __name__ == "__main__":
    main()
