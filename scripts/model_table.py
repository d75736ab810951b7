"""Write docs/models.md: what every published recipe builds, beside what its authors say.

Published numbers are read from the headers in conf/experiment. Parameters and operations are counted on the meta
device, so nothing is computed or downloaded.

    python scripts/model_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from detr_exp.benchmark import gigaflops, of_recipe
from detr_exp.benchmark import published as recipes
from detr_exp.config.compose import CONF_DIR

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "models.md"
INTRODUCTION = """\
# Models

Every published recipe, to be trained by `python -m detr_exp.train experiment=<name>`. This page is written by
`python scripts/model_table.py`.

**Parameters** are those of the network in training, with as many labels as the data have: 80 for COCO (91 with RF-DETR,
whose labels are category ids), 20 for Pascal VOC, 1 for keypoints. RF-DETR's own package counts 1.8 M more for Base,
a block whose output nobody reads, 0.3 M more for keypoints, which have 91 labels there, and for Seg Large the 35.9 M
that we count.

**GFLOPs** are two for each multiply-add of convolutions, matrix products and attention, for one image at the size of
the recipe. Norms, activations and deformable sampling are not counted. The network is the deployed one: without the
layers, heads and query groups that only train, norms and parallel convolutions folded; masks are those of all queries.
RT-DETR's authors count the same way, but before parallel convolutions are folded; without folding, our numbers are
theirs to within 2 %. RF-DETR's authors give none.

**Accuracy** is of boxes unless it says otherwise, in percent, on COCO val2017. A dash: the source has no number.

| experiment | parameters | published (M) | GFLOPs | published | accuracy, published | ours | source |
|---|--:|--:|--:|--:|---|---|---|
"""
PUBLISHED = re.compile(r"^# Published: (.+) \((.+)\)\.$", re.MULTILINE)
OURS = re.compile(r"^# Ours: (.+)\.$", re.MULTILINE)


def page() -> str:
    return INTRODUCTION + "".join(f"{row(name)}\n" for name in recipes())


def row(name: str) -> str:
    """The line of a recipe."""
    said = published(name)
    with torch.device("meta"):
        made = of_recipe(name)
        total = sum(parameter.numel() for parameter in made.parameters())
        operations = gigaflops(made.deploy())
    sizes = [f"{total:,}", said["parameters"], f"{operations:.1f}", said["GFLOPs"]]
    return f"| {' | '.join([name, *sizes, said['accuracy'], said['ours'], said['source']])} |"


def published(name: str) -> dict[str, str]:
    """What the header of a recipe says; a dash where it does not.

    Raises:
        ValueError: the header is not written like the others.
    """
    header = (CONF_DIR / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    found, ours = PUBLISHED.search(header), OURS.search(header)
    if found is None or ours is None:
        raise ValueError(f"{name}.yaml needs the lines '# Published: <numbers> (<source>).' and '# Ours: <number>.'")
    numbers, source = found.groups()
    said = {"accuracy": numbers.partition(" on ")[0], "ours": ours[1], "source": source}
    for key, unit in (("parameters", "M parameters"), ("GFLOPs", "GFLOPs")):
        match = re.search(rf"([\d.]+) {unit}", numbers)
        said[key] = match[1] if match else "–"
    return said


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
