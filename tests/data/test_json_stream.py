"""A JSON file that is read in pieces holds what the standard library reads at once."""

import hashlib
import json
import math
import random

import pytest

from detr_exp.data import json_stream
from detr_exp.data.json_stream import read_json

ODD = ["}, {", '"}, {"', "\\", "é😀", "\ud800", math.nan, math.inf, -0.0, 1e308, 2**70, True, None, {}, [], [{}, {}]]


def entry(rng):
    """An object as in an annotation file, with odd values now and then."""
    found = {"id": rng.randrange(10**6), "bbox": [rng.random() for _ in range(4)], "name": "x" * rng.randrange(9)}
    if rng.random() < 0.2:
        found[rng.choice(["id", "more"])] = rng.choice(ODD)
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("indent", [None, 1])
def test_lists_are_read_as_by_the_standard_library(tmp_path, monkeypatch, seed, indent):
    rng = random.Random(seed)
    monkeypatch.setattr(json_stream, "_BLOCK", rng.choice([7, 100, 2**16]))
    entries = [entry(rng) if rng.random() < 0.95 else rng.choice(ODD) for _ in range(60)]
    content = {"info": rng.choice(ODD), "annotations": entries, "images": [], "other": entries[:3]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=indent), "utf-8")
    seen = []
    rest, sha256 = read_json(path, {"annotations": seen.extend, "images": pytest.fail})
    assert repr(seen).replace(repr(2.0**70), str(2**70)) == repr(entries)
    assert repr(rest) == repr(content | {"annotations": []})
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
