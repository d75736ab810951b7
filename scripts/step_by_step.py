"""One RT-DETRv2 trained twice, by our engine and by `transformers`, in float64 from the same weights: losses per step.

    python scripts/step_by_step.py experiment=rtdetrv2_r18vd_120e_coco data.root=<BCCD> 'model.image_size=[320,320]'

Both see the same batches in the same order, without augmentation, denoising or dropout. Ours takes the trainer's own
step: its criterion, matcher, parameter groups, schedule, clipping and AdamW. Theirs is their network, their loss with
their matcher, and `torch.optim.AdamW` as it comes, with the learning rates that the recipe means for each tensor.
Ends with 1 where a loss differs by more than `--limit` before the two match an object to different queries; from then
on they are two trainings, so the first such match is named and the comparison ends.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from types import SimpleNamespace
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from training_step import transformers_network
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from detr_exp import build
from detr_exp.data.dataset import DataSet
from detr_exp.model.pretrained_rtdetr import to_huggingface, without_layers_beyond
from detr_exp.protocols import Network
from detr_exp.structures import Batch
from detr_exp.trainer.precision import Precision

SAME = (
    "data/augment=none",
    "data.multi_scale=null",
    "model.num_denoising=0",
    "model.look_forward_twice=false",  # only values, not gradients, agree otherwise: transformers has no such gradient
    "model.weights=null",
    "model.backbone.pretrained=false",
    "trainer/hardware=cpu",
    "trainer.hardware.amp=null",
    "trainer.hardware.channels_last=false",
    "trainer.use_ema=false",
)

Pairs = list[list[tuple[int, int]]]  # per layer: (query, object of the whole batch); the encoder last
# step number, batch -> total loss before the step, matches
Step = Callable[[int, Batch], tuple[float, Pairs]]


class StepPair(NamedTuple):
    """What both made of one batch: their total losses before the step, and which object they matched differently."""

    step: int
    ours: float
    theirs: float
    flipped: str

    @property
    def difference(self) -> float:
        return abs(self.ours - self.theirs) / max(1.0, abs(self.theirs))


def steps(overrides: list[str]) -> Iterator[StepPair]:
    """Train both and yield each step; ends with the first that matched differently, or with the training."""
    cfg = build.compose([*SAME, *overrides])
    data = build.data(cfg)
    torch.manual_seed(cfg.seed)
    network = build.network(cfg, data)
    batches = data.loader("train", network=network, batch_size=cfg.trainer.batch_size, seed=cfg.seed, training=True)
    network.double().train()
    off_the_kinks(network)
    peer = peer_of(network, cfg)
    ours, theirs = our_step(network, cfg, data, len(batches)), their_step(peer, network, cfg, len(batches))
    step = 0
    for epoch in range(cfg.trainer.epochs):
        batches.batch_sampler.set_epoch(epoch)
        for batch in batches:
            (our_loss, our_pairs), (their_loss, their_pairs) = ours(step, batch), theirs(step, batch)
            step += 1
            flipped = first_flip(our_pairs, their_pairs, batch)
            yield StepPair(step, our_loss, their_loss, flipped)
            if flipped:
                return


def off_the_kinks(network: nn.Module) -> None:
    """Move the first sampling points off the centres of cells.

    There bilinear sampling has a kink, all points of an untrained decoder lie on one, and rounding would choose between
    its two slopes: gradients then differ by some 10 % in these tensors, whoever computes them.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("sampling_offsets.bias"):
                parameter += 0.05 * torch.randn_like(parameter)


def peer_of(network: Network, cfg: DictConfig) -> nn.Module:
    """The network of transformers with the weights of `network`."""
    peer = transformers_network(cfg, network.num_classes).double().train()
    keys = peer.load_state_dict(renamed(network, network.state_dict(), cfg), strict=False)
    if keys.unexpected_keys or any(not key.startswith(("class_embed", "bbox_embed")) for key in keys.missing_keys):
        raise SystemExit(f"transformers' network has other tensors: {keys}")  # the exceptions are second names
    return peer


def renamed(network: Network, state: dict[str, Tensor], cfg: DictConfig) -> dict[str, Tensor]:
    state = without_layers_beyond(state, network.decoder.eval_idx)
    return to_huggingface(state, num_points=list(cfg.model.num_points))


