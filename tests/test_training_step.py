"""The step that the benchmarks time is the trainer's, in its present form."""

from __future__ import annotations

import torch
import training_step as module


def test_it_trains() -> None:
    step = module.ours(module.batch_of(2, 128), module.config(128, "model=rtdetrv2_tiny", *module.FP32))
    (first, _), (second, _) = step(), step()
    assert first.isfinite().all()
    assert not torch.equal(first, second), "its weights change"
