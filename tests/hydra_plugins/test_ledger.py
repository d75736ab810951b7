"""The ledger of a sweep."""

from __future__ import annotations

import math
import pickle
import threading
import time
from pathlib import Path

import pytest

from detr_exp.signals import Interrupted
from detr_exp.trainer.checkpoint_content import NonFiniteError
from detr_exp.trainer.run_status import PrunedError, status_of
from hydra_plugins.detr_exp._ledger import Entry, Job, Ledger, best_first, by_point, first_line, judged
from hydra_plugins.detr_exp._parent import best_values


def entry(number: int, status: str = "ok", metric: float | None = None) -> Entry:
    return Entry(number, [f"a={number}"], f"h{number}", status, metric, 1.0, None)


def test_the_last_line_of_a_run_counts_and_a_cut_off_line_does_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.latest() == {}
    ledger.append(entry(0, "failed"))
    ledger.append(entry(1))
    with open(ledger.path, "a") as file:
        file.write('{"number": 2, "over')
    ledger.append(entry(0, "ok", 0.5))
    assert [(e.number, e.status) for e in ledger.entries()] == [(0, "failed"), (1, "ok"), (0, "ok")]
    assert ledger.latest()["h0"].metric == 0.5


def test_many_can_write_at_once(tmp_path: Path) -> None:
    def write(start: int) -> None:
        for number in range(start, start + 25):
            Ledger(tmp_path).append(entry(number))

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 25, 50, 75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.number for e in Ledger(tmp_path).entries()) == list(range(100))


def test_it_holds_no_secrets(tmp_path: Path) -> None:
    Ledger(tmp_path).record(Job(0, [], [], "h"), time.monotonic(), "failed", reason="no http://me:secret@host")
    assert "secret" not in (tmp_path / "sweep.jsonl").read_text()


@pytest.mark.parametrize(
    ("value", "status"), [(0.5, "ok"), (1, "ok"), (None, "ok"), (math.nan, "nan"), (math.inf, "nan"), ("x", "failed")]
)
def test_a_result_is_judged(value: object, status: str) -> None:
    assert judged(value)[0] == status
    assert (judged(value)[2] is None) == (status == "ok")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyError("x"), "failed"),
        (NonFiniteError("x"), "nan"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), "oom"),
        (Interrupted(15), "killed"),
        (KeyboardInterrupt(), "killed"),
        (PrunedError(0.5, 3), "pruned"),
    ],
)
def test_endings_have_names(error: BaseException, status: str) -> None:
    assert status_of(error) == status


def test_out_of_memory_on_a_device_has_a_name() -> None:
    torch = pytest.importorskip("torch")
    assert status_of(torch.OutOfMemoryError("x")) == "oom"


def test_the_first_line_of_an_error_says_its_kind_unless_it_is_ours() -> None:
    assert first_line(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(NonFiniteError("bad\nvery")) == "bad"


def test_finished_runs_come_first_by_metric() -> None:
    entries = [entry(0, "ok", 0.1), entry(1, "failed"), entry(2, "pruned", 0.3), entry(3, "ok", 0.9), entry(4, "ok")]
    jobs = [Job(e.number, [], [], e.hash) for e in entries] + [Job(5, [], [], "h5")]
    assert [job.number for job, _ in best_first(jobs, {e.hash: e for e in entries})] == [3, 2, 0, 1, 4, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_result_that_is_no_number_is_ranked_last(bad: float | None, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number, metric in enumerate([bad, 0.0, bad, -0.5]):
        ledger.append(entry(number, "ok", metric))
    jobs = [Job(number, [], [], f"h{number}") for number in range(4)]
    assert [job.number for job, _ in best_first(jobs, ledger.latest())] == [1, 3, 0, 2]
    for number in (1, 3):
        ledger.append(entry(number, "nan"))
    assert by_point(ledger.latest().values()) == [], "no run is the best"
    assert best_values(tmp_path, ledger, []) == {}


def test_the_best_of_a_sweep_with_seeds_is_the_best_mean_and_not_the_luckiest_seed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    found = [(1, 0, 0.2), (1, 1, 0.9), (2, 0, 0.6), (2, 1, 0.7), (3, 0, 0.8), (4, 0, None)]
    for number, (lr, seed, value) in enumerate(found):
        swept = [f"seed={seed}", f"optim.lr={lr}"]
        ledger.append(Entry(number, swept, f"h{number}", "ok", value, 1.0, None))
    entries = ledger.latest().values()
    assert [[entry.number for entry in point] for point in by_point(entries)] == [[4], [3, 2], [1, 0]]
    raced = by_point(entries, raced=True)
    assert [[entry.number for entry in point] for point in raced] == [[3, 2], [1, 0], [4]], "3 left after one seed"
    values = best_values(tmp_path, ledger, raced[0])
    assert values == pytest.approx({"best/monitor": 0.65, "best/deviation": 0.0707, "best/seeds": 2}, abs=1e-4)


def test_only_new_lines_are_read_and_none_goes_into_a_pickle(tmp_path: Path) -> None:
    """A sweep of thousands looks at the ledger after every run, and hands its task to every process."""
    ledger, other = Ledger(tmp_path), Ledger(tmp_path)
    for number in range(300):  # more than is read at once
        other.append(entry(number))
    assert [found.number for found in ledger.entries()] == list(range(300))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(b"-" * (len(whole) - 1) + b"\n")
    other.append(entry(300))
    assert [found.number for found in ledger.entries()] == list(range(301)), "the first lines are not read again"
    assert len(pickle.dumps(ledger)) < 1000
    ledger.path.unlink()
    assert ledger.entries() == []


def test_a_truncated_line_longer_than_a_block_is_removed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(entry(0))
    with open(ledger.path, "a") as file:
        file.write("x" * 10_000)
    ledger.append(entry(1))
    assert [found.number for found in Ledger(tmp_path).entries()] == [0, 1]
