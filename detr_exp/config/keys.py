"""What a change of a key means for a run that goes on, and for one that is compared: every key is of one kind.

Keys are named by dotted prefixes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# A change of these changes no number,
NO_NUMBER = (
    "allow_targets",
    "sweep_retry",
    "sweep_fail_fast",
    "tracker",
    "hydra",
    "trainer.resume",
    "trainer.resume_world_size",
    "trainer.hardware.devices",
    "trainer.progress_bar",
    "trainer.num_pictures",
    "trainer.picture_threshold",
    "trainer.keep_checkpoints",
    "trainer.checkpoint_interval",
    "trainer.checkpoint_every_steps",
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
# of these none of the training, only what is measured of it;
FREE = (*NO_NUMBER, "metric")
# without these the stored state has no meaning, or they have acted when it was stored; all others act from there on.
FIXED = (
    "model",
    "seed",
    "optim.optimizer",
    "optim.betas",
    "optim.param_groups",
    "data.category_ids",
    "data.num_classes",
    "trainer.batch_size",
    "trainer.auto_batch_target_effective",
    "trainer.auto_batch_max_targets_per_image",
    "trainer.auto_batch_ema_headroom",
    "trainer.grad_accum_steps",
    "trainer.use_ema",
    "trainer.ema_copy_first",
)
RULES = "optim.param_groups"  # users add entries of their own: one that was not there is a change as well


def is_under(key: str, prefixes: Collection[str]) -> bool:
    """Whether a dotted key is one of these or below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Dotted keys whose values are not the same, sorted."""
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
