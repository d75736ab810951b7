"""The epochs in which parts of the augmentation apply."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

NAMES = ("strong", "mosaic", "mixup", "multi_scale")


class Phases:
    """From which epoch to which each part applies, counted from 0.

    Args:
        stop_epoch: where parts end whose phase is not given; None: never.
        given: name -> `[first, end]`; `end` is the first epoch without it, None: never. None or no name: from the
            beginning to `stop_epoch`.
        absent: names of parts that are not used; they have no phase.

    Raises:
        ValueError: another name, no such pair, or one for a part that is not used.
    """

    def __init__(
        self,
        stop_epoch: int | None = None,
        given: Mapping[str, Sequence[int | None] | None] | None = None,
        absent: Collection[str] = (),
    ) -> None:
        self.spans: dict[str, tuple[int, int | None]] = dict.fromkeys(NAMES, (0, stop_epoch))
        for name, span in (given or {}).items():
            if name not in NAMES:
                raise ValueError(f"data.phases has {name!r}; it may have {', '.join(NAMES)}: data.phases.strong=[4,64]")
            if span is None:
                continue
            if name in absent:
                key = "data.multi_scale=rtdetr" if name == "multi_scale" else f"data.augment.{name}=0.5"
                raise ValueError(
                    f"data.phases.{name} is {list(span)}, but there is no {name}; use it, {key}, or leave it out, "
                    f"data.phases.{name}=null"
                )
            if len(span) != 2 or span[0] is None or (span[1] is not None and span[0] >= span[1]):
                raise ValueError(
                    f"data.phases.{name} is {list(span)}; it must be the first epoch with it and the first one "
                    f"without it again, or null for never: data.phases.{name}=[4,64]"
                )
            self.spans[name] = (span[0], span[1])

    def has(self, name: str, epoch: int) -> bool:
        """Whether a part applies in an epoch."""
        first, end = self.spans[name]
        return first <= epoch and (end is None or epoch < end)
