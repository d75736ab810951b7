import logging
import warnings

import pytest

from detr_exp.terminal import guard_messages, printable, say


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
