"""Folders of commands that were refused."""

from __future__ import annotations

import os
import time

from detr_exp.folder import remove_empty_folders


def test_only_folders_that_a_refused_command_made_are_removed(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.utime(theirs, (since := time.time() - 1000, since))
    monkeypatch.chdir(tmp_path)
    made = theirs / "new" / "run"
    made.mkdir(parents=True)  # changes `theirs`, too
    remove_empty_folders(made, since + 900)
    assert list(tmp_path.rglob("*")) == [theirs]
