"""Check all splits of a data set before something is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from detr_exp.data.classes import confusable
from detr_exp.data.content import SPLITS, Content, Split
from detr_exp.data.headers import accounted, report_unlisted
from detr_exp.data.joined import tables_of
from detr_exp.data.problems import DataError, Problems


def check_splits(
    content: Content, classes: Sequence[str], split: Callable[[str], Split], on_error: str, lacks: Mapping[str, str]
) -> None:
    """Read all annotations and the headers of all images.

    Args:
        content: the data set.
        classes: names of all labels.
        split: name -> a split that exists.
        on_error: `error`, or `skip` to leave out images that cannot be read.
        lacks: what is wrong, for each split that is needed and does not exist.

    Raises:
        DataError: lists all problems of all splits, or that there is no object to train on.
    """
    errors: list[str] = []
    names = Problems(content.origin)
    for group in confusable(classes):
        names.warn("class names that differ only in spelling", group)
    names.report()
    for name in SPLITS:
        problems = Problems(f"{content.origin}: {name}", on_error)
        try:
            if name in content.read:
                _check(name, split(name), problems)
            elif name in lacks:
                problems.error("splits that a training needs", lacks[name])
            problems.report()
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    report_unlisted(content.origin, [table for name in content.read for table in tables_of(split(name)).values()])


def _check(name: str, split: Split, problems: Problems) -> None:
    account, is_empty = accounted(split, problems)
    if is_empty and name == "train":
        problems.error("no object to train on; fix the annotations, or the paths where they are searched", account)
    elif is_empty:
        problems.warn(f"no object to measure on: every mAP on {name} is -1, and no epoch is the best", account)
