"""The page to look at mistakes, driven in a headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from detr_exp.metric.errors import Judged, costs
from detr_exp.metric.suspects import suspects
from detr_exp.runs.review_page import image_entry, places, render, thumbnail
from detr_exp.values import Values
from tests.browser import Browser
from tests.metric.test_suspects import IMAGES, NOTHING, scene

CLASSES = [["<b>cat</b>", 3], ["dog", 5], ["a very long name of a class that is cut nowhere", 9]]
KINDS = ["class", "box", "missing", "invented"]


def facts_of(images: dict[int, Judged], **more: object) -> Values:
    ap50, by_kind = costs(list(images.values()), 3)
    known = {"title": "Review of <run> on val", "about": "outputs/run", "classes": CLASSES, "threshold": 0.5}
    known |= {
        "least": 0.05,
        "ap50": ap50,
        "costs": by_kind,
        "all_images": len(images),
        "split": "val",
        "judges": ["run"],
    }
    return known | more


def page_of(images: dict[int, Judged], path: Path, **facts: object) -> Path:
    pixels = thumbnail(np.full((150, 150, 3), 90, np.uint8), 10_000)
    names = {number: f"some/folder/{number}&.jpg" for number in images}
    entries = []
    for number, one in images.items():
        annotations = [1000 * number + place for place in range(len(one.truth_labels))]
        shapes = (
            ["M1 1L9 1L9 9Z" for _ in one.truth_labels],
            ["M3 3L12 3L12 12Z" for score in one.scores if score >= 0.05],
        )
        shown = dict(annotations=annotations, outlines=shapes, pixels=pixels, seen=False, judge=0)
        entries.append(image_entry(number, names[number], (150, 150), one, 0.05, **shown))
    path.write_text(render(entries, suspects(images), facts_of(images, **facts), datetime(2026, 1, 2)))
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Browser]:
    """A page with planted errors, without marks."""
    images = {100 + number: scene(number, KINDS[number % 4] if number % 6 == 0 else "") for number in range(IMAGES)}
    browser.open(page_of(images, tmp_path / "review.html"))
    yield browser
    assert not browser.errors


def count(page: Browser) -> int:
    return int(str(page.run("document.getElementById('count').textContent.split(' ')[0].replaceAll(',', '')")))


def choose(page: Browser, name: str, value: str) -> None:
    page.run(
        f"(() => {{ const one = document.getElementById('{name}'); one.value = '{value}';"
        "one.dispatchEvent(new Event('input')); one.dispatchEvent(new Event('change')); })()"
    )


def test_filters_sort_and_slider(page: Browser) -> None:
    every = count(page)
    assert page.run("state.view") == "suspects"
    assert every == page.run("suspects.length") > 10
    choose(page, "kind", "class")
    assert 0 < count(page) < every
    assert page.run("shown.every((one) => one.kind === 'class')")
    choose(page, "class", "1")
    assert page.run("shown.every((one) => classesOf(one).includes(1))")
    choose(page, "size", "large")
    assert page.run("document.querySelector('.empty').textContent").startswith("Nothing passes")
    page.click("#reset")
    assert count(page) == every
    page.click("[data-view=errors]")
    before = count(page)
    choose(page, "threshold", "0.8")
    page.until("state.threshold === 0.8 && current.threshold === 0.8")
    assert page.run("shown.every((one) => one.kind === 'missed' || one.score >= 0.8)")
    assert count(page) > before, "objects that were found with lower scores are missed now"
    assert page.run("document.getElementById('facts').textContent.includes('precision from 0.80')")
    choose(page, "search", "107")
    page.until("shown.length && shown.every((one) => one.image.id === 107)")
    page.click("[data-view=images]")
    assert count(page) == 1


def test_enlarge_mark_and_export_by_keyboard(page: Browser) -> None:
    assert page.run("document.getElementById('export').disabled")
    page.press("ArrowRight")
    page.press("Enter")
    page.until("document.getElementById('dialog').open")
    first = page.run("shown[0].key")
    page.press("w")
    page.press("ArrowRight")
    page.press("u")
    page.press("ArrowRight")
    page.press("r")
    page.press("x")
    page.press("Escape")
    page.until("!document.getElementById('dialog').open")
    assert page.run("marks") == {first: "wrong", page.run("shown[1].key"): "unsure"}
    page.until("document.activeElement === document.getElementById('grid').children[2]")  # after the event
    choose(page, "marked", "wrong")
    assert count(page) == 1
    page.run("window.isLeft = true; location.reload()")
    page.until("!window.isLeft && document.readyState === 'complete' && Object.keys(marks).length === 2")
    page.press("e")
    (path,) = wait_for(page.downloads)
    content = json.loads(path.read_text())
    path.unlink()
    assert content["categories"] == [{"id": number, "name": name} for name, number in CLASSES]
    assert [one["mark"] for one in content["annotations"]] == ["wrong", "unsure"]
    images = {image["id"]: image for image in content["images"]}
    for one in content["annotations"]:
        assert images[one["image_id"]]["file_name"] == f"some/folder/{one['image_id']}&.jpg"
        assert one["area"] == pytest.approx(one["bbox"][2] * one["bbox"][3])
        assert one["category_id"] in (3, 5, 9)
        assert one["label"] or one["prediction"]
        if one["label"]:
            assert one["id"] // 1000 == one["image_id"], "the annotation's own"
        else:
            assert one["id"] > 1000 * max(images) + 100
    page.run("localStorage.clear()")


def wait_for(folder: Path) -> list[Path]:
    import time

    end = time.monotonic() + 20
    while not (found := list(folder.glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_mouse_enlarges_and_labels_stay_inside_the_image(page: Browser) -> None:
    page.click("[data-view=images]")
    page.click(".card")
    page.until("document.getElementById('dialog').open")
    texts = page.run(
        "(() => { const all = document.querySelector('#large svg').getBoundingClientRect();"
        "return [...document.querySelectorAll('#large text')].every((one) => { const box = one.getBoundingClientRect();"
        "return box.width > 0 && box.left >= all.left - 1 && box.right <= all.right + 30; }); })()"
    )
    assert texts
    assert page.run("document.querySelectorAll('#large text').length") >= 8
    paint = "getComputedStyle(document.querySelector('#large path.shape.hit'))"
    assert page.run(f"[{paint}.fill === {paint}.stroke, Number({paint}.fillOpacity)]") == [True, 0.22]
    assert page.run("getComputedStyle(document.querySelector('#large rect.hit')).fill") == "none"
    page.press("t")
    page.until("!state.truths && document.querySelectorAll('#large .truth, #large .lost').length === 0")
    page.press("Escape")


@pytest.mark.parametrize(
    ("images", "facts", "expected"),
    [
        ({}, {"all_images": 0}, "There are no images."),
        ({1: scene(1)}, {"threshold": 0.97}, "No prediction has a score from 0.97 on"),
        ({n: scene(n) for n in range(3)}, {"all_images": 9}, "Only 3 images of 9 are on this page"),
    ],
    ids=["no images", "no predictions above the threshold", "not all images"],
)
def test_empty_states(browser: Browser, tmp_path: Path, images: dict, facts: Values, expected: str) -> None:
    browser.open(page_of(images, tmp_path / "review.html", **facts))
    assert expected in str(browser.run("document.body.innerText"))
    assert not browser.errors


def test_images_without_objects(browser: Browser, tmp_path: Path) -> None:
    from detr_exp.metric.errors import judge

    one = judge(np.array([0.9]), np.array([0]), np.array([[1.0, 2, 30, 40]]), NOTHING, NOTHING)
    browser.open(page_of({1: one}, tmp_path / "review.html"))
    text = str(browser.run("document.body.innerText"))
    assert "no labelled objects" in text
    assert "1 image\n" in text
    assert "<b>cat</b> 0.90: background" in text, "class names are text"
    assert not browser.errors


def test_the_page_is_complete_and_escaped(tmp_path: Path) -> None:
    html = page_of({1: scene(1)}, tmp_path / "review.html").read_text()
    assert "<title>Review of &lt;run&gt; on val</title>" in html
    assert "<b>cat" not in html
    assert "http://www.w3.org/2000/svg" in html
    assert not any(
        word in html.replace("http://www.w3.org/2000/svg", "") for word in ("http:", "https:", "@import", "src=")
    )


def test_a_thousand_images_fit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    assert len(thumbnail(noise, 29_000)) <= 29_000, "the worst image there is"
    small = thumbnail(np.zeros((40, 60, 3), np.uint8), 29_000)
    assert len(small) < 2_000


def test_images_with_suspects_come_before_those_with_errors() -> None:
    images = {number: scene(number, "class" if number == 7 else "") for number in range(IMAGES)}
    doubtful = suspects(images)
    assert places(doubtful, images, 0.5, 3) == list(dict.fromkeys(one.image_id for one in doubtful))[:3]
    assert sorted(places(doubtful, images, 0.5, 1000)) == sorted(images)
