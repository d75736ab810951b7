"""Weights of a backbone from another training: a file, a name, an address, or those published for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from torch import Tensor, nn

from detr_exp.published.fetch import Found, fetch
from detr_exp.published.places import digests
from detr_exp.tensor_files import Stored, named, read, refuse_non_finite

WITHOUT = "or start without: model.backbone.pretrained=false"

logger = logging.getLogger(__name__)


def stored(source: bool | str, published: str) -> tuple[Found, Stored]:
    """The file that `model.backbone.pretrained` means, downloaded if it is not on this machine, and what it contains.

    Args:
        source: a path, a name, `hf:...`, a URL, or True.
        published: what True means.

    Raises:
        ValueError: there is none, or it cannot be had or used.
    """
    path = Path(str(source)).expanduser()
    if source is not True and path.is_file():
        found = Found(str(source), path, digests(path)["sha256"], str(path))
    else:
        try:
            fetched = fetch(published if source is True else str(source), "backbone")
        except ValueError as error:
            told = "true but " if source is True else f"{source}: "
            raise ValueError(
                f"model.backbone.pretrained is {told}{error}; name a file, model.backbone.pretrained=<file>, {WITHOUT}"
            ) from None
        if fetched is None:
            raise ValueError(
                f"model.backbone.pretrained names {source}, which is not a file and no name of published weights; give "
                f"a file, true (download), {WITHOUT}"
            )
        found = fetched
        logger.info("backbone: weights of %s", found.title)
    fix = f"; name another file, {WITHOUT}"
    content = read(found.path, fix)
    refuse_non_finite(tensors_of(content), found.path, fix)
    return found, content


def tensors_of(content: Stored) -> dict[str, Tensor]:
    """The tensors in the content of a file by name, also where a trainer has put them beside other things."""
    return next(filter(None, map(named, (content, content.get("state_dict"), content.get("model")))), {})


def load_pretrained(
    backbone: nn.Module, source: bool | str, published: str, rename: Callable[[str], str] = str, *, parts: bool = False
) -> Found:
    """Load weights into `backbone`; classifier weights and statistics that frozen norms do not have are ignored.

    Args:
        source: see `stored`.
        published: see `stored`.
        rename: a name in the file -> ours.
        parts: take what has the same name and shape, if that is most of the backbone's tensors.

    Returns:
        the file.

    Raises:
        ValueError: it cannot be had, or is for another network.
    """
    found, content = stored(source, published)
    state = {rename(name.removeprefix("module.")): tensor for name, tensor in tensors_of(content).items()}
    wanted = backbone.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unfit = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if parts and 2 * len(missing + unfit) < len(wanted):
        fitting = {key: state[key] for key in wanted if key in state and key not in unfit}
        backbone.load_state_dict(fitting, strict=False)
        logger.info("backbone: %d of %d tensors fit", len(fitting), len(wanted))
        return found
    if missing or unfit:
        raise ValueError(
            f"{found.path} does not fit the backbone: it lacks {some(missing)} and "
            f"has another shape for {some(unfit)}; choose the file made for it, or model.backbone.pretrained=false"
        )
    refuse_deeper(found.path, state, wanted)
    backbone.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)
    return found


def refuse_deeper(path: Path, theirs: Iterable[str], ours: Collection[str]) -> None:
    """Refuse a file with more blocks in a stage than the network has: their first ones would fit.

    Args:
        path: of the file, for the message.
        theirs: names of its tensors.
        ours: names of the network's.

    Raises:
        ValueError: names such tensors.
    """
    stages, kinds = {_stage(name) for name in ours}, {_kind(name) for name in ours}
    surplus = [n for n in theirs if n not in ours and _stage(n) in stages and _kind(n) in kinds]
    if surplus:
        raise ValueError(
            f"{path} is for a deeper backbone: it also has {some(surplus)}; choose that, model/backbone=..., or the "
            f"file made for this one, {WITHOUT}"
        )


def _stage(name: str) -> str:
    """A name up to its first number."""
    match = re.match(r"\D*\d+", name)
    return match[0] if match else ""


def _kind(name: str) -> str:
    """A name without its numbers, which only tells blocks apart."""
    return re.sub(r"\d+", "#", name)


def some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5]) or "nothing"
    return shown + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
