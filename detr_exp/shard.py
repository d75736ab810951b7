"""Write a data set as tar files with an index: `python -m detr_exp.shard data.root=... out=...`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from detr_exp import cli
from detr_exp.config.compose import refuse_unready
from detr_exp.terminal import say

USAGE = """\
Write a data set as shards: tar files of images with an index per split. Train on them with data=shards.

  python -m detr_exp.shard data.root=FOLDER out=SHARDS                     any known layout
  python -m detr_exp.shard data=coco data.root=FOLDER data.train.annotations=a.json data.train.images=photos out=SHARDS
  python -m detr_exp.train data=shards data.root=SHARDS                    or where they were copied: s3://bucket/SHARDS

  data, data.*      as in training
  out               folder; after an interruption, complete shards in it are compared with their images and kept
  megabytes         of a shard

Annotations are checked as before a training, and every shard is read again after it is written.
"""


def shard(cfg: DictConfig) -> None:
    """Write all splits of a data set.

    Raises:
        ValueError: the data cannot be read, have no files, or the shards cannot be written.
    """
    refuse_unready(cfg)
    from detr_exp import build
    from detr_exp.data.shard_writing import write_shards
    from detr_exp.data.table import TableSplit

    data = build.data(cfg)
    data.check(("train",))
    splits = {name: data.split(name) for name in data.content.read}
    tables = {name: split for name, split in splits.items() if isinstance(split, TableSplit)}
    if len(tables) < len(splits):
        raise ValueError(
            f"data={data.content.layout} has no files of one folder to write; write shards of a folder, "
            "data.root=FOLDER, and join several with data=many and layout: shards"
        )
    out = Path(str(cfg.out)).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {str(cfg.out)!r}, which cannot be made ({error.strerror}); choose another") from error
    for name, split in tables.items():
        write_shards(split, name, out, int(cfg.megabytes * 1e6), say)
    say(f"train on them: python -m detr_exp.train data=shards data.root={out}")


def main() -> None:
    cli.main(shard, "shard", USAGE)


if __name__ == "__main__":
    main()
