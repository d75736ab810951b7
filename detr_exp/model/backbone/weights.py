"""Weights of a backbone from another training: a file, a name, an address, or those published for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from detr_exp.published.fetch import fetch
from detr_exp.tensor_files import Stored, named, read

WITHOUT = "or start without: model.backbone.pretrained=false"

logger = logging.getLogger(__name__)


def stored(source: bool | str, published: str) -> tuple[Path, Stored]:
    """The file that `model.backbone.pretrained` means, downloaded if it is not on this machine, and its content.

    Args:
        source: a path, a name, `hf:...`, a URL, or True.
        published: what True means.

    Raises:
        ValueError: there is none, or it cannot be had or used.
    """
    path = Path(str(source)).expanduser()
    if source is True or not path.is_file():
        try:
            found = fetch(published if source is True else str(source), "backbone")
        except ValueError as error:
            told = "true but " if source is True else f"{source}: "
            raise ValueError(
                f"model.backbone.pretrained is {told}{error}; name a file, model.backbone.pretrained=<file>, {WITHOUT}"
            ) from None
        if found is None:
            raise ValueError(
                f"model.backbone.pretrained names {source}, which is not a file and no name of published weights; give "
                f"a file, true (download), {WITHOUT}"
            )
        path = found.path
        logger.info("backbone: weights of %s", found.title)
    return path, read(path, f"; name another file, {WITHOUT}")


def load_pretrained(
    backbone: nn.Module, source: bool | str, published: str, rename: Callable[[str], str] = str
) -> None:
    """Load weights into `backbone`; classifier weights and statistics that frozen norms do not have are ignored.

    Args:
        source: see `stored`.
        published: see `stored`.
        rename: a name in the file -> ours.
    """
    path, state = stored(source, published)
    state = {rename(name): tensor for name, tensor in named(state).items()}
    wanted = backbone.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unfit = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or unfit:
        raise ValueError(
            f"{path} does not fit the backbone: it lacks {_some(missing)} and "
            f"has another shape for {_some(unfit)}; choose the file made for it, or model.backbone.pretrained=false"
        )
    backbone.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5]) or "nothing"
    return shown + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
