"""An entry of the table of losses: its function, where it applies, for which pairs, and its divisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from detr_exp.loss.matches import Matches, Stack
from detr_exp.structures import Targets, predicted

PLACES = ("layers", "initial", "encoder", "denoising")
MAPS = "maps"
PAIRS = ("own", "last", "union")
DIVISORS = ("objects", "pairs", "queries", "none", "images")
AGAINST = ("objects", "teacher")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss term.

    Attributes:
        function: matches -> of each stack `[l, ...]`, unreduced; the criterion sums all axes but the first.
        weight: of the term; None: a statistic, logged under its own name and no part of the loss.
        at: where it applies: `layers`, `initial` (what a network predicts before its first layer), `encoder`,
            `denoising`; or `maps`, those of the encoder beside a teacher's.
        pairs: `own`: those of each layer; `last`: those of the last layer for all decoder layers; `union`: those of all
            layers and the encoder together. Denoising queries always use their own objects.
        divide: by the `objects` of the step; by their `pairs`, counted after matching; by the weights of all
            `queries`: one with an object, `background` without; by `images`; or by `none`, where the function divides.
        background: see `divide`.
        needs: fields of predictions without which the term does not apply.
        needs_targets: fields of targets likewise.
        against: what predictions are matched and compared with: the `objects` of the ground truth, or what a `teacher`
            predicts, in training only. The latter is divided by the objects or images of the step as well.

    Raises:
        ValueError: another value of `at`, `pairs`, `divide` or `against`, or no `background` where it is needed.
    """

    function: Callable[[Matches], Sequence[Tensor]]
    weight: float | None
    at: Sequence[str] = PLACES
    pairs: str = "own"
    divide: str = "objects"
    background: float | None = None
    needs: Sequence[str] = ()
    needs_targets: Sequence[str] = ()
    against: str = "objects"

    def __post_init__(self) -> None:
        for key, values, known in (
            ("against", (self.against,), AGAINST),
            ("at", self.at, PLACES if self.against == "objects" else ("layers", "initial", "encoder", MAPS)),
            ("pairs", (self.pairs,), PAIRS),
            ("divide", (self.divide,), DIVISORS if self.against == "objects" else ("objects", "images")),
        ):
            if wrong := [value for value in values if value not in known]:
                raise ValueError(f"a loss term has {key}: {wrong[0]!r}; use {', '.join(known)}")
        if self.divide == "queries" and self.background is None:
            raise ValueError("a loss term with divide: queries needs the weight of background: background: 0.1")

    def applies(self, stack: Stack, targets: Targets) -> bool:
        """Whether this term applies to these predictions."""
        own = targets.extra | targets.image_extra
        annotated: dict[str, Tensor | None] = {**own, "masks": targets.masks, "keypoints": targets.keypoints}
        return (
            stack.place <= set(self.at)
            and all(predicted(stack.prediction, name) is not None for name in self.needs)
            and all(annotated.get(name) is not None for name in self.needs_targets)
        )
