"""What a changed key means for resumed and for compared runs: every key is of exactly one kind.

The lists contain dotted prefixes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# Changes of these keys change no numbers.
NO_NUMBER = (
    "allow_targets",
    "sweep_retry",
    "sweep_fail_fast",
    "tracker",
    "hydra",
    "trainer.resume",
    "trainer.resume_world_size",
    "trainer.hardware.devices",
    "trainer.hardware.timeout",
    "trainer.progress_bar",
    "trainer.num_pictures",
    "trainer.picture_threshold",
    "trainer.keep_checkpoints",
    "trainer.checkpoint_interval",
    "trainer.checkpoint_every_steps",
    "trainer.checkpoint_in_background",
    "trainer.run_test",
    "trainer.compute_test_loss",
    "trainer.nonfinite_limit",
    "data.cache",
    "data.cache_gb",
    "data.num_workers",
    "data.pin_memory",
    "data.persistent_workers",
    "data.prefetch_factor",
)
# Changes of these keys change no numbers of the training, only its evaluation.
FREE = (*NO_NUMBER, "metric")
SELECTION = "honest_selection"  # but this key of `metric` decides which epoch is the best
HONEST = f"metric.{SELECTION}"
# The stored state depends on these keys, so they cannot change when a run resumes; changes of other keys have effect.
FIXED = (
    "model",
    "seed",
    "optim.optimizer",
    "optim.betas",
    "optim.param_groups",
    "data.category_ids",
    "data.num_classes",
    "data.channels",
    "trainer.batch_size",
    "trainer.auto_batch_target_effective",
    "trainer.auto_batch_max_targets_per_image",
    "trainer.auto_batch_ema_headroom",
    "trainer.grad_accum_steps",
    "trainer.use_ema",
    "trainer.ema_copy_first",
)
RULES = "optim.param_groups"  # users can add entries: a new entry is a change, too


def is_under(key: str, prefixes: Collection[str]) -> bool:
    """Whether a dotted key is one of these prefixes or below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def is_free(key: str) -> bool:
    """Whether a change of a dotted key leaves the training and its best epoch as they are."""
    return is_under(key, FREE) and key != HONEST


def differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Dotted keys whose values differ, sorted."""
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
