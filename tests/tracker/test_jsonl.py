"""Files of JSON lines, complete and truncated."""

import json

import pytest

from detr_exp.tracker.jsonl import JsonLines, Reader


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_at_once_and_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = JsonLines(path)
    values = {"val/mAP": 0.1 + 0.2, "bad": float("nan"), "worse": float("inf"), "count": 3, "class": "größe"}
    journal.append(7, values)
    (line,) = [json.loads(text, parse_constant=pytest.fail) for text in path.read_text().splitlines()]
    assert line == {"step": 7, "val/mAP": 0.1 + 0.2, "bad": None, "worse": None, "count": 3, "class": "größe"}


def test_a_torn_last_line_is_removed_on_opening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "val')
    JsonLines(path).append(3, {})
    assert lines_of(path) == [{"step": 1}, {"step": 3}]


def test_rewinding_keeps_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = JsonLines(path)
    for step in (1, 2, 3, 3, 4):
        journal.append(step, {})
    journal.rewind(3)
    journal.append(4, {"again": 1})
    assert lines_of(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 3}, {"step": 4, "again": 1}]
    assert not list(tmp_path.glob(".*"))


def test_a_reader_sees_complete_lines_once(tmp_path, monkeypatch):
    monkeypatch.setattr("detr_exp.tracker.jsonl.CHUNK", 30)
    path = tmp_path / "metrics.jsonl"
    reader = Reader(path)
    assert reader.peek() == ([], 0)
    journal = JsonLines(path)
    for step in range(50):
        journal.append(step, {"a": "x" * (step % 7) * 20})
    path.open("a").write('{"step": 50')
    seen = []
    while True:
        lines, position = reader.peek()
        assert reader.peek() == (lines, position)  # looking is not taking
        if not lines:
            break
        seen += lines
        reader.position = position
    assert [line["step"] for line in seen] == list(range(50))


def test_lines_that_cannot_be_read_are_named_and_the_others_kept(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "va{"step": 3}\n\xff\xfe\n' + b"[" * 20_000 + b'\n{"step": 4}\n')
    assert [line["step"] for line in JsonLines.read(path)] == [1, 4]
    assert "metrics.jsonl: 3 of 5 lines cannot be read" in caplog.text
    reader = Reader(path)
    assert [line["step"] for line in reader.peek()[0]] == [1, 4]
    assert reader.peek()[1] == path.stat().st_size, "they are passed by"
    journal = JsonLines(path)
    journal.rewind(3)
    journal.append(5, {})
    assert lines_of(path) == [{"step": 1}, {"step": 5}]
