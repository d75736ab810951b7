"""Bytes that a forward pass keeps, and bytes that are free."""

import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detr_exp.trainer import memory
from detr_exp.trainer.memory import Saved, saved_bytes, state_preserved


@pytest.mark.parametrize("images", [1, 4])
def test_what_is_kept_is_counted_once_and_weights_are_not(images):
    network = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 8))
    x = torch.rand(images, 32)
    # the input, and the output of the sigmoid, which both the sigmoid and the second layer keep
    assert saved_bytes(network, lambda: network(x).sum()) == Saved(activations=4 * images * (32 + 64), weights=0)


def test_copies_of_weights_do_not_grow_with_the_batch():
    network = nn.Linear(32, 64)

    def kept(images):
        x = torch.rand(images, 32, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return saved_bytes(network, lambda: network(x).sum())

    assert kept(1).weights == kept(4).weights == 2 * 32 * 64
    assert kept(4).activations == 4 * kept(1).activations


def test_what_is_computed_again_is_not_kept():
    block = nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 16))
    x = torch.rand(8, 16, requires_grad=True)
    plain = saved_bytes(block, lambda: block(x).sum())
    again = saved_bytes(block, lambda: checkpoint(block, x, use_reentrant=False).sum())
    assert again.activations == x.nbytes < plain.activations / 10


def test_a_trial_leaves_no_trace():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).eval()
    buffers = [buffer.clone() for buffer in network.buffers()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with suppress(KeyError), state_preserved(network):
        network.train()
        network(torch.rand(5, 4)).sum().backward()
        raise KeyError
    assert torch.equal(torch.rand(3), expected)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(map(torch.equal, network.buffers(), buffers))


def test_a_container_has_its_limit_less_what_it_uses_but_for_caches(tmp_path):
    for name, content in (("max", "1000"), ("current", "700"), ("stat", "anon 500\ninactive_file 150\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert memory._free_in_group(tmp_path) == 1000 - 700 + 150
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_in_group(tmp_path) is None
    assert memory._free_in_group(tmp_path / "elsewhere") is None


def test_a_cpu_has_what_machine_and_container_both_grant(monkeypatch):
    free = memory.available(torch.device("cpu"))
    assert free is not None
    assert free > 2**27
    for machine, group, least in ((5, 3, 3), (5, None, 5), (None, None, None)):
        monkeypatch.setattr(memory, "_free_in_machine", lambda value=machine: value)
        monkeypatch.setattr(memory, "_free_in_group", lambda value=group: value)
        assert memory.available(torch.device("cpu")) == least
    monkeypatch.setattr(memory, "_free_in_machine", lambda: 12)
    monkeypatch.setattr(memory, "local_world_size", lambda: 4)
    assert memory.available(torch.device("cpu")) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of glibc")
def test_freed_memory_is_used_again():
    """Of a large tensor, pages come from the system only the first time; in a process of its own, which stays so.

    In a process whose heap has no room to grow, as address randomisation may leave it, the C library maps large memory.
    """
    code = (
        "import resource, torch; from detr_exp.trainer.memory import keep_freed_memory\n"
        "def faults(): torch.ones(1 << 24); return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = [faults() for _ in range(3)]\n"
        "keep_freed_memory()\n"
        "after = [faults() for _ in range(3)]\n"
        "print(before[2] - before[1], after[2] - after[1])"
    )
    for _ in range(5):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        without, kept = map(int, found.stdout.split())
        if kept < without / 2:
            break
    assert without > 30 * max(kept, 1)
