"""Find the label file of a YOLO image.

Tools put label files in a folder `labels` in place of `images` (ultralytics, Roboflow, CVAT, Label Studio), beside the
images (Darknet), in `labels` in the images' folder, or in `labels/<split>`. Upper and lower case are not
distinguished, and linked folders are followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from detr_exp.data.files import Folder, decoded
from detr_exp.data.problems import Problems

IMAGES, LABELS = "images", "labels"
_ROW = 5  # smallest number of values in a row


class Labels:
    """The label files of a split.

    Args:
        folder: of the data set.
        said: label files without image that were already reported; `check` adds to them.
    """

    def __init__(self, folder: Folder, said: set[Path]) -> None:
        self.folder, self._said = folder, said
        self._children: dict[Path, dict[str, list[str]]] = {}
        self._texts: dict[Path, dict[str, list[str]]] = {}
        self._places: dict[tuple[Path, bool], list[Path]] = {}

    def of(self, image: Path) -> list[Path]:
        """The possible label files of an image, the most likely first."""
        found = self._at(image)
        if found or self._has_labels(image.parent):
            return found
        real = Path(os.path.realpath(image))  # the labels may lie beside the target of a link
        return found if real == image or not self.folder.inside(real) else self._at(real)

    def places(self, folder: Path) -> list[Path]:
        """The existing folders that may contain the label files of a folder of images."""
        return self._counterparts(folder, for_labels=True)

    def check(self, used: dict[Path, list[Path]], problems: Problems) -> None:
        """Report label files without image and images without label file.

        Args:
            used: per image its label files.
            problems: receives the reports.
        """
        claimed = {file for files in used.values() for file in files}
        folders: dict[Path, list[Path]] = {}
        for image in used:
            folders.setdefault(image.parent, []).append(image)
        for place in dict.fromkeys(place for folder in folders for place in self.places(folder)):
            for file in self._texts_below(place):
                if file in claimed or file in self._said or self._has_image(file) or not self._has_rows(file):
                    continue
                self._said.add(file)
                problems.warn("label files without image were left out, with their objects", str(file))
        for folder, images in folders.items():
            bare = [image for image in images if not used[image]]
            if len(bare) == len(images) and len(bare) < len(used):
                kind = "folders in which no image has a label file; they are used as images without objects"
                looked = ", ".join(map(str, self.places(folder)))
                problems.warn(
                    kind, f"{folder}: {len(bare)} images, searched for {bare[0].stem}.txt and others in {looked}"
                )
            else:
                for image in bare:
                    problems.note("images without label file have no objects", str(image))
        owner: dict[Path, Path] = {}
        for image, files in used.items():
            if files and owner.setdefault(files[0], image) != image:
                kind = "images that share a label file, since their names differ only in the suffix; rename them"
                problems.warn(kind, f"{files[0]}: {owner[files[0]].name}, {image.name}")
            for other in files[1:]:
                if self._has_rows(other) and self.folder.data(other) != self.folder.data(files[0]):
                    kind = "only the first label file was used, since the image has several that differ"
                    problems.warn(kind, f"{other}, for {files[0]}")

    def searched(self, used: dict[Path, list[Path]]) -> str:
        """How many images have a label file and which folders were searched, for the message without objects."""
        bare = next((image for image, files in used.items() if not files), None)
        text = f"{sum(map(bool, used.values()))} of {len(used)} images have a label file"
        if bare is None:
            return text
        places = ", ".join(str(place / f"{bare.stem}.txt") for place in self.places(bare.parent))
        return f"{text}; searched {places}, and a folder {LABELS} in place of {IMAGES}, beside and above"

    def _at(self, image: Path) -> list[Path]:
        found = []
        for place in self.places(image.parent):
            texts = self._listing(self._texts, place)
            found += [place / name for key in dict.fromkeys((image.stem, image.name)) for name in texts.get(key, ())]
        return found

    def _has_labels(self, folder: Path) -> bool:
        return any(place != folder and self._listing(self._texts, place) for place in self.places(folder))

    def _has_image(self, file: Path) -> bool:
        """Whether an image with the name of a label file exists in one of the folders for its images."""
        for place in self._counterparts(file.parent, for_labels=False):
            images = self.folder.images(place)
            stem, suffix = os.path.splitext(file.stem)
            if file.stem in images or any(one.suffix == suffix for one in images.get(stem, ())):
                return True
        return False

    def _texts_below(self, place: Path) -> Iterator[Path]:
        if any(part.lower() == LABELS for part in _split(place, self._base(place))):
            for file in self.folder.below(place)[0]:
                if file.suffix.lower() == ".txt":
                    yield file
        else:
            for names in self._listing(self._texts, place).values():
                yield from (place / name for name in names)

    def _counterparts(self, folder: Path, *, for_labels: bool) -> list[Path]:
        """The existing counterparts of `folder`: one name of its path is removed, another inserted."""
        if (folder, for_labels) not in self._places:
            drop, put = (IMAGES, LABELS) if for_labels else (LABELS, IMAGES)
            base = self._base(folder)
            parts = _split(folder, base)
            named = [i for i, part in enumerate(parts) if part.lower() == drop][::-1]
            ways = [[*parts[:i], put, *parts[i + 1 :]] for i in named]  # replaced
            ways.append(parts)  # beside
            for rest in ([*parts[:i], *parts[i + 1 :]] for i in (*named, len(parts))):
                ways += [[*rest[:cut], put, *rest[cut:]] for cut in range(len(rest), -1, -1)]
                ways.append(rest)
            found = dict.fromkeys(place for way in ways for place in self._existing(base, way))
            self._places[folder, for_labels] = list(found)
        return self._places[folder, for_labels]

    def _existing(self, base: Path, names: list[str]) -> list[Path]:
        """The folders of this path: spelled exactly, else in another case."""
        places = [base]
        for name in names:
            found = [(place, self._listing(self._children, place).get(name.lower(), ())) for place in places]
            exact = [place / name for place, spelled in found if name in spelled]
            places = exact or [place / one for place, spelled in found for one in sorted(spelled)]
        return places

    def _listing(self, known: dict[Path, dict[str, list[str]]], place: Path) -> dict[str, list[str]]:
        """The subfolders by lower-case name, or the text files by stem."""
        if place not in known:
            listing: dict[str, list[str]] = {}
            entries = self._entries(place)
            if known is self._children:
                for entry in entries:
                    if not os.path.splitext(entry.name)[1] or os.path.isdir(entry):
                        listing.setdefault(entry.name.lower(), []).append(entry.name)
            else:
                for name in sorted((entry.name for entry in entries), key=lambda name: not name.endswith(".txt")):
                    stem, suffix = os.path.splitext(name)
                    if suffix.lower() == ".txt":
                        listing.setdefault(stem, []).append(name)
            known[place] = listing
        return known[place]

    def _entries(self, place: Path) -> Sequence[os.DirEntry[str]]:
        try:
            return self.folder.entries(place)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:  # an error, not "no labels"
            raise ValueError(f"{place} cannot be read ({error.strerror}); change their permissions") from error

    def _has_rows(self, file: Path) -> bool:
        """Whether a text file looks like rows of numbers rather than a list or a text."""
        try:
            lines = decoded(self.folder.data(file), file).splitlines() if self.folder.is_file(file) else []
            words = next((line.split() for line in lines if line.strip()), [])
            return len(words) >= _ROW and all(map(_is_number, words[1:_ROW]))
        except (OSError, ValueError):
            return True  # unknown

    def _base(self, path: Path) -> Path:
        roots = (self.folder.root, *self.folder.allowed)
        return next((root for root in roots if path.is_relative_to(root)), Path(path.anchor))


def _split(path: Path, base: Path) -> list[str]:
    return list(path.relative_to(base).parts)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
