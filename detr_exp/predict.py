"""Detect objects in images: `python -m detr_exp.predict checkpoint=... source=<image, folder, video ...>`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.terminal import counted
from detr_exp.values import values_of
from detr_exp.writing import write

USAGE = """\
Detect objects. Writes COCO-style JSON with scores, and each image with boxes, masks, skeletons, labels and scores.

  python -m detr_exp.predict checkpoint=RUN_FOLDER source=photo.jpg
  python -m detr_exp.predict checkpoint=weights.pth source=FOLDER threshold=0.4
  python -m detr_exp.predict checkpoint=RUN_FOLDER source='photos/*.jpg' output=yolo draw=false
  cat photo.jpg | python -m detr_exp.predict checkpoint=RUN_FOLDER source=-

  checkpoint         a file, a run folder (its best checkpoint) or a run id
  at                 at.layers=2 at.queries=100 at.image_size=[320,320]: a smaller member of the network, without
                     training; or at.name=..., of a point that detr_exp.pareto has found
  source             an image, a folder, a glob pattern, a video (pip install 'detr_exp[video]'), - for stdin,
                     https://... of an image or a video (kept in the cache), a camera (0), or rtsp://...
  every              of a video, a camera or a stream, use every n-th frame
  threshold          lowest score; null: the threshold with the best F1 in the checkpoint's evaluation
  batch_size         images at a time
  tiles              size and overlap: find in parts of each image, and merge (docs/data.md); whole: no tiles;
                     null: as trained
  output             coco: detections.json | yolo: labels/*.txt, without scores | csv: detections.csv
  draw               true: save each image with its detections drawn, in drawings/
  show               true: show each drawing in a window, by Tk; q closes it, which ends the command
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      custom packages that the checkpoint's config may name

No file is overwritten: if a name exists, a number is appended. Subfolders of the source are preserved. Images whose
names differ only in the suffix keep it (a.jpg.txt, a.png.txt). Images and parts of videos that cannot be read are
skipped and listed at the end; the exit status is then 1, or 2 if no image could be read. If an error or a signal ends
the command, the detections so far are on disk: Ctrl-C ends a camera.
"""

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from detr_exp.inference.detector import Detector
    from detr_exp.structures import Detections


def predict(cfg: DictConfig) -> None:
    """Predict into Hydra's output folder."""
    predict_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def predict_in(folder: Path, cfg: DictConfig) -> Path:
    """Write detections, and `drawings/`, into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/predict.yaml`.

    Returns:
        the file of detections; with output=yolo the folder of files.

    Raises:
        ValueError: the checkpoint cannot be used, or no image can be read.
        UnreadableError: some images could not be read; the others are done.
    """
    from detr_exp.data.tiles import tiles_of
    from detr_exp.inference.images import UnreadableError, open_source, readable
    from detr_exp.inference.on_data import open_detector
    from detr_exp.inference.window import Window
    from detr_exp.inference.writers import OUTPUTS, claimed
    from detr_exp.signals import Interrupt, Interrupted
    from detr_exp.trainer.console import Console

    if cfg.output not in OUTPUTS:
        raise ValueError(f"output is {cfg.output!r}; use one of {', '.join(OUTPUTS)}")
    window = Window("detr_exp") if cfg.show else None
    detector = open_detector(cfg).folded()
    items, count = open_source(str(cfg.source), cfg.every, detector.channels)
    at_once = cfg.batch_size if count else 1  # what is live is shown at once
    if cfg.tiles is not None:
        detector.tiles = tiles_of(values_of(cfg)["tiles"], "tiles")
    output = OUTPUTS[cfg.output](folder, detector)
    drawings = claimed(folder / "drawings", Path.mkdir) if cfg.draw else None
    console = Console("rich")
    objects, images = 0, 0
    skipped: list[str] = []
    try:
        with console.progress("predicting", count) as meter, Interrupt() as interrupt:
            while interrupt.number is None and (chunk := list(islice(items, at_once))):
                opened = list(readable(chunk, skipped))
                predictions = detector.predict([image for _, image in opened], cfg.threshold)
                for (item, image), detections in zip(opened, predictions):
                    output.add(item.name, item.stem, image.shape[:2], detections)
                    objects += len(detections)
                images += len(opened)
                meter(advance=len(chunk))
                for (item, image), detections in zip(opened, predictions):
                    if drawings is None and window is None:
                        continue
                    drawing = drawn(image, detections, detector)
                    if drawings is not None:
                        save(drawings / f"{item.stem}.jpg", drawing)
                    if window is not None and interrupt.number is None:
                        window.show(drawing, item.name, None if item.moves else interrupt)
                if window is not None and not window.is_open:
                    break
    finally:
        path = output.close()
        if window is not None:
            window.close()
    if interrupt.number is not None:
        raise Interrupted(interrupt.number)
    if not images:
        raise ValueError(f"source={cfg.source}: none of {len(skipped)} images could be read; see the warnings above")
    lowest = detector.threshold if cfg.threshold is None else cfg.threshold
    remark = detector.remark if cfg.threshold is None else ""
    with_member = f" by {detector.title}" if detector.at else ""
    found = f"{counted(objects, 'object')} in {counted(images, 'image')}{with_member}"
    console.line(f"{found}, scores above {lowest:.2f}{remark}: {path}")
    if detector.nonfinite:
        console.line(f"{detector.nonfinite} predictions were not finite: the network has diverged, train it again")
    if drawings is not None:
        console.line(f"drawings: {drawings}")
    if skipped:
        names = ", ".join(skipped[:8]) + (", ..." if len(skipped) > 8 else "")
        raise UnreadableError(f"{len(skipped)} of {images + len(skipped)} could not be read: {names}")
    return path


def drawn(image: np.ndarray, detections: Detections, detector: Detector) -> Image.Image:
    """The image with its detections drawn on it."""
    from detr_exp.ops.draw import draw_objects

    return draw_objects(
        image,
        boxes_xyxy_px=detections.boxes.numpy(),
        labels=detections.labels.tolist(),
        names=detector.classes,
        scores=detections.scores.tolist(),
        masks=None if detections.masks is None else detections.masks.numpy(),
        keypoints_px=None if detections.keypoints is None else detections.keypoints.numpy(),
        skeletons=[] if detector.keypoints is None else detector.keypoints.skeletons,
    )


def save(path: Path, drawing: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: drawing.save(file, "JPEG", quality=92))


def main() -> None:
    cli.main(predict, "predict", USAGE)


if __name__ == "__main__":
    main()
