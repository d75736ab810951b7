"""ImageNet weights of a backbone: from a file, or downloaded on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.hub import get_dir, load_state_dict_from_url

from detr_exp.tensor_files import Stored, named, read


def read_given(source: str) -> Stored:
    """The content of the file that `model.backbone.pretrained` names.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(
            f"model.backbone.pretrained names {source}, which is not a file; give a file, true (download), or start "
            "without: model.backbone.pretrained=false"
        )
    return read(path, "; name another file, or start without: model.backbone.pretrained=false")


def load_pretrained(backbone: nn.Module, source: bool | str, url: str, rename: Callable[[str], str] = str) -> None:
    """Load weights into `backbone`; classifier weights and statistics that frozen norms do not have are ignored.

    Args:
        source: path of a file, or True to download `url` (once; torch's hub folder keeps it).
        rename: a name in the file -> ours.
    """
    if isinstance(source, bool):
        try:
            state = load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except Exception as error:  # every way a download can fail is another exception
            place = Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
            raise ValueError(
                f"model.backbone.pretrained is true but {url} could not be downloaded ({error}); put the file at "
                f"{place}, name it by model.backbone.pretrained=<file>, or start without by "
                "model.backbone.pretrained=false"
            ) from None
    else:
        state = read_given(source)
    state = {rename(name): tensor for name, tensor in named(state).items()}
    wanted = backbone.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unfit = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or unfit:
        raise ValueError(
            f"{source if isinstance(source, str) else url} does not fit the backbone: it lacks {_some(missing)} and "
            f"has another shape for {_some(unfit)}; choose the file made for it, or model.backbone.pretrained=false"
        )
    backbone.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5]) or "nothing"
    return shown + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
