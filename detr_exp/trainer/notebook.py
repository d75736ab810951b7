"""Progress in notebooks (Jupyter, Colab, VS Code): one line of text under the cell, replaced as it changes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from detr_exp.terminal import printable

if TYPE_CHECKING:
    from IPython.display import DisplayHandle


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Line:
    """The line of a cell; it appears at the first `show`, and needs no widgets."""

    def __init__(self) -> None:
        self.handle: DisplayHandle | None = None

    def show(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": printable(text)}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
