"""How much a choice flatters: the best of several looks better on the images that chose it than it is.

One half of the images, A, chooses; the other, B, judges. The difference of the values on A and on B holds two things:
the luck of the choice, and how much harder B is. They are told apart by what B would have chosen, measured on A: with
a and b the choices of A and of B, the luck is

    ((A(a) - A(b)) + (B(b) - B(a))) / 2

Each bracket compares two choices on the same images, so that how hard these are drops out; where A and B are equally
many images of one kind, its mean is that of the luck. `docs/statistics.md` has how much it scatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """What was chosen, more being better.

    Attributes:
        here: its value on the images that chose it.
        there: on the others.
    """

    here: float
    there: float


class Flattery(NamedTuple):
    """What became of a choice.

    Attributes:
        choice: the best on A.
        luck: how much its value on A flatters it.
    """

    choice: Choice
    luck: float

    def __str__(self) -> str:
        here, there = self.choice
        harder = here - there - self.luck
        return (
            f"chosen at {here:.4f} on half of the validation images, {there:.4f} on the other half: {self.luck:.4f} of "
            f"it was luck, and the other half is {abs(harder):.4f} {'harder' if harder >= 0 else 'easier'}"
        )


def flattery(of_a: Sequence[Choice], of_b: Sequence[Choice]) -> Flattery:
    """The best of several, and how much that flatters it.

    Args:
        of_a: of each of several the choice of A among what it offers: of a run its best epoch.
        of_b: likewise that of B.
    """
    a, b = (max(choices, key=lambda choice: choice.here) for choices in (of_a, of_b))
    return Flattery(a, ((a.here - b.there) + (b.here - a.there)) / 2)
