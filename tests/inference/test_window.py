"""The window of `show=true`, with a stand-in for Tk."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from detr_exp.inference.window import LARGEST, Window

KEYS: list[str] = []  # pressed one by one, at each update after the first


class Root:
    def __init__(self, className: str) -> None:
        self.bound: dict[str, Any] = {}
        self.titles: list[str] = []
        self.updates, self.is_destroyed = 0, False

    def bind(self, event: str, call: Any) -> None:
        self.bound[event] = call

    def protocol(self, name: str, call: Any) -> None:
        self.bound[name] = call

    def title(self, text: str) -> None:
        self.titles.append(text)

    def update(self) -> None:
        assert not self.is_destroyed, "as Tk would complain"
        self.updates += 1
        if KEYS:
            key = KEYS.pop(0)
            if key == "cross":
                self.bound["WM_DELETE_WINDOW"]()
            elif key:
                self.bound["<Key>"](SimpleNamespace(keysym=key))

    def destroy(self) -> None:
        self.is_destroyed = True


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    shown: list[Image.Image] = []
    tk = ModuleType("tkinter")
    label = SimpleNamespace(pack=lambda: None, configure=lambda image: None)
    vars(tk).update(Tk=Root, TclError=RuntimeError, Label=lambda root: label)
    image_tk = ModuleType("PIL.ImageTk")
    vars(image_tk).update(PhotoImage=lambda image, master: shown.append(image))
    monkeypatch.setitem(sys.modules, "tkinter", tk)
    monkeypatch.setitem(sys.modules, "PIL.ImageTk", image_tk)
    monkeypatch.setattr("PIL.ImageTk", image_tk, raising=False)
    monkeypatch.setattr("detr_exp.inference.window.PAUSE", 0.0)
    monkeypatch.setenv("DISPLAY", ":0")
    KEYS.clear()
    return shown


GOING_ON, ENDED = SimpleNamespace(number=None), SimpleNamespace(number=2)


def test_a_still_image_waits_for_a_key(photos: list[Image.Image]) -> None:
    window = Window("detr_exp")
    KEYS[:] = ["", "", "space"]
    window.show(Image.new("RGB", (4000, 100)), "a.jpg", GOING_ON)  # type: ignore[arg-type]
    assert window.root.updates == 3
    assert window.is_open
    assert window.root.titles[-1] == "a.jpg"
    assert photos[0].size[0] == LARGEST[0]


def test_frames_go_on(photos: list[Image.Image]) -> None:
    window = Window("detr_exp")
    for number in range(3):
        window.show(Image.new("RGB", (10, 10)), str(number), None)
    assert window.root.updates == len(photos) == 3


@pytest.mark.parametrize("key", ["q", "Escape", "cross"])
def test_it_can_be_closed(photos: list[Image.Image], key: str) -> None:
    window = Window("detr_exp")
    KEYS[:] = [key]
    window.show(Image.new("RGB", (10, 10)), "a.jpg", GOING_ON)  # type: ignore[arg-type]
    assert not window.is_open
    window.show(Image.new("RGB", (10, 10)), "b.jpg", GOING_ON)  # type: ignore[arg-type]
    window.close()
    assert len(photos) == 1


def test_a_signal_ends_the_waiting(photos: list[Image.Image]) -> None:
    Window("detr_exp").show(Image.new("RGB", (10, 10)), "a.jpg", ENDED)  # type: ignore[arg-type]


def test_without_a_display_or_tk_it_says_so(monkeypatch: pytest.MonkeyPatch, photos: list[Image.Image]) -> None:
    def refuse(className: str) -> None:
        raise RuntimeError("no display name")

    monkeypatch.setattr(sys.modules["tkinter"], "Tk", refuse)
    with pytest.raises(ValueError, match=r"cannot open a window.*leave show=true out"):
        Window("detr_exp")
    monkeypatch.setitem(sys.modules, "tkinter", None)
    with pytest.raises(ValueError, match=r"needs Tk.*python3-tk"):
        Window("detr_exp")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ValueError, match="DISPLAY is not set; leave show=true out"):
        Window("detr_exp")
