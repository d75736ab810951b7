"""Look at the mistakes: `python -m detr_exp.review checkpoint=... [data.split=val]` writes one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.terminal import counted, say
from detr_exp.values import Values
from detr_exp.writing import write

if TYPE_CHECKING:
    from detr_exp.data.content import Split
    from detr_exp.inference.cross_fit import CrossFitted
    from detr_exp.metric.errors import Judged

USAGE = """\
Write one self-contained HTML page to look at what a detector gets wrong, and at labels that may be wrong.

  python -m detr_exp.review checkpoint=RUN_FOLDER
  python -m detr_exp.review checkpoint=RUN_FOLDER data.split=test
  python -m detr_exp.review checkpoint=[FOLD0,FOLD1,FOLD2] data=coco data.root=FOLDER data.split=train

  checkpoint         a file, a run folder (its best checkpoint) or a run id; of several, each judges images that it
                     was not trained on
  weights            ema or raw; null: the weights of the file
  data.split         val, train, test or held_out
  data, data.root    another data set, or its new folder; also data.num_workers
  batch_size         null: as in training
  threshold          lowest score that is shown at first; null: where F1 is highest. The page has a slider
  images             how many images are on the page at most
  megabytes          size of the page at most
  metric             pycocotools or fast; null: the checkpoint's
  trainer/hardware   auto, cpu, cuda, mps; null: the checkpoint's
  allow_targets      custom packages that the checkpoint's config may name
"""
OVERHEAD = 200_000  # bytes of the page beside images and boxes
OUTLINES = 0.3  # share of the page that masks and keypoints may take


def review(cfg: DictConfig) -> None:
    """`review.html` in Hydra's output folder."""
    review_in(Path(HydraConfig.get().runtime.output_dir), cfg)


def review_in(folder: Path, cfg: DictConfig) -> Path:
    """Write `review.html` into a folder, made if absent.

    Raises:
        ValueError: checkpoints or data cannot be read, or do not fit together.
    """
    from detr_exp.inference.cross_fit import cross_fitted
    from detr_exp.metric.errors import costs, judged
    from detr_exp.metric.suspects import suspects
    from detr_exp.runs import review_page

    names = [str(name) for name in (cfg.checkpoint if OmegaConf.is_list(cfg.checkpoint) else [cfg.checkpoint])]
    done = cross_fitted(cfg, names)
    images = judged(done.metric)
    doubtful = suspects(images)
    threshold = done.values["F1_threshold"] if done.values["F1"] > 0 else done.opened.detector.threshold
    threshold = threshold if cfg.threshold is None else cfg.threshold
    ap50, by_kind = costs(list(images.values()), len(done.metric.classes))
    shown = set(review_page.places(doubtful, images, threshold, cfg.images))
    doubtful = [one for one in doubtful if one.image_id in shown]
    split = done.opened.data.split(cfg.data.split)
    least = min(review_page.LEAST_SCORE, threshold / 2)
    indices = [index for index, number in enumerate(split.image_ids) if number in shown]
    entries = _entries(done, split, indices, images, least, OUTLINES * cfg.megabytes * 1e6 / max(1, len(shown)))
    room = cfg.megabytes * 1e6 - OVERHEAD - sum(len(str(entry)) for entry in entries)
    for entry, index in zip(entries, indices):
        pixels = split.image(index, (min(1280, split.size(index)[0]), min(1280, split.size(index)[1])))
        entry["pixels"] = review_page.thumbnail(pixels, room / len(entries))
    facts: Values = {
        "title": f"Review of {_title(names)} on {cfg.data.split}",
        "about": " ".join(names),
        "classes": [list(pair) for pair in zip(done.metric.classes, done.metric.category_ids)],
        "threshold": round(float(threshold), 2),
        "least": least,
        "ap50": ap50,
        "costs": by_kind,
        "all_images": len(images),
        "split": cfg.data.split,
        "judges": names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "review.html"
    write(path, review_page.render(entries, doubtful, facts, datetime.now()))
    say(f"{counted(len(images), 'image')}, {counted(len(doubtful), 'suspected label')}; written to {path}")
    return path


def _entries(
    done: CrossFitted, split: Split, indices: Sequence[int], images: Mapping[int, Judged], least: float, most: float
) -> list[Values]:
    """What the page knows of some images; `most` letters of each are outlines."""
    from detr_exp.metric.errors import annotations_of
    from detr_exp.runs.review_page import image_entry
    from detr_exp.runs.shapes import outlines

    annotations, data, entries = annotations_of(done.metric), done.opened.data, []
    skeletons = {} if data.keypoints is None else dict(zip(data.category_ids, data.keypoints.skeletons))
    for index in indices:
        number = split.image_ids[index]
        one, own = images[number], annotations[number]
        entries.append(
            image_entry(
                number,
                _name(split.name(index), done.opened.cfg.data.get("root")),
                split.size(index),
                one,
                least,
                annotations=[annotation["number"] for annotation in own],
                outlines=outlines(done.metric, number, own, one.order[one.scores >= least], skeletons, most),
                seen=number in done.seen,
                judge=done.judges[number],
            )
        )
    return entries


def _name(path: str, root: str | None) -> str:
    """A path, below the data's root as seen from there."""
    inner = os.path.relpath(path, root) if root and os.path.isabs(path) else path
    return path if inner.startswith("..") else inner


def _title(names: Sequence[str]) -> str:
    shown = Path(names[0]).name
    return shown if len(names) == 1 else f"{len(names)} detectors"


def main() -> None:
    cli.main(review, "review", USAGE)


if __name__ == "__main__":
    main()