def our_step(network: Network, cfg: DictConfig, data: DataSet, length: int) -> Step:
    """The trainer's own step, which tells its loss and its matches."""
    trainer = build.trainer(cfg)
    run = SimpleNamespace(seed=cfg.seed, criterion=build.criterion(cfg, data))
    found = []
    matcher = run.criterion.matcher
    run.criterion.matcher = lambda *arguments: found.append(matcher(*arguments)) or found[-1]
    state = SimpleNamespace(
        step=0,
        position=0,
        teaching=None,
        members=None,
        trained=[],
        network=network,
        forward=lambda images, targets, mask: network(images.double(), targets, mask),
        optimizer=build.optimizer(cfg)(network),
        ema=None,
        precision=Precision(torch.device("cpu"), None, torch.contiguous_format),
        schedule=build.schedule(cfg)(length, length * cfg.trainer.epochs),
        parameters=[p for p in network.parameters() if p.requires_grad],
    )

    def step(number: int, batch: Batch) -> tuple[float, Pairs]:
        state.step = state.position = number
        terms, _ = trainer.train_step(run, state, [batch])
        pairs = found.pop()
        state.optimizer.zero_grad()
        rows = zip(pairs.query.tolist(), pairs.target.tolist())
        return terms[state.term_names.index("total")].item(), [sorted(zip(*row)) for row in rows]

    return step


def their_step(peer: nn.Module, network: Network, cfg: DictConfig, length: int) -> Step:
    """Their loss, and AdamW with each tensor's learning rate and weight decay of the recipe."""
    groups = build.optimizer(cfg)(network).param_groups
    number_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    marks = {
        name: torch.full_like(tensor, number_of.get(id(tensor), -1), dtype=torch.float64)
        for name, tensor in network.state_dict(keep_vars=True).items()
    }
    number_of_theirs = {name: int(mark.flatten()[0]) for name, mark in renamed(network, marks, cfg).items()}
    parameters: list[list[nn.Parameter]] = [[] for _ in groups]
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            parameters[number_of_theirs[name]].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "lr": g["lr"], "weight_decay": g["weight_decay"]} for p, g in zip(parameters, groups)],
        betas=tuple(groups[0]["betas"]),
        eps=groups[0]["eps"],
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, build.schedule(cfg)(length, length * cfg.trainer.epochs))

    def step(number: int, batch: Batch) -> tuple[float, Pairs]:
        counts = batch.targets.counts
        found: Pairs = []

        def remember(module: nn.Module, inputs: object, indices: object) -> None:
            if isinstance(module, RTDetrHungarianMatcher):  # made anew by every call of their loss
                found.append(packed(indices, counts))

        per_image = zip(batch.targets.labels.split(counts), batch.targets.boxes.split(counts))
        labels = [{"class_labels": labels, "boxes": boxes.double()} for labels, boxes in per_image]
        with nn.modules.module.register_module_forward_hook(remember):
            loss = peer(pixel_values=batch.pixels(torch.contiguous_format).double(), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), cfg.trainer.clip_max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        last, *auxiliary, encoder = found  # their loss matches the last layer first
        return loss.item(), [*auxiliary, last, encoder]

    return step


def packed(indices: Iterable[tuple[Tensor, Tensor]], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Their pairs per image as pairs of (query, object of the whole batch)."""
    firsts = accumulate(counts, initial=0)
    return sorted(
        (q, first + t)
        for (queries, objects), first in zip(indices, firsts)
        for q, t in zip(queries.tolist(), objects.tolist())
    )


def first_flip(ours: Pairs, theirs: Pairs, batch: Batch) -> str:
    """The first object that was matched to different queries, in words; empty where there is none."""
    for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            query, target = sorted(set(mine) - set(other))[0]
            image = next(i for i, end in enumerate(accumulate(batch.targets.counts)) if target < end)
            name = "the encoder" if layer == len(ours) - 1 else f"layer {layer}"
            answer = next(q for q, t in other if t == target)
            return f"{name}, image {batch.image_ids[image]}, object {target}: query {query} here, {answer} there"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit", type=float, default=1e-6, help="largest difference, of a loss above 1 relative")
    arguments = parser.parse_args()
    largest = 0.0
    print("| step | ours | transformers | difference |\n|--:|--:|--:|--:|")
    for pair in islice(steps(arguments.overrides), arguments.steps):
        if not pair.flipped:
            largest = max(largest, pair.difference)
        if pair.step in (1, 2, 5) or pair.step % 10 == 0 or pair.flipped:
            print(f"| {pair.step} | {pair.ours:.12f} | {pair.theirs:.12f} | {pair.difference:.1e} |", flush=True)
        if pair.flipped:
            print(f"first match that differs: step {pair.step}, {pair.flipped}")
    print(f"largest difference: {largest:.1e}")
    raise SystemExit(int(not largest <= arguments.limit or math.isnan(largest)))


if __name__ == "__main__":
    main()
