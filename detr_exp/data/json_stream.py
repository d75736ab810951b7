"""Read a JSON file of any size with the memory of some of its entries."""

from __future__ import annotations

import codecs
import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import orjson

from detr_exp.data.files import decoded
from detr_exp.values import Values

_BLOCK = 2**16  # bytes; of larger ones the system takes memory back and gives it anew, which costs half the time
_SPACES = " \t\n\r"
_BEHIND = f"{_SPACES},:]}}"  # what follows a value within an object
_space = re.compile(r"[ \t\n\r]*").match
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match
_decode = json.JSONDecoder().raw_decode


def read_json(path: Path, lists: Mapping[str, Callable[[list[object]], object]]) -> tuple[Values, str]:
    """The object in a JSON file, without the entries of some lists of its first level.

    Args:
        path: of the file; UTF-8, or UTF-16 where a mark says so.
        lists: name of a list -> what to do with its entries, some at a time, which are not kept.
            Of integers beyond 64 bits in them the last digits may be lost.

    Returns:
        the object, with an empty list for each of `lists` that is one in the file; and the file's SHA-256, in hex.

    Raises:
        ValueError: the file is not JSON, holds another thing than an object, or has one of `lists` twice.
    """
    with open(path, "rb") as file, _uncollected():
        text = _Text(path, file.read)
        if not text.begins("{"):
            raise ValueError(f"it holds a {type(text.whole()).__name__}, not an object")
        found: Values = {}
        while not text.begins("}"):
            if found and not text.begins(","):
                text.refuse()
            name = text.value()
            if not isinstance(name, str) or not text.begins(":"):
                text.refuse()
            if name in lists and name in found:
                raise ValueError(f"it has the key {name!r} twice; join the two, or drop one")
            if name in lists and text.begins("["):
                found[name] = []
                text.entries(lists[name])
            else:
                found[name] = text.value()
        if not text.is_at_end():
            text.refuse()
        return found, text.digest.hexdigest()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: JSON has none, and it would look at each object several times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Text:
    """What is left of a JSON text, of which a part is in memory.

    A value that ends where this part ends may go on behind it, so more is read before it counts as read or as wrong.

    Args:
        path: of the file.
        read: returns its next bytes.
    """

    def __init__(self, path: Path, read: Callable[[int], bytes]) -> None:
        self.path, self.read = path, read
        self.digest = hashlib.sha256()
        self.part, self.at = "", 0
        self.tried = 0  # no entries are read at once before this place
        first = read(_BLOCK)
        marked = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        self.decoder = codecs.getincrementaldecoder("utf-16" if marked else "utf-8-sig")()
        self._append(first)

    def begins(self, character: str) -> bool:
        """Whether this is the next character; it is skipped then, and spaces before it in any case."""
        self.at = _space(self.part, self.at).end()  # type: ignore[union-attr]
        while self.at == len(self.part) and self._more():
            self.at = _space(self.part, self.at).end()  # type: ignore[union-attr]
        is_next = self.part.startswith(character, self.at)
        self.at += len(character) * is_next
        return is_next

    def value(self) -> object:
        """The next value, which is skipped."""
        if self.part[self.at : self.at + 1] in _SPACES:
            self.begins("")
        while True:
            try:
                value, end = _decode(self.part, self.at)
                if self.part[end] in _BEHIND:
                    self.at = end
                    return value
            except (json.JSONDecodeError, IndexError):
                pass  # more of it is read; a context manager would take a tenth of the time of all entries
            if not self._more():
                self.refuse()

    def entries(self, do: Callable[[list[object]], object]) -> None:
        """Do something with the entries of a list whose bracket was skipped, some at a time."""
        is_over = self.begins("]")
        while not is_over:
            do([self.value()])
            found = _comma(self.part, self.at)  # most entries lie in the same part as the next
            if found is not None and found.end() < len(self.part):
                self.at = found.end()
                self._read_alike(found[0], do)
            elif self.begins("]"):
                is_over = True
            elif not self.begins(","):
                self.refuse()

    def _read_alike(self, comma: str, do: Callable[[list[object]], object]) -> None:
        """Read the objects of a list in this part at once, which is most of the work.

        They end before the last place that looks like the end of one and the start of the next. Where it is none, the
        text before it is no JSON, since a quote or bracket is open.
        """
        end = self.part.rfind(f"}}{comma}{{", self.at) + 1
        if end <= self.tried:
            return
        try:
            entries = orjson.loads(f"[{self.part[self.at : end]}]")
        except (orjson.JSONDecodeError, UnicodeEncodeError):  # it refuses more than the standard library, NaN for one
            self.tried = end
            return
        self.at = end + len(comma)
        do(entries)

    def is_at_end(self) -> bool:
        self.begins("")
        return self.at == len(self.part)

    def whole(self) -> object:
        """The file, read at once; for messages."""
        return json.loads(decoded(self.path.read_bytes(), self.path))

    def refuse(self) -> NoReturn:
        """Raise the error of the standard library, which names the place."""
        self.whole()
        raise ValueError("it changed while it was read; read it again")

    def _more(self) -> bool:
        """Read as much again as there is in memory; False at the end."""
        data = self.read(max(_BLOCK, len(self.part) - self.at))
        self._append(data)
        return bool(data)

    def _append(self, data: bytes) -> None:
        self.digest.update(data)
        try:
            self.part, self.at, self.tried = self.part[self.at :] + self.decoder.decode(data, final=not data), 0, 0
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(self.path)!r} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
