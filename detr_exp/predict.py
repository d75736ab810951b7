"""Find objects in pictures: `python -m detr_exp.predict checkpoint=... source=<picture, folder, film ...>`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.writing import write

USAGE = """\
Find objects: a COCO-style JSON file with scores, and every picture with boxes, masks, skeletons, labels and scores.

  python -m detr_exp.predict checkpoint=RUN_FOLDER source=photo.jpg
  python -m detr_exp.predict checkpoint=weights.pth source=FOLDER threshold=0.4
  python -m detr_exp.predict checkpoint=RUN_FOLDER source='photos/*.jpg' output=yolo pictures=false
  cat photo.jpg | python -m detr_exp.predict checkpoint=RUN_FOLDER source=-

  checkpoint         a file, the folder of a run (its best), or the id of a run
  source             a picture, a folder, a pattern, a film (pip install 'detr_exp[video]'), or - for standard input
  every              of a film, only each so many-th frame
  threshold          lowest score; null: where precision and recall balanced best in the checkpoint's evaluation
  batch_size         pictures at a time
  output             coco: detections.json | yolo: labels/*.txt, without scores | csv: detections.csv
  pictures           true draws what was found
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      packages of your own that the checkpoint's config names

Nothing is overwritten: a file or folder whose name is taken gets a number. Folders below the source are kept; pictures
whose names differ in their suffix only keep it (a.jpg.txt, a.png.txt). Pictures and parts of films that cannot be read
are left out and named at the end; the exit status is 1 then, and 2 if there was none that could be read. What was found
is on disk when an error or a signal ends the command.
"""

if TYPE_CHECKING:
    import numpy as np

    from detr_exp.inference.detector import Detector
    from detr_exp.inference.images import Item
    from detr_exp.structures import Detections

log = logging.getLogger("detr_exp.predict")


def predict(cfg: DictConfig) -> None:
    """Predict into Hydra's output folder."""
    predict_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def predict_in(folder: Path, cfg: DictConfig) -> Path:
    """Write what was found, and `pictures/`, into a folder.

    Args:
        folder: made if absent.
        cfg: see `conf/predict.yaml`.

    Returns:
        the file with what was found; with output=yolo the folder of files.

    Raises:
        ValueError: the checkpoint cannot be used, or there is no picture that can be read.
        UnreadableError: some pictures could not be read; the others are done.
    """
    from detr_exp.inference.images import UnreadableError, open_source
    from detr_exp.inference.on_data import open_detector
    from detr_exp.inference.writers import OUTPUTS, claimed
    from detr_exp.signals import Interrupt, Interrupted
    from detr_exp.trainer.console import Console

    if cfg.output not in OUTPUTS:
        raise ValueError(f"output is {cfg.output!r}; use one of {', '.join(OUTPUTS)}")
    items, count = open_source(str(cfg.source), cfg.every)
    detector = open_detector(cfg).folded()
    output = OUTPUTS[cfg.output](folder, detector)
    drawings = claimed(folder / "pictures", Path.mkdir) if cfg.pictures else None
    console = Console("rich")
    objects, pictures = 0, 0
    left_out: list[str] = []
    try:
        with console.progress("predicting", count) as meter, Interrupt() as interrupt:
            while interrupt.number is None and (chunk := list(islice(items, cfg.batch_size))):
                opened = list(readable(chunk, left_out))
                found = detector.predict([picture for _, picture in opened], cfg.threshold)
                for (item, picture), detections in zip(opened, found):
                    output.add(item.name, item.place, picture.shape[:2], detections)
                    objects += len(detections)
                for (item, picture), detections in zip(opened, found):
                    if drawings is not None:
                        draw(drawings / f"{item.place}.jpg", picture, detections, detector)
                pictures += len(opened)
                meter(advance=len(chunk))
    finally:
        path = output.close()
    if interrupt.number is not None:
        raise Interrupted(interrupt.number)
    if not pictures:
        raise ValueError(f"source={cfg.source}: none of {len(left_out)} pictures could be read; see the warnings above")
    lowest = detector.threshold if cfg.threshold is None else cfg.threshold
    console.line(f"{objects} objects in {pictures} pictures, scores above {lowest:.2f}: {path}")
    if detector.nonfinite:
        console.line(f"{detector.nonfinite} predictions were not finite: the network has diverged, train it again")
    if drawings is not None:
        console.line(f"drawn: {drawings}")
    if left_out:
        names = ", ".join(left_out[:8]) + (", ..." if len(left_out) > 8 else "")
        raise UnreadableError(f"{len(left_out)} of {pictures + len(left_out)} could not be read: {names}")
    return path


def readable(items: Sequence[Item], left_out: list[str]) -> Iterator[tuple[Item, np.ndarray]]:
    """The pictures that can be read; for the others a warning, and their names in `left_out`."""
    for item in items:
        try:
            yield item, item.read()
        except ValueError as error:
            log.warning("left out: %s", error)
            left_out.append(item.name)


def draw(path: Path, picture: np.ndarray, found: Detections, detector: Detector) -> None:
    """Save the picture with its objects."""
    from detr_exp.ops.draw import draw_objects

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_objects(
        picture,
        boxes_xyxy_px=found.boxes.numpy(),
        labels=found.labels.tolist(),
        names=detector.classes,
        scores=found.scores.tolist(),
        masks=None if found.masks is None else found.masks.numpy(),
        keypoints_px=None if found.keypoints is None else found.keypoints.numpy(),
        skeletons=[] if detector.keypoints is None else detector.keypoints.skeletons,
    )
    write(path, lambda file: drawn.save(file, "JPEG", quality=92))


def main() -> None:
    cli.main(predict, "predict", USAGE)


if __name__ == "__main__":
    main()
