"""What the run of a sweep says of it."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from detr_exp.tracker.base import RunRecord
from hydra_plugins.detr_exp._ledger import Entry
from hydra_plugins.detr_exp._parent import described, note_of, ranges_of


def test_ranges_are_those_of_the_command_and_of_a_file() -> None:
    words = ["loss=focal,vfl", "optim.lr=tag(log,interval(1e-5,1e-3))", "seed=3", "model.image_size=[64,64],[96,96]"]
    hydra = {
        "overrides": {"task": [*words, "data.root=http://me:secret@host/a,b"]},
        "sweeper": {"params": {"loss": "mal,ce", "optim.weight_decay": "0,1e-4"}},
    }
    ranges = ranges_of(OmegaConf.create({"hydra": hydra}))
    assert ranges.pop("data.root").endswith("@host/a,b")
    assert "secret" not in str(ranges_of(OmegaConf.create({"hydra": hydra})))
    assert ranges == {
        "loss": "focal,vfl",
        "optim.lr": "tag(log,interval(1e-5,1e-3))",
        "model.image_size": "[64,64],[96,96]",
        "optim.weight_decay": "0,1e-4",
    }, "the command wins over the file"


def test_the_best_run_by_its_words_its_value_and_a_link(tmp_path: Path) -> None:
    words = ["loss=focal", "data.root=my data", "optim.lr=1e-3", "seed=1"]
    RunRecord(id="a" * 32, project="p", name="n", words=words).save(tmp_path)
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_id": "b" * 32, "experiment_id": "1"}))
    best = Entry(0, ["loss=focal", "+optim.lr=1e-3", "seed=1"], "h", "ok", 0.5, 1.0, None)
    child = described(tmp_path)
    note = note_of({"loss": "focal,vfl", "optim.lr": "1e-3,1e-4"}, best, {"best/monitor": 0.5, "best/seeds": 3}, child)
    assert child == {
        "best.words": "loss=focal 'data.root=my data' optim.lr=1e-3 seed=1",
        "best.mlflow_run": "b" * 32,
    }
    assert note.startswith(
        f"**Best: 0.5000**, mean of 3 seeds, [its run](#/experiments/{{experiment}}/runs/{'b' * 32})"
    )
    assert "): `loss=focal +optim.lr=1e-3 seed=1`\n" in note
    assert "Swept: `loss` focal,vfl; `optim.lr` 1e-3,1e-4\n" in note
    assert f"python -m detr_exp.train {child['best.words']}" in note
