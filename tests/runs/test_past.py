"""Finding the folders of runs, and reading them."""

import json
from datetime import datetime

import pytest

from detr_exp.config.mistakes import is_raised_by_us
from detr_exp.runs.page import render
from detr_exp.runs.past import PastRun, find, find_one, load_all
from detr_exp.tracker.base import RunRecord

LINES = [
    {"step": 5, "time/unix": 1000.0, "train/loss": 2.0, "train/epoch": 0.5},
    {"step": 10, "time/unix": 1900.0, "val/mAP": 0.4, "val/epoch": 1.0},
    {"step": 20, "time/unix": 2800.0, "val/mAP": 0.3, "val/epoch": 2.0},
    {"step": 20, "time/unix": 4600.0, "best/mAP": 0.4},
]


def make(folder, identity="0" * 32, lines=LINES, config="seed: 0\n", **facts):
    folder.mkdir(parents=True)
    RunRecord(id=identity, project="p", name=folder.name, **{"status": "ok", **facts}).save(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    return folder


def test_a_folder_a_sweep_and_ids(tmp_path):
    first = make(tmp_path / "outputs/day/first", "a" * 32)
    jobs = [make(tmp_path / f"outputs/sweeps/day/{n}", f"{n:032d}", parent="f" * 32) for n in (10, 9, 0)]
    (jobs[0] / "mlflow.json").write_text('{"run_id": "cafe0123"}')
    root = tmp_path / "outputs"
    assert find(str(first)) == [first]
    assert find(str(root / "sweeps"), root) == [jobs[2], jobs[1], jobs[0]]
    assert find("f" * 32, root) == find(["f" * 8], root) == [jobs[2], jobs[1], jobs[0]]
    assert find(["aaaaaa", str(first), "cafe01"], root) == [first, jobs[0]]
    assert find_one("aaaaaa", root) == first


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("aa", "no run in"),
        ("beefbeef", "no run in"),
        (".", "holds no runs"),
        ("ffffffff", "2 runs"),
        (True, "no run in"),
    ],
)
def test_words_that_mean_no_run_or_several(tmp_path, monkeypatch, word, told):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for n in range(2):
        make(tmp_path / f"outputs/{n}", f"{n:032d}", parent="f" * 32)
    with pytest.raises(ValueError, match=told):
        find_one(word, tmp_path / "outputs")


def test_what_a_run_came_to(tmp_path):
    run = PastRun.load(make(tmp_path / "run", status="ok"))
    assert (run.monitor, run.score, run.best["step"]) == ("val/mAP", 0.4, 10)
    assert run.curve("val/mAP") == [(1.0, 0.4), (2.0, 0.3)]
    assert run.curve("train/loss") == [(0.5, 2.0)]
    assert run.hours == pytest.approx(1.0), "by its lines: it was killed outright"
    assert PastRun.load(make(tmp_path / "other", seconds=7200.0)).hours == 2.0


def test_a_run_without_anything(tmp_path):
    run = PastRun.load(make(tmp_path / "run", lines=[], status="running"))
    assert (run.score, run.best, run.curve("val/mAP"), run.hours, run.class_table) == (None, {}, [], 0.0, [])
    assert run.status == "unfinished"


