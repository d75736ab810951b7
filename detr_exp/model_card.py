"""The model card of exported weights: `README.md`, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import html
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from detr_exp.published.source import HUB, is_remote, of_word
from detr_exp.published.table import UNKNOWN, named
from detr_exp.runs.swept import alone
from detr_exp.terminal import printable
from detr_exp.tracker.base import RunRecord
from detr_exp.values import Values

if TYPE_CHECKING:
    from detr_exp.inference.detector import Detector
    from detr_exp.tensor_files import Stored

METRICS = {  # ours -> in words
    "mAP": "AP, IoU 0.50 to 0.95",
    "mAP50": "AP, IoU 0.50",
    "mAP75": "AP, IoU 0.75",
    "mAP_small": "AP, small objects",
    "mAP_medium": "AP, medium objects",
    "mAP_large": "AP, large objects",
    "mAR": "AR, at most 100 detections",
}
KINDS = {"": "boxes", "segm_": "masks"}  # beginning of a metric's name -> what it measures
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# of an absolute path; they name people and machines
FOLDERS = re.compile(r"""(?<=[=\[,'"])(?:file:/)?[~/][^\[\],'"=]*/""")
LOADED = """\
import torch
from transformers import AutoImageProcessor, {auto}
from transformers.image_utils import load_image

folder = "{folder}"
processor = AutoImageProcessor.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
image = load_image("photo.jpg")
with torch.inference_mode():
    outputs = model(**processor({resized}, return_tensors="pt"))
size = [(image.height, image.width)]
"""
BOXES = """\
(found,) = processor.post_process_object_detection(outputs, threshold={threshold}, target_sizes=size)
for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):
    print(model.config.id2label[label.item()], round(score.item(), 3), [round(x, 1) for x in box.tolist()])
"""
MASKS = """\
(found,) = processor.post_process_instance_segmentation(
    outputs, threshold={threshold}, target_sizes=size, return_binary_maps=True
)
for segment, mask in zip(found["segments_info"], found["segmentation"]):
    print(model.config.id2label[segment["label_id"]], segment["score"], int(mask.sum()), "pixels")
"""


class Measured(NamedTuple):
    """A metric of the checkpoint: its name, of what, in words, and its value in 0..1."""

    name: str
    of: str
    words: str
    value: float


class Origin(NamedTuple):
    """What the training started from: in words, the licence of that, and its repository on the hub, if it has one."""

    text: str
    licence: str
    hub: str | None


def refuse_licence(licence: object) -> None:
    """Raises: ValueError: the hub does not take this as the identifier of a licence."""
    if licence is not None and not LICENCE.fullmatch(str(licence).lower()):
        raise ValueError(
            f"licence is {licence!r}; the hub needs an identifier: licence=apache-2.0, mit, cc-by-4.0, ..., or other"
        )


def model_card(state: Stored, detector: Detector, config: Values, licence: str | None, repo: str | None) -> str:
    """The content of `README.md`. It says of everything that is not known that it is unknown.

    Args:
        state: content of the checkpoint.
        detector: made from it; a record of the run beside the checkpoint has the command.
        config: content of `config.json`.
        licence: of these weights, as their author says.
        repo: `owner/name` on the hub, if that is where the card will be.
    """
    name = repo.partition("/")[2] if repo else _name_of(detector.path)
    if detector.at:  # its evaluation was one of the whole network
        state = {**state, "metrics": {}, "operating_points": {}}
    base, data, measured = _base(state), _data(state["config"]), _measured(state.get("metrics") or {})
    kind = config["architectures"][0]
    of_masks = kind.endswith("InstanceSegmentation")
    usage = _usage(of_masks, repo or ".", detector.threshold, detector.network.image_size)
    metrics = f"Unknown: {'this member' if detector.at else 'the checkpoint'} has not been evaluated."
    if measured:
        rows = [(one.words, one.of, f"{one.value:.4f}") for one in measured]
        metrics = (
            f"{_table(('metric', 'of', 'value'), rows)}\n\nAs COCO defines them, on the split `val` of {_code(data)}."
        )
    stated = f"`{licence}`, stated by their author." if licence else "unknown; their author has not stated one."
    start = f"{HUB}{repo}" if repo else "FOLDER"
    fingerprint = _code(state.get("data_fingerprint") or UNKNOWN)
    sections = {
        "Use": f"```python\n{usage}```\n\nTo train from them with detr_exp: `model.weights={start}`.",
        "Classes": _classes(state),
        "Metrics": metrics,
        "Data": f"Trained on {_code(data)}; fingerprint of its annotations: {fingerprint}.",
        "Training": f"{base.text}\n\n{_command(detector.path)}",
        "Licence": f"Of these weights: {stated} Of what they started from: {base.licence}. Of the data: {UNKNOWN}.",
    }
    head = f"Weights of a detector for {len(state['classes'])} classes, for `{kind}` of transformers."
    if detector.at:
        head += f" They are the member {_code(detector.at)} of a larger network, read from it without training."
        head += "" if detector.measured_at else " The threshold is that of the whole network."
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    front = _front_matter(name, config, of_masks, data, measured, licence, base.hub)
    return f"---\n{front}\n---\n\n# {printable(name)}\n\n{head}\n{body}"


def _front_matter(
    name: str, config: Values, of_masks: bool, data: str, measured: list[Measured], licence: str | None, hub: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-segmentation" if of_masks else "object-detection"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "_", data),
            dataset_name=data,
            dataset_split="val",
            metric_type=one.name,
            metric_name=f"{one.words}, {one.of}",
            metric_value=round(one.value, 4),
        )
        for one in measured
    ]
    return ModelCardData(
        license=str(licence).lower() if licence else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=[config["model_type"], "detr_exp"],
        base_model=hub,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _usage(of_masks: bool, folder: str, threshold: float, size: tuple[int, int]) -> str:
    height, width = size
    auto = "AutoModelForInstanceSegmentation" if of_masks else "AutoModelForObjectDetection"
    resized = f"image.resize(({width}, {height}), 2)" if of_masks else "image"  # its processor does not antialias
    found = (MASKS if of_masks else BOXES).format(threshold=round(threshold, 3))
    return LOADED.format(auto=auto, folder=folder, resized=resized) + found


def _measured(metrics: Values) -> list[Measured]:
    """Those that have a value: COCO's tool gives -1 where there are no such objects."""
    found = [(kind, name, metrics.get(kind + name)) for kind in KINDS for name in METRICS]
    return [
        Measured(kind + name, KINDS[kind], METRICS[name], value)
        for kind, name, value in found
        if value is not None and math.isfinite(value) and value >= 0
    ]


def _classes(state: Stored) -> str:
    """A row for each label; with AP and the threshold of the best F1 where they were measured."""
    classes = state["classes"]
    ap = [value for name, value in (state.get("metrics") or {}).items() if name.startswith("AP/")]
    best = [point["threshold"] for point in (state.get("operating_points") or {}).get("bbox", [])]
    columns: dict[str, Sequence[object]] = {"label": range(len(classes)), "class": list(map(_code, classes))}
    for title, values in (("AP", ap), ("threshold of the best F1", best)):
        if len(values) == len(classes):
            columns[title] = [f"{value:.3f}" if value >= 0 else "no objects" for value in values]
    return _table(columns, list(zip(*columns.values())))


def _base(state: Stored) -> Origin:
    record = state.get("start")
    if record is None and (base := state.get("base")) is not None:
        record = {"weights": base["path"], "sha256": base["sha256"]}
    if record is None:
        pretrained = state["config"]["model"].get("backbone", {}).get("pretrained")
        if not pretrained:
            return Origin("They started from random weights.", "nothing, they started from random weights", None)
        word = "its published weights" if pretrained is True else _code(_without_folders(f"={pretrained}")[1:])
        return Origin(f"They started from a pretrained backbone: {word}; its hash is {UNKNOWN}.", UNKNOWN, None)
    is_whole = "weights" in record
    word = str(record["weights"] if is_whole else record["backbone"])
    entry = named(word)
    hub = entry.hub if entry else of_word(word).repo if is_remote(word) else ""  # of the whole network
    shown = _without_folders(f"={word}")[1:]
    title = f"{_code(shown)} ({entry.data})" if entry else _code(shown)
    text = f"They started from {'' if is_whole else 'a pretrained backbone: '}{title}, SHA-256 `{record['sha256']}`."
    return Origin(text, f"{entry.licence} ({entry.name})" if entry else UNKNOWN, (hub or None) if is_whole else None)


def _command(path: Path) -> str:
    try:
        record = RunRecord.load(path.parent)
    except ValueError:
        return f"The command is {UNKNOWN}: no record of the run lies beside the checkpoint."
    words = [shlex.quote(printable(_without_folders(word))) for word in alone(record.words)]
    line = " ".join(["python -m detr_exp.train", *words])
    versions = ", ".join(f"{name} {record.tags.get(f'version/{name}', UNKNOWN)}" for name in ("detr_exp", "torch"))
    return f"```sh\n{line}\n```\n\nVersions: {versions}. Folders are left out of paths."


def _without_folders(override: str) -> str:
    """`key=value` with the last part of absolute paths in it."""
    return FOLDERS.sub("", re.sub(r"/+(?=$|[\],'\"])", "", override))


def _data(config: Values) -> str:
    """The name of the data: that of their folder, or of what makes them."""
    data = config.get("data") or {}
    if root := data.get("root"):
        return Path(str(root)).expanduser().name or UNKNOWN
    return str((data.get("source") or {}).get("_target_", UNKNOWN)).rpartition(".")[2]


def _name_of(path: Path) -> str:
    """That of the run, or of the file where it is not one of a run."""
    path = path.resolve()
    return path.parent.name if path.name.startswith("checkpoint") else path.stem


def _table(titles: Sequence[str] | dict[str, Sequence[object]], rows: Sequence[Sequence[object]]) -> str:
    lines = [list(titles), ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _code(text: object) -> str:
    """Text as it is, whatever Markdown or HTML would make of it, also in a table."""
    shown = printable(text)
    if re.search(r"[`|<>&\\\n]", shown) or shown != shown.strip() or not shown:
        return f"<code>{html.escape(shown).replace('|', '&#124;').replace('`', '&#96;').replace(chr(10), ' ')}</code>"
    return f"`{shown}`"
