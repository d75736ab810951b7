"""Going on where a run stopped: which checkpoint, whether it fits, and putting its state back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr_exp.trainer import checkpoint as files
from detr_exp.trainer.state import State

# What may change without changing a number, as dotted prefixes.
FREE = (
    "tracker",
    "metric",
    "hydra",
    "trainer.resume",
    "trainer.progress_bar",
    "trainer.num_pictures",
    "trainer.picture_threshold",
    "trainer.keep_checkpoints",
    "trainer.checkpoint_interval",
    "trainer.checkpoint_every_steps",
    "trainer.run_test",
    "trainer.compute_test_loss",
    "trainer.nonfinite_limit",
    "data.num_workers",
    "data.pin_memory",
    "data.persistent_workers",
    "data.prefetch_factor",
)
# What the stored state has no meaning without.
FIXED = (
    "model",
    "seed",
    "optim.optimizer",
    "optim.param_groups",
    "data.category_ids",
    "data.num_classes",
    "trainer.batch_size",
    "trainer.grad_accum_steps",
    "trainer.use_ema",
)


def identity(config: Mapping[str, Any]) -> str:
    """The hash of everything in a resolved config that decides the numbers of a run."""
    kept = {key: value for key, value in flat(config).items() if not _under(key, FREE)}
    return files.config_hash(kept)


def find(resume: str | None, output_dir: Path, config: Mapping[str, Any]) -> Path | None:
    """The checkpoint that `trainer.resume` means.

    Args:
        resume: null, a checkpoint, a run folder, or `auto`: the run folder itself, else the newest unfinished run
            beside it with the same config, else none.
        output_dir: the run folder.
        config: the resolved config.

    Raises:
        ValueError: when a named checkpoint is not there.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume).expanduser()
        path = path / files.NEWEST if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"trainer.resume is {resume}, but no checkpoint is there; use trainer.resume=auto or null")
        return path
    if (output_dir / files.NEWEST).is_file():
        return output_dir / files.NEWEST
    wanted = identity(config)
    newest = sorted(_unfinished(output_dir), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in newest if files.load(path)["config_identity"] == wanted), None)


def _unfinished(output_dir: Path) -> list[Path]:
    # run folders are outputs/<day>/<time>: look at the folders beside this one and beside its parent
    found = [*output_dir.parent.glob(f"*/{files.NEWEST}"), *output_dir.parent.parent.glob(f"*/*/{files.NEWEST}")]
    return [path for path in set(found) if not (path.parent / files.BEST_TOTAL).exists()]


def restore(path: Path, state: State, config: Mapping[str, Any]) -> list[str]:
    """Put the state stored in `path` back into `state`.

    Returns:
        sentences for the user: which keys differ from the stored run.

    Raises:
        ValueError: when the checkpoint is for inference only, damaged, or of a run that this config cannot continue.
    """
    saved = files.load(path)
    if saved["kind"] != "training":
        raise ValueError(
            f"{path} holds weights only and cannot be resumed; give its folder's {files.NEWEST}, or start anew from "
            f"these weights with model.weights={path}"
        )
    before, now = flat(saved["config"]), flat(config)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    fixed = [key for key in differing if _under(key, FIXED)]
    if fixed:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in fixed[:8])
        raise ValueError(
            f"{path} cannot be continued with this config: {changes}; set them back, or start a new run from its "
            f"weights with model.weights={path}"
        )
    state.load_state_dict(saved)
    return [f"resumed with {key}={now.get(key)} (was {before.get(key)})" for key in differing if not _under(key, FREE)]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            items |= flat(value, f"{name}.")
        else:
            items[name] = value
    return items


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
