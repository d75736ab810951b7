"""The table of published weights, `weights.csv`: who trained what on which data, and where its file is.

What nobody has published stands there as `unknown`.
"""

from __future__ import annotations

import csv
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

TABLE = Path(__file__).with_name("weights.csv")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """One file of weights.

    Attributes:
        name: what it is called here.
        kind: `detector` or `backbone`.
        recipes: experiments whose network it is for, those it is the result of among them; separated by spaces.
        model: option of the group `model` that it fits; empty for a backbone.
        backbone: option of `model/backbone` that it fits, and further overrides; empty: that of the model.
        classes: how many labels it tells apart.
        data: what it was trained on.
        published: its accuracy, as its authors say.
        licence: of the weights.
        url: of the file; `pypi:name==version/path` if a Python package contains it; empty: it is on the hub only.
        hash: `md5:` or `sha256:` and hex digits, as published; else `unknown`.
        size: in bytes.
        hub: repository `owner/name` on the Hugging Face hub, or empty.
        hub_file: the file in it.
        revision: of the repository.
    """

    name: str
    kind: str
    recipes: str
    model: str
    backbone: str
    classes: str
    data: str
    published: str
    licence: str
    url: str
    hash: str
    size: str
    hub: str
    hub_file: str
    revision: str

    @property
    def file(self) -> str:
        """The name of the file, where it comes from; hosts that give files numbers are told it in the address."""
        if not self.url:
            return self.hub_file
        address = urlsplit(self.url)
        return parse_qs(address.query).get("name", [Path(address.path).name])[0]

    @property
    def network(self) -> str:
        """Overrides that choose the network it fits."""
        if self.kind == "backbone":
            return f"model/backbone={self.backbone}"
        if experiments := self.recipes.split():
            return f"experiment={experiments[0]}"
        return f"model={self.model}" + (f" model/backbone={self.backbone}" if self.backbone else "")

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"{self.name} ({self.data})"


@functools.cache
def table() -> dict[str, Entry]:
    """Name -> entry, in the order of the file."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        return {row["name"]: Entry(**row) for row in csv.DictReader(file)}


@functools.cache
def names() -> dict[str, str]:
    """Every word that means an entry -> the entry's name: its own, that of its file or of its repository."""
    known: dict[str, str] = {}
    several = set()
    for entry in table().values():
        for word in {Path(entry.file).stem, entry.hub.rpartition("/")[2]} - {"", entry.name}:
            several |= {word} if word in known else set()
            known[word] = entry.name
    return {word: name for word, name in known.items() if word not in several} | {name: name for name in table()}


def named(word: str) -> Entry | None:
    """The entry that a word means, if any."""
    name = names().get(word)
    return None if name is None else table()[name]


def nearest(word: str, kind: str | None = None) -> list[str]:
    """Names that are spelt alike, the most alike first."""
    known = [entry.name for entry in table().values() if kind in (None, entry.kind)]
    folded = word.lower().replace("-", "_")
    parts = [name for name in known if len(folded) > 4 and (folded in name or name in folded)]
    return list(dict.fromkeys([*difflib.get_close_matches(folded, known, 3, 0.7), *parts]))[:4]


def of_timm(name: str) -> Entry | None:
    """The backbone weights for a network of timm, if any are in the table."""
    fitting = f"timm model.backbone.name={name}"
    return next((entry for entry in table().values() if entry.backbone == fitting), None)


def of_choices(choices: Mapping[str, str | None]) -> Entry:
    """The detector for the chosen options of a config: that of the experiment, else the only one for the network.

    Args:
        choices: group -> option.

    Raises:
        ValueError: there is none, or there are several.
    """
    detectors = [entry for entry in table().values() if entry.kind == "detector"]
    experiment, model, backbone = (choices.get(group) for group in ("experiment", "model", "model/backbone"))
    fitting = [e for e in detectors if e.model == model and e.backbone.partition(" ")[0] in ("", backbone)]
    plain = [entry for entry in fitting if " " not in entry.backbone]  # without further overrides
    fitting = [entry for entry in fitting if experiment in entry.recipes.split()] or plain
    if len(fitting) == 1:
        return fitting[0]
    chosen = f"model={model} model/backbone={backbone}"
    if not fitting:
        raise ValueError(
            f"model.weights=published, but nothing is published for {chosen}; python -m detr_exp.weights list shows "
            "what there is, or give a file: model.weights=<file>"
        )
    raise ValueError(
        f"model.weights=published, but {len(fitting)} are published for {chosen}; say which: "
        + ", ".join(f"model.weights={entry.name}" for entry in fitting)
    )
