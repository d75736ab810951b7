"""The step that the benchmarks time is the trainer's, in its present form."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "training_step.py"


def test_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, SCRIPT.stem, module)
    spec.loader.exec_module(module)
    step = module.ours(module.batch_of(2, 128), module.config(128, "model=rtdetrv2_tiny", *module.FP32))
    (first, _), (second, _) = step(), step()
    assert first.isfinite().all()
    assert not torch.equal(first, second), "its weights change"
