import io
import logging
import sys
import warnings

import pytest

from detr_exp.terminal import ConsoleHandler, duration, guard_messages, printable, python, say


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain, with ümlaut\tand\nlines", "plain, with ümlaut\tand\nlines"),
        ("\x1b[2Jcleared", "\\x1b[2Jcleared"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b31m", "\\x9b31m"),
        ("half \udce9", "half \\udce9"),
        ("data.token=k1", "data.token=***"),
    ],
)
def test_what_steers_a_terminal_is_written_out_and_secrets_are_masked(text, safe):
    assert printable(text) == safe
    printable(text).encode()


def test_say_prints_lines(capsys):
    say("one\x1b", ValueError("password=k1"))
    assert capsys.readouterr().out == "one\\x1b\npassword=***\n"


@pytest.fixture
def guarded():
    make, form = logging.getLogRecordFactory(), warnings.formatwarning
    guard_messages()
    guard_messages()
    yield
    logging.setLogRecordFactory(make)
    warnings.formatwarning = form


def test_records_of_any_logger_are_guarded(guarded, caplog):
    logging.getLogger("somebody").warning("cannot reach %s for %s", "http://me:k1@host", "\x1b[2J")
    assert caplog.records[0].getMessage() == "cannot reach http://***@host for \\x1b[2J"
    too_few = logging.getLogRecordFactory()("somebody", logging.INFO, "file", 1, "%s %s", (1,), None)
    assert too_few.args == (1,)  # whose handler says that they do not fit


def test_warnings_are_guarded(guarded):
    text = warnings.formatwarning(UserWarning("token=k1\x1b"), UserWarning, "file", 1)
    assert text == "warning: token=***\n"


class Screen(io.StringIO):
    def isatty(self):
        return True


LONG = "warning: " + " ".join(["a/path-with-hyphens/and_more.jpg: cannot be read; give another file,"] * 6)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_sentences_are_wrapped_at_words_on_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    say(LONG, "  - " + LONG, "  python -m detr_exp.predict " + "x " * 200, file=screen)
    *sentences, command = screen.getvalue().splitlines()
    assert max(map(len, sentences)) <= columns
    assert " ".join(" ".join(sentences).split()) == f"{LONG} - {LONG}"
    assert command.split() == ["python", "-m", "detr_exp.predict", *["x"] * 200], "a command is copied as a whole"


def test_files_get_whole_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    log = io.StringIO()
    say(LONG, file=log)
    assert log.getvalue() == LONG + "\n"


def test_records_go_to_what_standard_error_is_now(monkeypatch):
    handler = ConsoleHandler()
    for _ in range(2):  # a progress bar replaces it while it is drawn
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        handler.handle(logging.LogRecord("somebody", logging.WARNING, "file", 1, "so\x1b", (), None))
        assert stream.getvalue() == "so\\x1b\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (3599.6, "1:00:00"), (7833, "2:10:33")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_word_that_starts_python(monkeypatch, tmp_path):
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python() == sys.executable, "another environment, although it is the same program"
    monkeypatch.setattr(sys, "executable", str(other))
    assert python() == "python"
