"""Which checkpoint judges which image."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from detr_exp.inference import cross_fit


class Names:
    """A split that only has names."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.image_ids = list(range(len(paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])


def test_images_are_known_by_path_or_content(tmp_path: Path) -> None:
    one, copy, other = tmp_path / "a.jpg", tmp_path / "moved/b.jpg", tmp_path / "c.jpg"
    copy.parent.mkdir()
    for path, content in ((one, b"one"), (copy, b"one"), (other, b"two")):
        path.write_bytes(content)
    images = cross_fit._Images(Names(one))
    assert str(one) in images
    assert str(tmp_path / "moved/../a.jpg") in images
    assert str(copy) in images
    assert str(other) not in images
    assert str(tmp_path / "absent.jpg") not in images
    assert "synthetic 3" in cross_fit._Images(Names(Path("synthetic 3")))


def test_each_image_is_judged_by_the_first_that_has_not_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(f"{number}.jpg") for number in range(4)]
    trained = [[1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    detectors = [SimpleNamespace(cfg=place) for place in range(3)]
    monkeypatch.setattr(
        cross_fit.build,
        "data",
        lambda place: SimpleNamespace(split=lambda name: Names(*(paths[i] for i in trained[place]))),
    )
    opened = SimpleNamespace(data=SimpleNamespace(split=lambda name: Names(*paths)))
    judges, seen = cross_fit._judges(detectors, opened, "val")  # type: ignore[arg-type]
    assert judges == {0: 0, 1: 1, 2: 0, 3: 0}
    assert seen == {2, 3}
