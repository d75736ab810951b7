"""The targets that a config may call are a closed list."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import detr_exp
from detr_exp import build
from detr_exp.config import targets
from detr_exp.config.compose import CONF_DIR, compose
from detr_exp.config.mistakes import ConfigError
from detr_exp.config.stored import literal, stored

GROUPS = ("data", "loss", "matcher", "metric", "model", "optim", "teacher", "tracker", "trainer")
HERE = Path("a_checkpoint.pth")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """A config as checkpoints keep it, with every kind of part."""
    return build.plain(compose(["model=rfdetr_seg", "loss=vfl", "data=shapes", "tracker=mlflow"]))


def callables() -> set[str]:
    """Dotted names of everything in our modules that can be called: functions, classes, and what they import."""
    return {
        f"{module.name}.{name}"
        for module in pkgutil.walk_packages(detr_exp.__path__, "detr_exp.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if callable(value)
    }


def positions(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in pairs:
        yield from positions(value, (*path, name))


def placed(group: Any, path: tuple[Any, ...], node: Any) -> Any:
    """A copy of a group's config with something else at a position."""
    changed = copy.deepcopy(group)
    if not path:
        return node
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = node
    return changed


def key_of(group: str, path: tuple[Any, ...]) -> str:
    return group + "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in path)


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), 25], ids=["all", "some"])
@pytest.mark.parametrize("group", GROUPS)
def test_nothing_outside_the_list_is_called_wherever_it_stands(
    config: dict[str, Any], group: str, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every callable of the package at every position (or another 25th at each), with nothing really called."""
    reached: list[str] = []
    monkeypatch.setattr(build, "instantiate", lambda node, key, **told: reached.append(key))
    names = callables()
    assert len(names) > 1000
    everywhere = sorted(names | {"os.system", "builtins.exec", "torch.hub.load", "pathlib.Path.write_text"})
    passed: dict[str, set[str]] = {}
    paths = list(positions(config[group]))
    shown = {
        key_of(group, path): targets.known_targets(group).get(targets.key_pattern(key_of(group, path)), set())
        for path in paths
    }
    for number, path in enumerate(paths):
        for target in {*everywhere[number % share :: share], *shown[key_of(group, path)]}:
            try:
                targets.refuse_unknown_targets(placed_cheaply(config[group], path, target), group, [])
            except ConfigError:
                continue
            passed.setdefault(key_of(group, path), set()).add(target)
    assert passed == {key: found for key, found in shown.items() if found}
    for path in paths[:40]:
        evil = config | {group: placed(config[group], path, {"_target_": "detr_exp.trainer.checkpoint.duplicate"})}
        with pytest.raises(ConfigError, match=r"detr_exp\.trainer\.checkpoint\.duplicate"):
            build._instantiated(stored(evil, HERE), group)
    assert not reached


def placed_cheaply(group: Any, path: tuple[Any, ...], target: str) -> Any:
    """What `placed` gives, as far as targets go: the nodes above the position, and the new one."""
    if not path:
        return {"_target_": target}
    inner = placed_cheaply(group[path[0]], path[1:], target)
    if isinstance(group, list):
        return [*group[: path[0]], inner]
    return {name: group[name] for name in ("_target_",) if name in group} | {path[0]: inner}


def test_the_list_is_what_the_options_call() -> None:
    named = {name for path in CONF_DIR.rglob("*.yaml") for name in called_in(path)}
    named = {name for name in named if not name.startswith("hydra_plugins.")}
    known = {name for group in GROUPS for names in targets.known_targets(group).values() for name in names}
    assert known == named
    assert targets.known_targets("trainer").keys() == {"trainer", "trainer.elastic", "trainer.hardware"}


def called_in(path: Path) -> list[str]:
    lines = (line.partition("#")[0] for line in path.read_text().splitlines())
    return [name for line in lines for name in re.findall(r"_target_: *([\w.]+)", line)]


@pytest.mark.parametrize("word", ["_args_", "_recursive_", "_convert_", "_mode_"])
def test_keys_of_hydra_are_not_arguments(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"matcher\.{word} is not an argument"):
        targets.refuse_unknown_targets(
            {"_target_": "detr_exp.matcher.hungarian.HungarianMatcher", word: []}, "matcher", []
        )


@pytest.mark.parametrize("target", [["os.system"], None, 3, {"_target_": "os.system"}])
def test_a_target_is_a_name(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\._target_ is"):
        targets.refuse_unknown_targets({"_target_": target}, "model", [])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_things.py").write_text(
        "import os, torch\nfrom os import remove\nclass Around: ...\ndef told(**keys): return keys\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_things"
    sys.modules.pop("my_things", None)


@pytest.mark.parametrize("name", ["os.system", "remove", "torch.hub.load", "torch.from_file", "os.path.os.unlink"])
def test_imports_of_a_user_package_do_not_belong_to_it(own: str, name: str) -> None:
    with pytest.raises(ConfigError, match="which belongs to"):
        targets.refuse_unknown_targets({"_target_": f"{own}.{name}"}, "model", [own])


@pytest.mark.parametrize("target", ["subprocess.run", "builtins.exec", "torch.hub.load", "detr_exp.writing.write"])
def test_a_library_is_no_package_of_a_user(target: str) -> None:
    with pytest.raises(ConfigError, match="for anything else use a function of your package") as caught:
        targets.refuse_unknown_targets({"_target_": target}, "model", [target.partition(".")[0]])
    assert "allow_targets" not in str(caught.value)


def test_nodes_below_a_user_target_may_have_targets_of_the_group(own: str) -> None:
    backbone = {"_target_": "detr_exp.model.backbone.presnet.PResNet"}
    targets.refuse_unknown_targets({"backbone": {"_target_": f"{own}.Around", "inner": backbone}}, "model", [own])
    with pytest.raises(ConfigError, match=r"model\.backbone\.inner\._target_"):
        targets.refuse_unknown_targets(
            {"backbone": {"_target_": f"{own}.Around", "inner": {"_target_": "os.system"}}}, "model", [own]
        )
    with pytest.raises(ConfigError, match=r"model\.beside\._target_"):
        targets.refuse_unknown_targets({"backbone": {"_target_": f"{own}.Around"}, "beside": backbone}, "model", [own])


def test_a_missing_target_is_reported(own: str) -> None:
    with pytest.raises(ConfigError, match=r"my_things\.Arround cannot be found"):
        targets.refuse_unknown_targets({"_target_": f"{own}.Arround"}, "model", [own])


@given(
    st.text(alphabet="\\${}:'\" ab\n") | st.sampled_from(["${oc.env:HOME}", r"\${seed}", "${oc.create:{a: 1}}", "${"])
)
def test_texts_of_stored_configs_are_texts(text: str) -> None:
    """Resolving gives them back, letter by letter; nothing is looked up."""
    kept = stored({"seed": 0, "a": {"b": [text]}}, HERE)
    assert OmegaConf.to_container(kept, resolve=True) == {"seed": 0, "a": {"b": [text]}}


def test_what_looks_like_a_reference_reaches_the_constructor_as_text(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for text in ("${oc.env:SECRET}", r"\${oc.env:SECRET}", "${oc.create:{_target_: os.system}}"):
        config = {"optim": {"_target_": f"{own}.told", "a": text}}
        cfg = stored(config | {"allow_targets": [own]}, HERE)
        assert build._instantiated(cfg, "optim") == {"a": text}
        assert build.instantiate({"_target_": "builtins.dict", "a": text}, "optim") == {"a": text}


@pytest.mark.parametrize("values", [None, [], {}, "text", {"a": {1, 2}}, {"a": object()}, {("a",): 1}, {"a": [b"x"]}])
def test_what_is_no_config(values: Any) -> None:
    with pytest.raises(ConfigError, match="a_checkpoint"):
        stored(values, HERE)


def test_a_config_that_grows_when_it_is_read_is_refused() -> None:
    doubled: list[Any] = [0]
    for _ in range(64):
        doubled = [doubled, doubled]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        stored({"a": doubled}, HERE)
    assert literal((1, "${x}")) == [1, r"\${x}"]


def test_keys_that_a_constructor_does_not_take() -> None:
    cfg = DictConfig({"matcher": {"_target_": "detr_exp.matcher.hungarian.HungarianMatcher", "cots": 1}})
    with pytest.raises(
        targets.WrongArgumentsError, match=r"matcher: detr_exp.matcher.hungarian.HungarianMatcher .*'cots'"
    ):
        build._instantiated(cfg, "matcher")
