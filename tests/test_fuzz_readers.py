"""Whatever is in a file: it is read, or refused in our words. `scripts/fuzz_readers.py` tries for longer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import fuzz_readers as fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

resource = pytest.importorskip("resource", reason="limits of a process are set by POSIX systems only")
GIGABYTES = 2  # beyond what the tests have


SEEDS = {name: reader.seeds() for name, reader in fuzz.READERS.items()}


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """An input that asks for much memory is a finding, and not the end of the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 2**22
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTES * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", SEEDS)
def test_sound_inputs_are_read(name: str, tmp_path: Path) -> None:
    for number, seed in enumerate(SEEDS[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if name in ("weights", "config"):  # too few tensors for a network, and that is what is said
            with pytest.raises(ValueError, match=r"\w"):
                fuzz.READERS[name].read(seed, folder)
        else:
            fuzz.READERS[name].read(seed, folder)


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_inputs_are_read_or_refused(name: str) -> None:
    @settings(max_examples=20 if name == "config" else 80, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32), st.integers(0, len(SEEDS[name]) - 1))
    def damaged(seed: int, which: int) -> None:
        error = fuzz.tried(fuzz.READERS[name], fuzz.changed(SEEDS[name][which], random.Random(seed)))
        if error is not None:
            raise error

    damaged()


def test_a_fault_is_noticed() -> None:
    def read(data: bytes, folder: Path) -> None:
        raise KeyError(data)

    assert isinstance(fuzz.tried(fuzz.Reader(list, read), b""), KeyError)