def test_the_metric_it_is_judged_by(tmp_path):
    masks = [{"step": 1, "val/mAP": 0.5, "val/segm_mAP": 0.4}]
    assert PastRun.load(make(tmp_path / "a", lines=masks)).score == 0.4
    told = PastRun.load(make(tmp_path / "b", lines=masks, config="trainer: {monitor: mAP}\n"))
    assert (told.monitor, told.score) == ("val/mAP", 0.5)


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = make(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "val/mA')
    assert len(PastRun.load(folder).lines) == len(LINES)


def test_the_score_is_what_a_sweep_ranks_by(tmp_path):
    """A loss counts downwards; a run that has diverged has none, however well it began."""
    losses = [{"step": step, "val/loss": loss} for step, loss in ((1, 3.0), (2, 2.0), (3, 4.0), (4, None))]
    run = PastRun.load(make(tmp_path / "a", lines=losses, config="trainer: {monitor: val/loss}\n"))
    assert (run.score, run.best["step"]) == (-2.0, 2)
    assert PastRun.load(make(tmp_path / "b", status="nan")).score is None
    killed = PastRun.load(make(tmp_path / "c", status="killed"))
    assert (killed.score, killed.reached) == (None, 0.4), "a part of a training is no result"


TORN = ["", "{", '{"id": "a', "[]", "null", "\0" * 50, "\ufffd{", "[" * 5_000]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "classes.json", "mlflow.json"])
def test_one_torn_file_ends_no_command_on_many_runs(tmp_path, caplog, name, torn):
    root = tmp_path / "outputs"
    whole, other = make(root / "a", "a" * 32), make(root / "b", "b" * 32)
    (other / name).write_text(torn)
    assert find("aaaaaa", root) == [whole], "looked up by id"
    loaded = load_all(find(str(root)))
    if name == "mlflow.json":
        assert [run.folder for run in loaded] == [whole, other], "it says nothing of the run but its id"
    else:
        assert [run.folder for run in loaded] == [whole]
        with pytest.raises(ValueError, match=rf"{name}.*(damaged|cannot be read)"):
            load_all([other])
    assert str(other / name) in caplog.text


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_config_that_was_cut_anywhere_ends_nothing(tmp_path, cut):
    """Half a YAML file may be a whole one of other content."""
    text = "data:\n  root: x\ntrainer:\n  monitor: mAP\n  epochs: 3\nseed: 0\n"
    make(tmp_path / "a", config=text[:cut])
    make(tmp_path / "b")
    assert {run.score for run in load_all(find(str(tmp_path)))} == {0.4}


def test_a_torn_line_in_a_ledger_hides_no_other(tmp_path, caplog):
    whole = json.dumps({"overrides": [], "hash": "h", "status": "failed", "seconds": 1.0, "reason": "x"})
    (tmp_path / "sweep.jsonl").write_text(f"{whole[:30]}\n{whole}\n{whole[:9]}")
    (run,) = load_all([], str(tmp_path))
    assert (run.record.name, run.status) == ("h", "failed")
    assert "sweep.jsonl: 1 of 2 lines" in caplog.text


FILES = ["run.json", "metrics.jsonl", "config.yaml", "classes.json", "mlflow.json", "sweep.jsonl"]
DAMAGE = [
    b"",
    b"\xff\xfe\x00",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"<html>\n",
    b"[]\n",
    b"3\n",
    b"{}\n",
    b"[" * 5000 + b"\n",
    b'{"step": "x", "val/mAP": 1}\n',
    b'{"step": 1, "val/mAP": [1]}\n',
    b'{"step": 1, "val/mAP": 1e999, "time/unix": "a"}\n',
    b"trainer: [1]\n",
    b"trainer: {monitor: 3}\n",
    b'!!python/object/apply:os.system ["exit"]\n',
    b'{"bbox": [3]}\n',
    b'{"bbox": [{"class": 1}]}\n',
    b'{"run_id": 3}\n',
    b'{"id": "a", "project": "p", "name": "n", "tags": {"a": [1]}}\n',
    b'{"id": "a", "project": "p", "name": "n", "words": [3]}\n',
    b'{"hash": 3, "status": 3, "reason": 3, "overrides": 3, "seconds": "x"}\n',
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage[:30].decode("latin-1").strip() or "empty")
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_one_run_are_told_and_end_nothing(tmp_path, name, damage):
    sweep, broken = tmp_path / "sweep", tmp_path / "sweep" / "a"
    make(broken, "a" * 32, status="ok")
    make(sweep / "b", "b" * 32, status="ok")
    (sweep / name if name == "sweep.jsonl" else broken / name).write_bytes(damage)
    runs = load_all(find(str(sweep), tmp_path), str(sweep))
    assert sweep / "b" in [run.folder for run in runs]
    assert "<html" in render(runs, title="t", about="x", now=datetime.now())
    assert find_one("bbbbbb", tmp_path) == sweep / "b"
    told = []
    try:
        PastRun.load(broken)
    except ValueError as error:
        told.append(error)
    assert all(is_raised_by_us(error) and name in str(error) for error in told)
