"""Whole training steps to be timed: ours, and those of transformers and rfdetr on the same images and objects.

A step is forward pass, criterion, backward pass, clipping, AdamW and the average of the weights. Ours is the trainer's
own. The peers' networks and losses run as their authors train them: `torch.optim.AdamW` as it comes, and an average
that goes through the state dict tensor by tensor, which is RT-DETR's code and RF-DETR's alike.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from detr_exp import build
from detr_exp.model import pretrained_dfine, pretrained_rtdetr
from detr_exp.structures import Batch, Target, Targets
from detr_exp.trainer.ema import EMA
from detr_exp.trainer.parallel import parallel

CLASSES, CLIP = 80, 0.1
FP32 = ("trainer.hardware.amp=null", "trainer.hardware.channels_last=false")
BF16 = ("trainer.hardware.amp=bf16", "trainer.hardware.channels_last=true")

Step = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """How a peer is run: its device, its type under autocast (None: float32), and whether its network is compiled."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    compiled: bool = False

    def autocast(self) -> Any:
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)


ON_CPU = Way()


def batch_of(images: int, side: int, objects: float = 7.0, seed: int = 0) -> Batch:
    """Noise with a Poisson number of random boxes on each image."""
    g = torch.Generator().manual_seed(side + seed)
    counts = torch.poisson(torch.full((images,), objects), generator=g).long().clamp(min=1).tolist()
    targets = [
        Target(
            torch.randint(0, CLASSES, (n,), generator=g),
            torch.cat([torch.rand(n, 2, generator=g) * 0.6 + 0.2, torch.rand(n, 2, generator=g) * 0.35 + 0.05], 1),
        )
        for n in counts
    ]
    pixels = torch.randint(0, 256, (images, side, side, 3), generator=g, dtype=torch.uint8)
    sizes = torch.full((images, 2), side)
    return Batch(pixels, Targets.pack(targets), sizes, list(range(images)))


def config(side: int, *words: str, hardware: str = "cpu") -> Any:
    """A configuration for square images of `side`."""
    size = f"model.image_size=[{side},{side}]"
    return build.compose([*words, size, f"trainer/hardware={hardware}", "data=shapes", f"data.num_classes={CLASSES}"])


def ours(batch: Batch, cfg: Any) -> Step:
    """The trainer's step."""
    step = stepper(cfg)
    return lambda: step([batch])


def stepper(cfg: Any, compiled: Mapping[str, Any] | None = None) -> Callable[[list[Batch]], Any]:
    """The trainer's step over the micro-batches that it is given.

    Args:
        compiled: arguments of `torch.compile` for the network; None: it is not compiled here.
    """
    torch.manual_seed(0)
    trainer = build.trainer(cfg)
    network = trainer.settings.hardware.place(build.network(cfg)).train()
    run = SimpleNamespace(seed=0, criterion=build.criterion(cfg))
    if compiled is not None:
        network.compile(**compiled)
        run.criterion.compile(**compiled)
    forward = parallel(network, "ddp")
    state = SimpleNamespace(
        step=0,
        position=0,
        teaching=None,
        members=None,
        network=network,
        forward=forward,
        trained=[forward],
        optimizer=build.optimizer(cfg)(network),
        ema=EMA(network, decay=cfg.trainer.ema_decay, tau=cfg.trainer.ema_tau),
        precision=trainer.settings.hardware.precision(),
        schedule=lambda step: 1.0,
        parameters=[p for p in network.parameters() if p.requires_grad],
    )
    return lambda window: trainer.train_step(run, state, window)


def transformers(batch: Batch, cfg: Any, way: Way = ON_CPU) -> Step:
    """Its RT-DETRv2 or D-FINE of the same make."""
    network = transformers_network(cfg).to(way.device)
    batch = batch.to(torch.device(way.device))
    labels = [{"class_labels": a, "boxes": b} for a, b in per_image(batch)]
    pixels = batch.pixels().contiguous()
    if way.compiled:
        network.compile()

    def loss() -> torch.Tensor:
        with way.autocast():
            return network(pixel_values=pixels, labels=labels).loss

    return plain_step(network, loss)


def transformers_network(cfg: Any, num_classes: int = CLASSES) -> nn.Module:
    """The network of transformers for a config of ours, with random weights."""
    import transformers as theirs
    from omegaconf import OmegaConf

    model = OmegaConf.to_container(cfg.model, resolve=True)
    names = pretrained_dfine if "num_bins" in model else pretrained_rtdetr
    settings = names.huggingface_config(model, [str(c) for c in range(num_classes)])
    (kind,) = settings.pop("architectures")
    configs = {"rt_detr_v2": theirs.RTDetrV2Config, "d_fine": theirs.DFineConfig}
    backbones = {"rt_detr_resnet": theirs.RTDetrResNetConfig, "hgnet_v2": theirs.HGNetV2Config}
    backbone = settings.pop("backbone_config")
    settings["backbone_config"] = backbones[backbone.pop("model_type")](**backbone)
    torch.manual_seed(0)
    return getattr(theirs, kind)(configs[settings.pop("model_type")](**settings))


def rfdetr(batch: Batch, way: Way = ON_CPU) -> Step:
    """Its Nano with random weights."""
    from rfdetr.utilities.tensors import NestedTensor

    network, criterion = (part.to(way.device) for part in rfdetr_network())
    batch = batch.to(torch.device(way.device))
    labels = [{"labels": a, "boxes": b} for a, b in per_image(batch)]
    pixels = batch.pixels().contiguous()
    images = NestedTensor(pixels, torch.zeros_like(pixels[:, 0], dtype=torch.bool))
    if way.compiled:
        network.compile()

    def loss() -> torch.Tensor:
        with way.autocast():
            outputs = network(images, labels)
        terms = criterion(outputs, labels)
        return sum(terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms)

    return plain_step(network, loss)


def rfdetr_network() -> tuple[nn.Module, nn.Module]:
    """The package's Nano with random weights, and its criterion."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        from rfdetr.config import RFDETRNanoConfig, TrainConfig
        from rfdetr.models.lwdetr import build_criterion_from_config, build_model_from_config

        torch.manual_seed(0)
        # a file name it does not know keeps it from downloading a backbone
        made = RFDETRNanoConfig(device="cpu", pretrain_weights="/nonexistent/x.pth", num_classes=CLASSES - 1)
        training = TrainConfig(dataset_dir=".", output_dir=".")
        network = build_model_from_config(made, training)
        criterion = build_criterion_from_config(made, training)[0].train()
        logging.disable(logging.NOTSET)
    return network, criterion


def plain_step(network: nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """A step as the peers' own training code makes it; on a GPU with the fused optimiser."""
    network.train()
    fused = next(network.parameters()).is_cuda or None
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused)
    average = deepcopy(network).eval().requires_grad_(False)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            live = network.state_dict()
            for name, value in average.state_dict().items():
                if value.dtype.is_floating_point:
                    value.mul_(0.999).add_(live[name].detach(), alpha=0.001)

    return step


def per_image(batch: Batch) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Labels and boxes of each image."""
    targets = batch.targets
    return list(zip(targets.labels.split(targets.counts), targets.boxes.split(targets.counts)))
