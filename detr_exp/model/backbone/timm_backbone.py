"""Any backbone of timm that returns maps of the requested strides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from detr_exp.model.backbone.weights import WITHOUT, refuse_deeper, some, stored
from detr_exp.published.fetch import Found
from detr_exp.published.table import of_timm
from detr_exp.tensor_files import named
from detr_exp.values import Values

READING = ("checkpoint_path", "cache_dir", "features_only", "out_indices")  # read files, or have a key of their own
EFFICIENTNET_PYTORCH = "_conv_stem.weight"  # first tensor of its files


class TimmBackbone(nn.Module):
    """A timm network cut to its feature maps, chosen by stride because their indices differ between families.

    Args:
        name: as in `timm.list_models()`.
        out_strides: of the maps returned.
        freeze_norm: replace batch norms by constants.
        pretrained: true takes the weights of the table for this network, else those that timm knows; a path reads them
            from a file, false starts from random ones.
        options: further arguments of `timm.create_model`, such as `{img_size: 640}` or `{drop_path_rate: 0.1}`.
    """

    def __init__(
        self,
        *,
        name: str,
        out_strides: list[int],
        freeze_norm: bool,
        pretrained: bool | str,
        options: Values,
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            strides = _create(name, options).feature_info.reduction()
        if not out_strides or not set(out_strides) <= set(strides):
            raise ValueError(
                f"model.backbone.out_strides is {out_strides} but {name} has maps of strides {sorted(set(strides))}; "
                "choose some of these, or a network with a pyramid, e.g. model.backbone.name=resnet50"
            )
        self.out_strides = sorted(out_strides)
        indices = [strides.index(stride) for stride in self.out_strides]
        self.initial: Found | None = None
        if pretrained:
            self.initial, self.body = _pretrained(name, options, pretrained, indices)
        else:
            self.body = _create(name, options, out_indices=indices)
        self.out_channels = self.body.feature_info.channels()
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        config = self.body.pretrained_cfg
        self.pixel_mean, self.pixel_std = list(config["mean"]), list(config["std"])
        if freeze_norm:
            # timm's own: its norms can contain the activation, which a plain replacement would lose.
            freeze_batch_norm_2d(self.body)
            if left := [m for m in self.body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
                raise ValueError(
                    f"model.backbone.freeze_norm is true, but {name} has {len(left)} norms of type "
                    f"{type(left[0]).__name__}, which timm cannot freeze: model.backbone.freeze_norm=false"
                )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 3, H, W]` -> a map `[B, C, H / stride, W / stride]` for each of `out_strides`."""
        maps = self.body(images)
        return [level.permute(0, 3, 1, 2) for level in maps] if self.channels_last else list(maps)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations instead of storing them, as far as timm does so for this network."""
        self.body.set_grad_checkpointing(enabled)


def _create(name: str, options: Values, **more: Any) -> Any:  # neither do timm's networks have types
    """A network of timm that returns maps.

    Args:
        name: see `TimmBackbone`.
        options: see `TimmBackbone`.
        more: further arguments of `timm.create_model`.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(
            f"timm {timm.__version__} has no network {name!r}; set model.backbone.name to one of timm.list_models()"
            + (f", e.g. {', '.join(near)}" if near else "")
        )
    if reading := [key for key in options if key.startswith("pretrained") or key in READING]:
        raise ValueError(
            f"model.backbone.options has {', '.join(reading)}, but weights are named by model.backbone.pretrained and "
            "maps by model.backbone.out_strides; take it out, and set e.g. model.backbone.pretrained=<file>"
        )
    try:
        return timm.create_model(name, features_only=True, **more, **options)
    except TypeError as error:
        raise ValueError(f"timm cannot make {name} with {options} ({error}); change model.backbone.options") from error
    except Exception as error:  # each network checks its arguments in its own way
        raise ValueError(f"timm cannot make maps with {name} ({error}); choose another model.backbone.name") from error


def _pretrained(name: str, options: Values, source: bool | str, indices: list[int]) -> tuple[Found, Any]:
    """The file that `model.backbone.pretrained` means, and a network of timm with its weights.

    Raises:
        ValueError: the file cannot be had, or does not determine all weights of the network.
    """
    found, content = stored(source, published(name) if source is True else "")
    with torch.random.fork_rng(devices=[]):
        fresh = _create(name, options, out_indices=indices)
        with torch.device("meta"):
            whole = timm.create_model(name, **options).state_dict()
    state = named(content)
    overlay: Values = {"file": str(found.path)}  # timm reads it once more and maps the names that it knows
    if EFFICIENTNET_PYTORCH in state:
        overlay = {"state_dict": _by_position(state, whole, name, found.path)}
    else:
        refuse_deeper(found.path, state, whole)
    try:
        body = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=indices, **options
        )
    except Exception as error:  # every way a file can be foreign is another exception
        raise ValueError(
            f"{found.path} could not be loaded into {name} ({' '.join(str(error).split())[:300]}); give another file, "
            f"model.backbone.pretrained=<file>, {WITHOUT}"
        ) from error
    before = dict(fresh.named_parameters())  # timm ignores names that it does not find
    left = [n for n, tensor in body.named_parameters() if tensor.ndim > 1 and torch.equal(tensor, before[n])]
    if left:
        raise ValueError(
            f"{found.path} does not fit {name}: it does not determine {some(left)}, and begins with "
            f"{', '.join(list(map(str, content))[:3]) or 'nothing'}; give another file, "
            f"model.backbone.pretrained=<file>, {WITHOUT}"
        )
    return found, body


def _by_position(state: dict[str, Tensor], ours: dict[str, Tensor], name: str, path: Path) -> dict[str, Tensor]:
    """Tensors of the package `efficientnet-pytorch` and its relatives, in timm's names.

    Its networks have the tensors of timm's in the same order, under other names.

    Args:
        state: of the file.
        ours: of timm's network, without values.
        name: of that network.
        path: of the file.

    Raises:
        ValueError: a tensor has another shape, or another last name (`weight`, `running_var`), than timm's.
    """
    for (theirs, tensor), (key, own) in zip(state.items(), ours.items()):
        if tensor.shape != own.shape or theirs.rpartition(".")[2] != key.rpartition(".")[2]:
            raise ValueError(
                f"{path} does not fit {name}: in the place of {key} {list(own.shape)} it has {theirs} "
                f"{list(tensor.shape)}; choose the network it was made for, model.backbone.name=..., {WITHOUT}"
            )
    if len(state) != len(ours):
        raise ValueError(
            f"{path} does not fit {name}: it has {len(state)} tensors, needed are {len(ours)}; choose the network it "
            f"was made for, model.backbone.name=..., {WITHOUT}"
        )
    return dict(zip(ours, state.values()))


def published(name: str) -> str:
    """The name in the table, or the address that timm knows, of the weights for a network.

    Raises:
        ValueError: there is none.
    """
    if (entry := of_timm(name)) is not None:
        return entry.name
    config = timm.models.get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id:
        return f"hf:{config.hf_hub_id}" + (f"/{config.hf_hub_filename}" if config.hf_hub_filename else "")
    if config is None or not config.url:
        raise ValueError(f"timm knows no weights of {name}; name a file, model.backbone.pretrained=<file>, {WITHOUT}")
    return str(config.url)
