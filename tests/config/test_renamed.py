"""Old names of keys."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from detr_exp.config.compose import compose
from detr_exp.config.renamed import RENAMED, renamed

NAMES = [(config, old, new) for config, keys in RENAMED.items() for old, new in keys.items()]
OTHERS = {
    "benchmark": [],
    "check_data": ["data.root=."],
    "export": ["checkpoint=a.pth"],
    "predict": ["checkpoint=a.pth", "source=a.jpg"],
}


@pytest.mark.parametrize(("config", "old", "new"), NAMES)
def test_an_old_name_sets_the_key_and_says_its_name(
    config: str, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = compose(OTHERS[config], config_name=config)
    assert OmegaConf.select(now, old) is None
    assert OmegaConf.select(now, new) not in (0, False)
    with caplog.at_level(logging.WARNING):
        cfg = compose([*OTHERS[config], f"{old}={'false' if config == 'predict' else 0}"], config_name=config)
    assert OmegaConf.select(cfg, new) in (0, False)
    assert [record.getMessage() for record in caplog.records] == [f"{old} has been renamed; use {new}=..."]


def test_only_overrides_of_that_command_change() -> None:
    words = ["--config-dir", "pictures", "++pictures=0,4", "data.pictures=1", "source=pictures=1", "~pictures"]
    changed = ["--config-dir", "pictures", "++images=0,4", "data.pictures=1", "source=pictures=1", "~images"]
    assert renamed("check_data", words) == changed
    assert renamed("config", words) == words


@pytest.mark.parametrize(
    "address",
    [
        f"https://a.b/c/d.pth#sha256={'0' * 64}",
        "https://a.b/c?x=1&y=2",
        "http://127.0.0.1:80/~me/x%20y.pth",
        "https://a.b/c.pth",
        "hf:owner/na-me@v1.0/x/model.safetensors",
    ],
)
def test_addresses_need_no_quotes(address: str) -> None:
    assert compose([f"model.weights={address}"]).model.weights == address
    assert renamed("config", [f'model.weights="{address}"']) == [f'model.weights="{address}"']


@pytest.mark.parametrize(
    "name", ["loss=focal,gamma=1.5-0a1b2c", "a (1)", "ünï", "it's", "x[1]{2}", "a;b&c~d#e!f", "plain"]
)
def test_paths_that_exist_need_no_quotes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    cfg = compose(["checkpoint=a.pth", f"source={tmp_path / name}"], config_name="predict")
    assert cfg.source == str(tmp_path / name)
    assert renamed("config", [f'source="{tmp_path / name}"']) == [f'source="{tmp_path / name}"']


@pytest.mark.parametrize("blank", ["", " "])
def test_lists_of_such_paths_need_none_either(blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["sw/loss=focal,lr=0.0001-0a", "sw/plain", "sw/it's", "sw/x[1]{2}", "sw/loss=focal,lr=0.0002-0b"]
    for name in names:
        Path(name).mkdir(parents=True)
    cfg = compose([f"checkpoint=[{f',{blank}'.join(['cafe0123', *names])}]"], config_name="review")
    assert cfg.checkpoint == ["cafe0123", *names]


def test_what_is_no_path_keeps_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "focal,vfl").mkdir()
    words = [
        "loss=focal,vfl",
        f"data.root={tmp_path}/absent,other",
        f"runs=[{tmp_path},{tmp_path}]",
        f"runs=[{tmp_path},{tmp_path}/absent=1]",
        f"a=[{tmp_path}],[b=1]",
        "a=" + "/,x" * 3000,
    ]
    assert renamed("config", words) == words
