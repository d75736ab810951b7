"""What a training starts from: words for weights, what is fetched, what is recorded."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_exp import build, start
from detr_exp.config.compose import compose
from detr_exp.inference.detector import load
from detr_exp.model.pretrained_rtdetr import to_official
from detr_exp.reproduce import changes, facts
from detr_exp.tensor_files import sha256_of
from detr_exp.tracker.base import RunRecord
from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.origin import identity
from detr_exp.training import train_in

NAME, FILE = "rtdetrv2_r18vd_120e_coco", "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"
SMALL = [
    "model=rtdetrv2_tiny",
    "model.image_size=[64,64]",
    "model.num_queries=20",
    "data=shapes",
    "data.num_classes=3",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user for weights; there is no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETR_EXP_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DETR_EXP_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def published(folder: Path, tiny_run: list[str]) -> Path:
    """A small network under the name, and in the layout, of a published file."""
    network = build.network(compose([*tiny_run, "data.num_classes=3", "seed=3"]))
    shapes = [(8, 8), (4, 4), (2, 2)]
    state = to_official(network.state_dict(), num_points=[4, 4, 4], spatial_shapes=shapes)
    torch.save({"ema": {"module": state}, "date": "x"}, folder / FILE)
    return folder / FILE


@pytest.mark.parametrize("kind", ["path", "folder", "url", "name", "file name", "repository", "id"])
def test_words_that_mean_one_file(kind: str, trained: Path, published: Path, tmp_path: Path) -> None:
    best = trained / files.BEST_TOTAL
    shutil.copytree(trained, tmp_path / "outputs" / "day" / "run")
    copied = Path("outputs/day/run") / files.BEST_TOTAL
    word, path = {
        "path": (str(best), best),
        "folder": (str(trained), best),
        "url": (best.as_uri(), best),
        "name": (NAME, published),
        "file name": (Path(FILE).stem, published),
        "repository": ("rtdetr_v2_r18vd", published),
        "id": (RunRecord.load(trained).id[:8], copied),
    }[kind]
    found = start.find(word)
    assert found is not None
    assert (found.path, found.sha256) == (path, sha256_of(path))


def test_an_existing_path_comes_first(trained: Path, published: Path, tmp_path: Path) -> None:
    shutil.copy(trained / files.BEST_TOTAL, tmp_path / NAME)
    found = start.find(NAME)
    assert found is not None
    assert found.path == Path(NAME)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rtdetrv2_r18vd_120e_cocco", r"did you mean model\.weights=rtdetrv2_r18vd_120e_coco .*model\.weights=null"),
        ("rtdetrv2_r50vd_6x_coco.pth", r"is not a file.*did you mean model\.weights=rtdetrv2_r50vd_6x_coco"),
        ("/no/where/x.pth", "is not a file, a run, or the name"),
        ("", r"is empty.*model\.weights=null"),
        ("file://", r"is empty.*model\.weights=null"),
        ("s3://bucket/x.pth", r"s3: is not read: an address begins with hf:.*model\.weights=null"),
        ("HF:owner/name", "HF: is not read: an address begins with hf:"),
        ("0123456789abcdef", "is not a file, a run, or the name"),
        ("resnet18_vd", r"weights of a backbone; use model\.backbone\.pretrained=resnet18_vd"),
        (
            "rtdetrv2_r50vd_6x_coco",
            r"DETR_EXP_OFFLINE is set.*rtdetrv2_r50vd_6x_coco_ema\.pth.*weights fetch rtdetrv2_r5",
        ),
    ],
)
def test_words_that_mean_none(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start.find(word)


def test_weights_of_another_network_say_which_they_are_for(published: Path) -> None:
    made_for = r"choose model=rtdetrv2_tiny model/backbone=tiny, or model\.weights=null"
    with pytest.raises(ValueError, match=f"does not fit.*{made_for}; {NAME} is for experiment={NAME}"):
        build.network(compose([*SMALL, f"model.weights={NAME}", "model/backbone=r18vd"]))
    with pytest.raises(ValueError, match=f"{published} does not fit.*{made_for}$"):
        build.network(compose([*SMALL, f"model.weights={published}", "model/backbone=r18vd"]))


def test_the_backbones_own_are_not_fetched_where_the_whole_network_has_weights(published: Path) -> None:
    words = [*SMALL, "model.backbone.pretrained=true"]
    with pytest.raises(ValueError, match=r"pretrained is true but resnet18_vd is not on this machine"):
        build.network(compose(words))
    assert build.network(compose([*words, f"model.weights={NAME}"]))


def test_a_run_records_what_it_started_from(
    published: Path, tiny_run: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_run, f"model.weights={NAME}", "model.backbone.pretrained=true"]
    train_in(tmp_path / "run", compose(words))
    hash_ = sha256_of(published)
    tags = RunRecord.load(tmp_path / "run").tags
    assert (tags["weights"], tags["weights.sha256"]) == (NAME, hash_)
    stored = files.load(tmp_path / "run" / files.BEST_TOTAL)
    assert stored["start"] == {"weights": NAME, "sha256": hash_}
    assert stored["config"]["model"]["weights"] == NAME
    told = " ".join(capfd.readouterr().out.split())
    share = r"\d+ of \d+ tensors; new: 9 class tensors for 6 classes"
    assert re.search(rf"{NAME} \(COCO\), sha256 {hash_[:12]}, {share} ", told), told
    assert facts(compose(words))["weights.sha256"] == hash_
    published.unlink()  # neither a checkpoint nor a run that goes on asks for it
    assert load(tmp_path / "run").network
    longer = compose([*words, "trainer.resume=run", "trainer.epochs=2", "trainer.max_steps=null"])
    train_in(tmp_path / "run", longer)
    assert RunRecord.load(tmp_path / "run").tags["weights.sha256"] == hash_
    assert files.load(tmp_path / "run" / files.BEST_TOTAL)["start"] == {"weights": NAME, "sha256": hash_}


def test_a_run_records_what_its_backbone_started_from(
    folder: Path, tiny_run: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = Path("backbone.pth")
    torch.save(build.network(compose(tiny_run)).backbone.state_dict(), file)
    words = [*tiny_run, f"model.backbone.pretrained={file}"]
    train_in(tmp_path / "run", compose(words))
    hash_ = sha256_of(file)
    told = " ".join(capfd.readouterr().out.split())
    assert f"random weights, the backbone from {file}, sha256 {hash_[:12]}" in told
    tags = RunRecord.load(tmp_path / "run").tags
    assert (tags["backbone"], tags["backbone.sha256"]) == (str(file), hash_)
    assert files.load(tmp_path / "run" / files.BEST_TOTAL)["start"] == {"backbone": str(file), "sha256": hash_}
    start_tags = {name: tag for name, tag in tags.items() if name.startswith("backbone")}
    assert changes(start_tags, facts(compose(words))) == ["code, packages, machine and data have not changed"]
    torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)
    (changed,) = changes(start_tags, facts(compose(words)))
    assert changed == f"backbone.sha256: was {hash_}, is {sha256_of(file)}"
    file.unlink()  # neither a checkpoint nor a run that goes on asks for it
    assert load(tmp_path / "run").network
    longer = compose([*words, "trainer.resume=run", "trainer.epochs=2", "trainer.max_steps=null"])
    train_in(tmp_path / "run", longer)
    assert RunRecord.load(tmp_path / "run").tags["backbone.sha256"] == hash_


def test_the_start_line_counts_what_is_new(published: Path, tiny_run: list[str]) -> None:
    network = build.network(compose([*tiny_run, "data.num_classes=5"]))
    found = start.find(NAME)
    assert found is not None
    total = sum(not name.endswith("num_batches_tracked") for name in network.state_dict())
    new = len(network.class_tensors())
    told = start.load(network, found, list("abcde"))
    assert told == f"{total - new} of {total} tensors; new: {new} class tensors for 5 classes"


def test_the_identity_of_a_run_has_the_word_and_the_published_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = build.plain(compose([*SMALL, "model.weights=rfdetr_nano_coco"]))
    with_hash = identity(config)
    monkeypatch.setattr("detr_exp.trainer.origin.named", lambda _: None)
    assert identity(config) != with_hash
    other = build.plain(compose([*SMALL, "model.weights=rfdetr_small_coco"]))
    assert identity(other) != identity(config)


def test_absent_weights_are_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    code = "import sys; from detr_exp.train import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, "experiment=rtdetrv2_r50vd_finetune", "data.root=nowhere"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "rtdetrv2_r50vd_6x_coco_ema.pth" in done.stderr
    assert done.stderr.strip().endswith("or start without: model.weights=null")
    assert not (tmp_path / "outputs").exists()
