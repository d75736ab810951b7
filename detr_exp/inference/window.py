"""A window that shows drawings, by Tk, which comes with Python: the OpenCV of this package is built without windows."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from PIL import Image

from detr_exp.signals import Interrupt

LEAVE_OUT = "leave show=true out, and look at the files in drawings/"
LARGEST = (1280, 800)
PAUSE = 0.02  # seconds between two looks for a key


class Window:
    """One window; q, Escape or its cross close it, any other key shows the next image.

    Raises:
        ValueError: there is no display, or no Tk.
    """

    def __init__(self, title: str) -> None:
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise ValueError(f"show=true needs a display, and DISPLAY is not set; {LEAVE_OUT}")
        try:
            import tkinter

            from PIL import ImageTk
        except ImportError as error:
            raise ValueError(
                f"show=true needs Tk ({error}): install it (Debian: apt install python3-tk), or {LEAVE_OUT}"
            ) from None
        try:
            self.root = tkinter.Tk(className="detr_exp")
        except tkinter.TclError as error:
            raise ValueError(f"show=true cannot open a window ({error}); {LEAVE_OUT}") from None
        self.photo_of, self.is_open, self.is_next = ImageTk.PhotoImage, True, False
        self.root.title(title)
        self.label = tkinter.Label(self.root)
        self.label.pack()
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self.root.bind("<Key>", self._on_key)

    def _on_key(self, event: Any) -> None:
        if event.keysym in ("q", "Escape"):
            self.close()
        self.is_next = True

    def show(self, image: Image.Image, name: str, interrupt: Interrupt | None) -> None:
        """Show an image.

        Args:
            image: of any size; a large one is shown smaller.
            name: for the title.
            interrupt: wait for a key, or for this; None: do not wait.
        """
        if not self.is_open:
            return
        shown = image.copy()
        shown.thumbnail(LARGEST)
        self.photo = self.photo_of(shown, master=self.root)  # Tk itself keeps no reference
        self.label.configure(image=self.photo)
        self.root.title(name)
        self.is_next = False
        self.root.update()
        while interrupt is not None and interrupt.number is None and self.is_open and not self.is_next:
            time.sleep(PAUSE)
            self.root.update()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.root.destroy()
