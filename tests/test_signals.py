import os
import signal
import subprocess
import sys
import time

import pytest

from detr_exp.signals import EXIT_STATUS, SAME, Interrupt, Interrupted, ended_by


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved; signals that would end the process are noted."""
    now, sent = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    before = {number: signal.getsignal(number) for number in EXIT_STATUS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under `nohup`
    yield now, sent
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", EXIT_STATUS)
def test_the_first_signal_is_noted_and_a_later_one_ends_the_process(clock, number):
    (now, sent), told = clock, []
    before = signal.getsignal(number)
    with Interrupt(at_once=lambda: told.append("others")) as interrupt:
        signal.raise_signal(number)
        signal.raise_signal(number)  # `timeout` sends it to its child, then to the group
        assert (interrupt.number, sent, told) == (number, [], [])
        now[0] += SAME
        signal.raise_signal(number)
        assert (sent, told) == ([(os.getpid(), number)], ["others"])
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_a_command_is_ended_where_it_stands_and_not_once_more_while_it_says_so(clock):
    now, sent = clock
    with Interrupt(raises=True) as outer:
        with Interrupt() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert Interrupted(inner.number).exit_status == 143
        signal.raise_signal(signal.SIGHUP)  # service managers send both
        assert outer.number is None
        now[0] += SAME
        with pytest.raises(Interrupted, match="SIGUSR1"):
            signal.raise_signal(signal.SIGUSR1)
    assert sent == []


def test_a_process_that_another_one_ends_is_not_ended_by_the_same_request_twice(clock):
    now, sent = clock
    with Interrupt(is_owned=True) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        now[0] += 60
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # while it closes its files
    assert (interrupt.number, sent) == (signal.SIGTERM, [])


def test_nohup_is_respected(clock):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
    assert interrupt.number is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_nothing_takes_being_ended_for_a_fault():
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize(
    ("code", "number"), [(-15, 15), (143, 15), (75, signal.SIGUSR1), (129, 1), (-9, None), (0, None)]
)
def test_what_an_exit_code_says(code, number):
    assert ended_by(code) == number


OF_A_GROUP = """
import multiprocessing, os, signal, time
from detr_exp import signals
from detr_exp.signals import held_back, leave_to_parent

signals.WATCH = 0.5

def wait(started):
    leave_to_parent()
    started.set()
    time.sleep(60)

def nothing(number, frame):
    pass

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    started = context.Event()
    for number in {signals}:
        signal.signal(number, nothing)
    with held_back():
        child = context.Process(target=wait, args=(started,))
        child.start()
    started.wait()
    for number in {signals}:
        os.killpg(0, number)
    time.sleep(0.2)
    print(child.is_alive())
    child.join(20)
    print(child.exitcode)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="this system does not say who sent a signal")
def test_a_worker_outlives_signals_to_the_group_and_ends_after_its_parents_word():
    script = OF_A_GROUP.format(signals=[int(number) for number in EXIT_STATUS])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["True", "0"], done.stderr
