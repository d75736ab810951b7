import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script, command, **environment):
    """What a shell gets that runs `script` with some redirection: `{python}` in the command stands for it."""
    told = f"'{sys.executable}' -c '{script}'"
    return subprocess.run(
        ["bash", "-c", command.replace("PYTHON", told)],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )


PRINTS = """
import os, sys
from detr_exp.streams import keep_open
keep_open()
keep_open()
for i in range(20000):
    print("line", i)
print("also here", file=sys.stderr, flush=True)
sys.stdout.flush()
os.write(int(sys.argv[1]) if len(sys.argv) > 1 else 2, b"done")
"""


def test_a_reader_that_leaves_ends_nothing():
    done = run(PRINTS, "PYTHON | head -n 1; echo status ${PIPESTATUS[0]}")
    assert done.stdout.split("\n")[:2] == ["line 0", "status 0"]
    assert done.stderr == "also here\ndone"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_below_the_log_ends_nothing():
    done = run(PRINTS, "PYTHON >/dev/full; echo status $?")
    assert (done.stdout, done.stderr) == ("status 0\n", "also here\ndone")


OPENS = """
import os, sys
from detr_exp.streams import keep_open
keep_open()
file = open("/dev/null")
print("lost", sys.stdin.read(), flush=True)
print("lost", file=sys.stderr, flush=True)
sys.exit(file.fileno())
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_does_not_give_its_number_to_a_file(closed):
    done = run(OPENS, f"PYTHON {closed} </dev/null; echo $?" if "<" not in closed else f"PYTHON {closed}; echo $?")
    assert done.stdout.split()[-1] == "3"


SPEAKS = """
from detr_exp.streams import keep_open
keep_open()
print("Stra\\u00dfe \\u732b \\udce9")
"""


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "Stra\\xdfe \\u732b \\udce9\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "Straße 猫 \\udce9\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "Stra\\xdfe \\u732b \\udce9\n"),
    ],
)
def test_what_the_reader_cannot_show_is_written_as_an_escape(environment, shown):
    done = run(SPEAKS, "PYTHON", **environment)
    assert (done.stdout, done.returncode) == (shown, 0)


def test_somebody_elses_stream_is_left_alone(capsys):
    from detr_exp.streams import keep_open

    before = sys.stdout
    keep_open()
    assert sys.stdout is before
