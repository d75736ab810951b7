"""The criterion: loss terms, the predictions they apply to, and their weights.

Legend: L decoder layers, B images, Q queries (all groups), C logits, M matched pairs of a layer.

Two parts are supervised: the decoder layers with the encoder's tokens, matched at every step, and the denoising
queries, whose objects are known. The losses are a table of terms; terms over the same layers and pairs share
intermediate results.

Counts (of boxes, of images) may be numbers or 0-dim tensors. They are not converted: a number needs no operator, and
a tensor on the device needs no synchronisation.

The number of pairs of a union is known only after matching: that of one micro-batch, then. If a step has several, each
takes its own pairs per object for those of the whole step. With the ranks it is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config

from detr_exp.loss.matches import Matches, Stack, between, last_pairs, layer_of, union_pairs
from detr_exp.loss.open_sizes import as_tensor, open_stack, open_targets
from detr_exp.loss.stacks import Counts, denoising_stacks, maps_stack, matched_predictions, without_tasks
from detr_exp.loss.teacher import Taught, to_match
from detr_exp.loss.term import MAPS, Term
from detr_exp.matcher.hungarian import Assignment, Matcher
from detr_exp.ops.boxes import EPS
from detr_exp.ops.transfer import to_device
from detr_exp.protocols import Compiling, Epochal
from detr_exp.structures import Outputs, Prediction, Targets, leaves, mapped, predicted

Losses = list[tuple[str, list[str], Tensor]]


class SetCriterion(nn.Module):
    """Weighted losses of a network's outputs.

    Args:
        num_classes: K.
        activation: "sigmoid" (K logits) or "softmax" (K + 1, background last).
        matcher: see `detr_exp.matcher.hungarian`; receives the weights of all terms, some of which also weigh costs.
        terms: name -> loss; null removes one. It is logged as `loss_<name><suffix>`, a statistic as `<name><suffix>`.
        share_matched_indices: terms with `pairs: own` use the last layer's pairs for all decoder layers.
        aux_loss: supervise the intermediate layers, the encoder and the denoising queries, not only the last layer.
        keypoint_counts, keypoint_sigmas: keypoints of each class slot, and their OKS scales, where they are predicted.
        class_weights: `[K]` how much a match counts in the class loss by its class (see `loss.class_weights`); None: 1.
    """

    class_weights: Tensor | None
    keypoint_sigmas: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        activation: str,
        matcher: Matcher,
        terms: Mapping[str, Term | None],
        share_matched_indices: bool,
        aux_loss: bool,
        keypoint_counts: Sequence[int] = (),
        keypoint_sigmas: Sequence[float] = (),
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.activation = activation
        self.matcher = matcher
        self.terms = {name: term for name, term in terms.items() if term is not None}
        self.share_matched_indices = share_matched_indices
        self.aux_loss = aux_loss
        self.keypoint_counts = tuple(keypoint_counts)
        self.weights = {name: term.weight for name, term in self.terms.items() if term.weight is not None}
        weights = None if class_weights is None else torch.tensor([*class_weights, 1.0])
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("keypoint_sigmas", torch.tensor(keypoint_sigmas, dtype=torch.float32), persistent=False)
        self._compiled: Callable[..., Losses] | None = None

    def forward(
        self,
        outputs: Outputs,
        targets: Targets,
        num_boxes: float | Tensor,
        num_images: float | Tensor | None = None,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
        taught: Taught | None = None,
    ) -> dict[str, Tensor]:
        """Losses in float32 (float64 stays), whatever precision the network ran in.

        Args:
            outputs: of the network, on one device with the targets.
            targets: ground truth of this batch.
            num_boxes: objects of the whole effective batch: all micro-batches of an accumulation window, mean over the
                ranks. Terms of micro-batches then simply add up.
            num_images: images of the effective batch; only a term that divides by queries needs it. None: this batch
                is the effective batch.
            over_ranks: the mean of a tensor over the ranks, all of which call it; only terms that divide by pairs need
                it. None: this process is alone.
            taught: what a teacher says about this batch; None: terms against a teacher are left out.

        Returns:
            Weighted 0-dim terms `loss_<name><suffix>`, their sum `total`, and statistics `<name><suffix>`. Suffixes:
            none for the last layer, `_aux_<i>`, `_pre`, `_enc`, `_dn_<i>`, `_dn_pre`.
        """
        with torch.autocast(outputs.layers.logits.device.type, enabled=False):
            unsupervised = None
            if not self.aux_loss:
                unsupervised = outputs
                outputs = Outputs(mapped(outputs.layers, lambda tensor: tensor[-1:]), groups=outputs.groups)
            self._check(outputs.layers, targets)
            counts = Counts(num_boxes, len(targets.counts) if num_images is None else num_images, over_ranks)
            if self._compiled is not None:
                device = outputs.layers.boxes.device
                counts = Counts(as_tensor(counts.boxes, device), as_tensor(counts.images, device), over_ranks)
            found = self._found(self._stacks(outputs, targets, counts, self.of("objects")), targets, counts)
            if taught is not None:
                found = found + self._against_teacher(outputs, taught, targets, counts)
            total = torch.cat([vector for name, _, vector in found if name.startswith("loss_")]).sum()
            if unsupervised is not None:
                idle = [tensor.float().sum() for tensor in _differentiable(unsupervised)]
                total = total + 0 * torch.stack(idle).sum()
        named = {
            f"{name}{suffix}": term
            for name, suffixes, vector in found
            for suffix, term in zip(suffixes, vector.unbind(), strict=True)
        }
        return {**named, "total": total}

    def begin_epoch(self, epoch: int) -> None:
        """See `protocols.Epochal`."""
        if isinstance(self.matcher, Epochal):
            self.matcher.begin_epoch(epoch)

    def names(self, tasks: Collection[str]) -> list[str]:
        """The terms that apply to a network that predicts `tasks`, of `masks` and `keypoints`, beside boxes."""
        missing = {"masks", "keypoints"} - set(tasks)
        return [name for name in self.of("objects") if name in self.weights and not missing & {*self.terms[name].needs}]

    def of(self, against: str) -> tuple[str, ...]:
        """The names of the terms against the `objects` or a `teacher`."""
        return tuple(name for name, term in self.terms.items() if term.against == against)

    def compile(self, **settings: Any) -> None:
        """Compile the matching costs and the losses, in place; `settings` are those of `torch.compile`.

        One graph serves batches of any number of objects. Terms of masks are left as they are: their matrix products
        have the size of each image's number of objects.
        """
        if isinstance(self.matcher, Compiling):
            self.matcher.compile()
        self._compiled = torch.compile(self.losses, fullgraph=True, **settings)

    def _found(self, stacks: dict[str, list[Stack]], targets: Targets, counts: Counts) -> Losses:
        """The losses, compiled where that was asked for."""
        if self._compiled is None:
            return self.losses(stacks, targets, counts, self.of("objects"))
        ragged = tuple(name for name in self.of("objects") if "masks" in self.terms[name].needs)
        others = tuple(name for name in self.of("objects") if name not in ragged)
        opened = {rule: [open_stack(stack) for stack in of_rule] for rule, of_rule in stacks.items()}
        # numbers of objects that are equal by chance stay independent
        with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            found = self._compiled(opened, open_targets(targets), counts._replace(over_ranks=None), others)
        return found + self.losses(stacks, targets, counts, ragged)

    def losses(
        self, stacks: dict[str, list[Stack]], targets: Targets, counts: Counts, names: tuple[str, ...]
    ) -> Losses:
        """All that follows the matching, for some terms: (term, suffixes, values over these layers), stack by stack.

        No decision depends on a value of a tensor, so that it compiles as one graph.
        """
        shared: dict[tuple[str, tuple[int, ...]], Matches] = {}
        found = []
        for name in names:
            term = self.terms[name]
            rule = self._rule(term)
            places = tuple(i for i, stack in enumerate(stacks[rule]) if term.applies(stack, targets))
            if not places:
                continue
            mine = [stacks[rule][i] for i in places]
            if (rule, places) not in shared:
                shared[rule, places] = Matches(
                    *(mine, targets, self.num_classes, self.activation, self.keypoint_counts),
                    class_weights=self.class_weights,
                    keypoint_sigmas=self.keypoint_sigmas,
                )
            matches = shared[rule, places]
            for stack, values in zip(mine, term.function(matches), strict=True):
                sums = values if values.ndim == 1 else values.flatten(1).sum(1)
                weight, known_as = (1.0, name) if term.weight is None else (term.weight, f"loss_{name}")
                found.append((known_as, stack.suffixes, sums * (weight / _divisor(term, stack, counts))))
        return found

    def _against_teacher(self, outputs: Outputs, taught: Taught, targets: Targets, counts: Counts) -> Losses:
        """The losses against a teacher, whose queries take the place of the objects."""
        names = self.of("teacher")
        of_queries = tuple(name for name in names if MAPS not in self.terms[name].at)
        places = {place for name in of_queries for place in self.terms[name].at}
        chosen = Outputs(
            without_tasks(outputs.layers),
            without_tasks(outputs.encoder) if outputs.encoder is not None and "encoder" in places else None,
            groups=outputs.groups,
            initial=without_tasks(outputs.initial) if outputs.initial is not None and "initial" in places else None,
        )
        found: Losses = []
        if of_queries:
            stacks = self._stacks(chosen, to_match(taught.targets, targets), counts, of_queries)
            found += self.losses(stacks, taught.targets, counts, of_queries)
        if taught.maps is not None:
            of_maps = tuple(name for name in names if name not in of_queries)
            stack = [maps_stack(taught.maps)]
            found += self.losses({self._rule(self.terms[n]): stack for n in of_maps}, taught.targets, counts, of_maps)
        return found

    def _rule(self, term: Term) -> str:
        return "last" if self.share_matched_indices and term.pairs == "own" else term.pairs

    def _stacks(
        self, outputs: Outputs, targets: Targets, counts: Counts, names: Sequence[str]
    ) -> dict[str, list[Stack]]:
        """The predictions with their pairs, for each value of `pairs` in the terms of these names."""
        predictions = matched_predictions(outputs)
        layers, *others = [prediction for _, _, prediction in predictions]
        terms = [self.terms[name] for name in names]
        rules = list(dict.fromkeys(map(self._rule, terms)))  # all ranks in the same order
        counted = {self._rule(term) for term in terms if term.divide in ("pairs", "none")}
        last = len(layers.boxes) - 1
        if rules == ["last"]:  # the others need not be matched
            layers, last = mapped(layers, lambda tensor: tensor[-1:]), 0
        weights = {name: self.weights[name] for name in names if name in self.weights}
        solved = self.matcher([layers, *others], targets, outputs.groups, weights, self.keypoint_counts)
        denoising = [] if outputs.denoising is None else denoising_stacks(outputs.denoising, counts, targets.counts)
        num_queries = layers.boxes.shape[2] * counts.images
        stacks: dict[str, list[Stack]] = {}
        for rule in rules:
            pairs = solved
            if rule == "last":
                pairs = last_pairs(layer_of(solved, slice(last, None)), len(predictions[0][2].boxes))
            elif rule == "union":
                pairs = union_pairs(solved, last)
            over_ranks = counts.over_ranks if rule in counted else None
            num_pairs = counts.boxes * _pairs_per_object(pairs, len(targets), outputs.groups, over_ranks)
            first, stacks[rule] = 0, []
            for place, suffixes, prediction in predictions:
                mine = layer_of(pairs, slice(first, first + len(suffixes)))
                first += len(suffixes)
                stacks[rule].append(
                    Stack(frozenset([place]), prediction, mine, suffixes, outputs.groups, num_pairs, num_queries)
                )
            stacks[rule] += denoising
        return stacks

    def _check(self, prediction: Prediction, targets: Targets) -> None:
        if not hasattr(prediction, "_fields"):  # what is no named tuple is not walked as a tree
            raise ValueError(
                f"the network predicts a {type(prediction).__name__}; it has to be a NamedTuple with logits, boxes and "
                "whatever else it predicts, like structures.Prediction"
            )
        needed = self.num_classes + (self.activation == "softmax")
        if prediction.logits.shape[-1] != needed:
            raise ValueError(
                f"the network predicts {prediction.logits.shape[-1]} logits per query, but {self.num_classes} classes "
                f"with a {self.activation} loss need {needed}; build the network with num_classes={self.num_classes} "
                f"and activation={self.activation!r}"
            )
        for task, annotated, words in (
            ("masks", targets.masks is not None, "polygons or RLE"),
            ("keypoints", targets.keypoints is not None and bool(self.keypoint_counts), "keypoints"),
        ):
            if predicted(prediction, task) is not None and not annotated:
                raise ValueError(
                    f"the network predicts {task}, but the data have none; use data with {words}, or a model without "
                    f"{task}: model=rfdetr"
                )


def _divisor(term: Term, stack: Stack, counts: Counts) -> float | Tensor:
    if term.divide == "queries":
        assert term.background is not None
        return _sum_of_weights(stack.num_queries, counts.boxes * stack.copies, term.background)
    if term.divide == "pairs":
        return between(1, stack.num_pairs)
    if term.divide == "images":
        return between(1, counts.images) * stack.copies
    return 1.0 if term.divide == "none" else between(1, counts.boxes) * stack.copies


def _pairs_per_object(
    pairs: Assignment, num_objects: int, copies: int, over_ranks: Callable[[Tensor], Tensor] | None
) -> float | Tensor:
    """Pairs of a layer per object of this batch, over all ranks."""
    num_pairs = pairs.query.shape[1]
    if over_ranks is None:
        return num_pairs / num_objects if num_objects else copies
    both = to_device(np.array([num_pairs, num_objects], np.float32), pairs.query.device)
    num_pairs_of_all, num_objects_of_all = over_ranks(both).unbind()
    return torch.where(num_objects_of_all > 0, num_pairs_of_all / num_objects_of_all, copies)


def _sum_of_weights(num_queries: float | Tensor, num_positives: float | Tensor, background: float) -> float | Tensor:
    """Weights of a layer's queries over the effective batch: one with an object, `background` without.

    Computed from counts and not from this batch's labels, so that all micro-batches divide by the same number.
    """
    share = between(0, num_positives / num_queries, 1)
    return between(EPS, num_queries * (share + (1 - share) * background))


def _differentiable(outputs: Outputs) -> list[Tensor]:
    """A zero that depends on all predictions: every parameter needs a gradient, also that of unsupervised parts."""
    denoising = outputs.denoising
    parts = [outputs.layers, outputs.initial, outputs.encoder]
    parts += [] if denoising is None else [denoising.layers, denoising.initial]
    return [tensor for part in parts for tensor in leaves(part)]
