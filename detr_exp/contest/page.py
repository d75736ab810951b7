"""The page of the proof suite, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from detr_exp.contest.cells import OF_ALL, OF_CONTENDER
from detr_exp.contest.standings import LEARNED, LEVEL, Row, spread, standings
from detr_exp.values import Values

HEAD = "# Proof suite"
COLUMNS = {
    "contender": "---",
    "seeds": "--:",
    "mAP": "--:",
    f"{100 * LEVEL:g} % interval": "---",
    "deviation": "--:",
    "AP50": "--:",
    "epochs": "--:",
    "CPU minutes": "--:",
    "difference": "--:",
    f"{100 * LEVEL:g} % interval of it": "---",
    "p (Holm)": "--:",
    "verdict": "---",
}


def render(cells: Sequence[Values], values: Values) -> str:
    """The page.

    Args:
        cells: finished ones; see `cells.make`.
        values: of `conf/proof.yaml`.
    """
    reference = values["reference"]
    tables = standings(cells, reference, values["margin"])
    epochs = values["epochs"]
    lines = [HEAD if epochs is None else f"{HEAD}: {epochs} epochs", "", *_rules(cells, values)]
    for name in sorted(tables, key=[*values["sets"], *tables].index):
        about = values["sets"].get(name, {}).get("about") or name
        objects = f"{tables[name][0].cells[0]['images']} images are scored"
        lines += [
            "",
            f"## {name}",
            "",
            f"{about[0].upper()}{about[1:]}; {objects}. {_best(tables[name], reference)}".rstrip(),
            "",
        ]
        lines += _table(COLUMNS, [_cells(row, reference, values["margin"]) for row in tables[name]])
    lines += ["", "## AP of each class, mean over the seeds", "", *_classes(tables)]
    lines += ["", "## Contenders", "", *_contenders(cells, values)]
    lines += ["", *_different(cells), *_changed(cells, values)]
    return "\n".join(lines).rstrip() + "\n"


def _rules(cells: Sequence[Values], values: Values) -> Iterator[str]:
    resolution, epochs = values["resolution"], values["epochs"]
    if epochs is None:
        equal, length = "CPU time", f"{values['budget'] / 60:g} minutes of CPU time"
        chosen = "The number of epochs comes from a rehearsal of one and of two epochs, for everybody; the "
    else:
        equal, length, chosen = "number of epochs", f"{epochs} epochs", "The "
    yield (
        f"Detectors of this project and of others, trained on the same images with the same {equal}. Each training "
        f"has {length}, one thread, and images of {resolution} x {resolution} pixels. {chosen}schedule ends with the "
        f"last epoch. The CPU time is measured in the process that trains, without imports and predictions. No program "
        f"sees the images that are scored before it has ended: no epoch is selected, and the last weights count."
    )
    yield ""
    yield (
        f"Everybody is scored by pycocotools, from a file of COCO results. Differences are to *{values['reference']}*. "
        f"Intervals and p-values cover seeds and images ([Statistics](statistics.md)); p-values are corrected for the "
        f"number of comparisons on this page. *Equal* means that the difference is below {values['margin']:g}. A row "
        f"below {LEARNED:g} mAP has learned nothing, and counts for nobody. These are small sets and short trainings "
        f"from a classifier's weights: they do not say who is better after a long training or from COCO's weights. The "
        f"table of contenders says which settings were tried, on which images; nobody's were tuned further."
    )
    yield ""
    made = sum(cell["cpu_seconds"] for cell in cells) / 60
    machines = ", ".join(sorted({cell["conditions"]["cpu"] for cell in cells}))
    yield (
        f"{len(cells)} trainings with {made:.0f} CPU minutes; {machines}, one thread. `python -m detr_exp.proof"
        f"{'' if epochs is None else f' epochs={epochs}'}` makes the missing ones, and this page."
    )


def _best(rows: Sequence[Row], reference: str) -> str:
    """One sentence of who is ahead."""
    judged = {row.name: row.beside.verdict for row in rows if row.beside is not None}
    said = [
        f"{words} {', '.join(names)}"
        for verdict, words in (("behind", "is ahead of"), ("equal", "is equal to"), ("ahead", "is behind"))
        if (names := [f"*{name}*" for name in judged if judged[name] == verdict])
    ]
    open_ones = [f"*{name}*" for name in judged if judged[name] == "unknown"]
    said += [f"cannot be told from {', '.join(open_ones)}"] if open_ones else []
    return f"*{reference}* {'; '.join(said)}." if said else ""


def _cells(row: Row, reference: str, margin: float) -> list[str]:
    minutes = [cell["cpu_seconds"] / 60 for cell in row.cells]
    shown = [
        f"**{row.name}**" if row.name == reference else row.name,
        str(len(row.cells)),
        f"{row.mean:.3f}",
        "-" if row.interval is None else f"{max(0, row.interval[0]):.3f} .. {min(1, row.interval[1]):.3f}",
        _number(spread(row.cells)),
        _number(_mean(row.cells, "AP50")),
        str(row.cells[0]["epochs"]),
        f"{sum(minutes) / len(minutes):.1f}",
    ]
    if row.beside is None:
        return [*shown, *[""] * 3, "" if row.name == reference else "one seed is too few"]
    low, high = row.beside.interval
    words = {
        "behind": f"{reference} is better",
        "ahead": f"{row.name} is better",
        "equal": f"equal (within {margin:g})",
        "unknown": "cannot be told" + (f"; {row.beside.seeds} seeds may" if row.beside.seeds else ""),
        "nothing": f"{reference if row.has_learned else row.name} has learned nothing",
    }
    p = "" if row.beside.p is None else "< 0.001" if row.beside.p < 0.001 else f"{row.beside.p:.3f}"
    return [*shown, f"{row.beside.difference:+.3f}", f"{low:+.3f} .. {high:+.3f}", p, words[row.beside.verdict]]


def _classes(tables: dict[str, list[Row]]) -> Iterator[str]:
    for name, rows in tables.items():
        classes = list(rows[0].cells[0]["classes"])
        if len(classes) == 1:
            continue
        lines = []
        for row in rows:
            means = [sum(cell["classes"][one] for cell in row.cells) / len(row.cells) for one in classes]
            lines.append([row.name, *(f"{mean:.3f}" for mean in means)])
        yield from _table({name: "---", **dict.fromkeys(classes, "--:")}, lines)
        yield ""


def _contenders(cells: Sequence[Values], values: Values) -> Iterator[str]:
    rows = []
    for name in dict.fromkeys(cell["contender"] for cell in cells):
        own = [cell for cell in cells if cell["contender"] == name]
        known = values["contenders"].get(name, {})
        versions = ", ".join(f"{key} {one}" for key, one in own[0]["conditions"]["versions"].items())
        commits = ", ".join(dict.fromkeys(cell["commit"][:9] + cell["commit"][40:] for cell in own))
        told = [known.get(key, "") for key in ("about", "start", "tuning")]
        rows.append([name, *told[:2], f"{own[0]['parameters'] / 1e6:.2f} M", told[2], versions, commits])
    head = ("contender", "what", "starts from", "parameters", "settings tried", "versions", "commit of this project")
    yield from _table(dict.fromkeys(head, "---"), rows)


def _different(cells: Sequence[Values]) -> Iterator[str]:
    """What was accepted to differ between cells of a set or of a contender."""
    for kind, keys in (("set", OF_ALL), ("contender", OF_CONTENDER)):
        for name in dict.fromkeys(cell[kind] for cell in cells):
            own = [cell["conditions"] for cell in cells if cell[kind] == name]
            for key in keys:
                found = list(dict.fromkeys(str(one.get(key)) for one in own))
                if len(found) > 1:
                    yield f"Cells of {name} differ in {key}: {'; '.join(found)}."


def _changed(cells: Sequence[Values], values: Values) -> Iterator[str]:
    """Contenders that the configuration describes otherwise than they were trained."""
    for name in dict.fromkeys(cell["contender"] for cell in cells):
        made = next(cell["conditions"]["options"] for cell in cells if cell["contender"] == name)
        now = values["contenders"].get(name, {}).get("options", made)
        if made != now:
            was, is_now = set(_settings(made)), set(_settings(now))
            yield (
                f"*{name}* was trained with {', '.join(sorted(was - is_now)) or 'less'}, where the configuration now "
                f"has {', '.join(sorted(is_now - was)) or 'nothing'}."
            )


def _settings(options: object, path: str = "") -> Iterator[str]:
    """Single settings of nested options."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _settings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(options, list) and all(isinstance(one, str) for one in options):
        yield from (f"`{one}`" for one in options)
    else:
        yield f"`{path}={options}`"


def _table(columns: dict[str, str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (list(columns), list(columns.values()), *rows)]


def _mean(cells: Sequence[Values], key: str) -> float:
    return sum(cell[key] for cell in cells) / len(cells)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
