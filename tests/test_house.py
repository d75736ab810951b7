"""The rules of the house, as far as a program can check them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import GenericAlias

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF, PACKAGE, TESTS = ROOT / "conf", ROOT / "detr_exp", ROOT / "tests"
WITHOUT_PACKAGE = {"experiment", "sweep", "hydra"}
WITHOUT_CONF = {"ops", "config", "deploy", "inference", "runs", "published", "contest"}
TREES = ("detr_exp", "hydra_plugins", "scripts")

# A module imports from lower layers and from its own folder. The longest prefix decides.
LAYERS = {
    "structures": 0,
    "signals": 0,
    "streams": 0,
    "writing": 0,
    "tensor_files": 0,
    "tile": -1,
    "values": 0,
    "ops": 1,
    "locks": 1,
    "protocols": 1,
    "model.layer": 2,
    "matcher": 2,
    "optim": 2,
    "data": 2,
    "published": 2,
    "metric": 2,
    "tracker": 2,
    "terminal": 3,
    "config": 3,
    "model.backbone": 3,
    "model.neck": 3,
    "model.head": 3,
    "model.adapter": 3,
    "model.decoder": 3,
    "loss": 3,
    "folder": 4,
    "runs": 4,
    "model": 4,
    "start": 5,
    "trainer": 5,
    "build": 6,
    "inference": 7,
    "teacher": 8,
    "training": 7,
    "deploy": 8,
    "contest": 8,
    "cli": 8,
    "launch": 9,
    "": 10,  # commands
}
COMMANDS = {"train", "evaluate", "predict", "export", "export_weights", "benchmark", "compare", "report", "reproduce"}
COMMANDS |= {"explain", "sync", "shard", "check_data", "weights", "torchrun", "proof", "review", "pareto", "__main__"}
PARTS = ("network", "net", "backbone", "metric", "matcher", "tracker")  # what `detr_exp/protocols.py` has contracts of
MOST_ANY = 376  # lower it with every one that gets a type
WITHIN = {"trainer.diagnosis"}  # rooms that share the layer of the folder they are in


@functools.cache
def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file: it is parsed once for all rules."""
    return list(ast.walk(tree_of(path)))


def calls_in(paths: Iterable[Path]) -> Iterator[tuple[Path, ast.Call]]:
    return ((path, node) for path in paths for node in nodes(path) if isinstance(node, ast.Call))


def dotted(path: Path) -> str:
    """`detr_exp/model/layer/mlp.py` -> `model.layer.mlp`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").replace("__init__", "")


def folder_of(module: str) -> str:
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}." if name else "")), key=len)


def imports(path: Path) -> Iterator[str]:
    """Dotted names inside the package that a file imports, wherever in the file."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("detr_exp.") for alias in node.names if alias.name.startswith("detr_exp.")
            )
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "detr_exp":
                yield from (alias.name for alias in node.names)
            elif module.startswith("detr_exp."):
                yield module.removeprefix("detr_exp.")


def test_a_module_imports_only_from_lower_layers_or_its_own_folder() -> None:
    for path in modules():
        own = folder_of(dotted(path))
        for name in imports(path):
            other = folder_of(name)
            assert other == own or LAYERS[other] < LAYERS[own], f"{dotted(path)} (in {own or 'root'}) imports {name}"


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file; of `from data import loader` the loader."""
    known = set(map(dotted, modules()))
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            parent = (node.module or "").partition(".")[2]
            inner = {f"{parent}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (inner & known) | ({parent} if inner - known else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == PACKAGE.name}
    return (found & known) - {dotted(path), ""}


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Imports within functions and those for the type checker count: who needs whom is one direction everywhere."""
    left = {dotted(path): imported_modules(path) for path in modules()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    while idle := left.keys() - set().union(*left.values()):  # what only leads into a circle
        left = {name: needs for name, needs in left.items() if name not in idle}
    assert not left, f"import each other: { ({name: sorted(needs & left.keys()) for name, needs in left.items()}) }"


def test_commands_are_not_imported() -> None:
    """What two commands share is a module below them."""
    for path in modules():
        assert not imported_modules(path) & COMMANDS, f"{dotted(path)} imports a command"


def test_the_commands_are_the_modules_that_can_be_started() -> None:
    started = {path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert started == COMMANDS


def test_parts_are_asked_by_their_contracts() -> None:
    """What a network or a metric may lack is an ability with a protocol, and not a name in quotation marks."""
    for path, call in calls_in(modules()):
        if isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr", "setattr"):
            asked = ast.unparse(call.args[0]).rpartition(".")[2].rpartition("_")[2]
            is_named = isinstance(call.args[1], ast.Constant | ast.JoinedStr)
            assert not (is_named and asked in PARTS), f"{dotted(path)}:{call.lineno}: {ast.unparse(call)}"


def test_few_values_may_be_anything() -> None:
    names = [node for path in modules() for node in nodes(path) if isinstance(node, ast.Name)]
    assert sum(name.id == "Any" for name in names) <= MOST_ANY


def test_the_layers_name_every_folder() -> None:
    folders = {dotted(path) for path in modules() if path.name == "__init__.py"} - {""}
    assert folders <= {*LAYERS, *WITHIN}, f"give a layer to {folders - set(LAYERS)}"


def test_no_file_is_named_for_a_drawer() -> None:
    drawers = {"utils", "util", "misc", "common", "helpers", "helper"}
    files = [*modules(), *CONF.rglob("*"), *TESTS.rglob("*.py")]
    assert not [path for path in files if path.stem in drawers]


def test_no_class_is_named_for_a_drawer() -> None:
    names = [
        f"{dotted(path)}.{node.name}" for path in modules() for node in nodes(path) if isinstance(node, ast.ClassDef)
    ]
    assert not [name for name in names if re.search(r"(Manager|Helper|Wrapper|Base)$", name)]


def test_classes_of_ours_are_not_inherited_from() -> None:
    """Only errors and protocols are: implementation is shared by calling it."""
    for path in modules():
        ours = {node.name: node for node in nodes(path) if isinstance(node, ast.ClassDef)}
        imported = {
            alias.asname or alias.name
            for node in nodes(path)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("detr_exp")
            for alias in node.names
        }
        for node in ours.values():
            for parent in (parent.id for parent in node.bases if isinstance(parent, ast.Name)):
                if parent in ours or parent in imported:
                    assert parent.endswith(("Error", "Protocol")), f"{dotted(path)}.{node.name} inherits from {parent}"


def test_constructors_name_their_arguments() -> None:
    """A misspelt key must be an error, so no constructor swallows what it does not know."""
    for path in modules():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                assert node.args.kwarg is None, f"{dotted(path)}:{node.lineno} takes **{node.args.kwarg}"


@functools.cache
def calls(path: Path) -> list[tuple[str, int]]:
    """Names that are called, with their lines; what follows `if __name__ == "__main__"` is a command of its own."""
    parts = [p for p in tree_of(path).body if not (isinstance(p, ast.If) and "__main__" in ast.unparse(p.test))]
    found = [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node.lineno) for node in found]


def test_only_build_instantiates_and_only_commands_exit() -> None:
    for module, name, line in ((dotted(path), *call) for path in modules() for call in calls(path)):
        may_instantiate = module in ("build", "config.instantiation")
        assert may_instantiate or not name.endswith("instantiate"), f"{module}:{line} instantiates"
        may_exit = LAYERS[folder_of(module)] >= LAYERS["cli"]
        assert may_exit or name not in ("sys.exit", "exit", "SystemExit"), f"{module}:{line} exits"


def test_what_hydra_calls_private_is_used_in_one_file() -> None:
    plugins = sorted((ROOT / "hydra_plugins").rglob("*.py"))
    private = re.compile(r"hydra\._internal|_return_value|loader\._")
    users = [path for path in [*modules(), *plugins] if private.search(path.read_text("utf-8"))]
    assert [dotted(path) for path in users] == ["config.hydra_private"]


def test_what_travels_has_a_type() -> None:
    """`Any` is for what libraries leave without types; plain values are `Values`, the parts of others `protocols`."""
    found = [node for path in modules() for node in nodes(path) if isinstance(node, ast.Name)]
    assert sum(node.id == "Any" for node in found) <= 80


@pytest.mark.parametrize("path", sorted((ROOT / "hydra_plugins/detr_exp").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_hydra_finds_no_alias_among_the_classes_of_a_plugin(path: Path) -> None:
    """On Python 3.10 `dict[str, Any]` passes for a class there, and no command would start."""
    try:
        module = import_module(f"hydra_plugins.detr_exp.{path.stem}")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert not [name for name, value in vars(module).items() if isinstance(value, GenericAlias)]


def test_files_and_the_training_step_stay_short() -> None:
    files = [*modules(), *sorted((ROOT / "hydra_plugins").rglob("*.py"))]
    lengths = {path.stem: len(path.read_text("utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > 350}
    step = next(
        node
        for node in nodes(PACKAGE / "trainer" / "trainer.py")
        if isinstance(node, ast.FunctionDef) and node.name == "train_step"
    )
    assert step.end_lineno is not None
    assert step.end_lineno - step.lineno < 60


def test_what_is_printed_goes_through_one_door() -> None:
    """`terminal.say` masks secrets and escapes what would steer a terminal; help texts and drawn tables are ours."""
    for path in [*modules(), *sorted((ROOT / "hydra_plugins").rglob("*.py"))]:
        if path.stem not in ("terminal", "_table", "cli"):
            assert not [line for name, line in calls(path) if name == "print"], f"{path} prints; use terminal.say"


def test_text_files_are_utf8_whatever_the_machine_speaks() -> None:
    paths = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))]
    for path, call in calls_in(paths):
        name, words = ast.unparse(call.func), {word.arg for word in call.keywords}
        given = [
            word.value for word in (*call.args, *(w.value for w in call.keywords)) if isinstance(word, ast.Constant)
        ]
        is_text = name.endswith((".read_text", ".write_text", "FileHandler"))
        is_text |= name == "open" and not any(isinstance(value, str) and "b" in value for value in given)
        assert not is_text or "encoding" in words or "utf-8" in given, f"{path}:{call.lineno}: say encoding='utf-8'"


def test_the_three_trees_mirror_each_other() -> None:
    def folders(root: Path) -> set[str]:
        return {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}

    groups = folders(CONF) - WITHOUT_PACKAGE
    packages = folders(PACKAGE) - WITHOUT_CONF
    assert groups == packages
    assert packages | WITHOUT_CONF <= folders(TESTS)


def test_every_option_lists_the_sub_groups() -> None:
    """A sub-group that an option does not list cannot be chosen on the command line."""
    for group in (path for path in CONF.iterdir() if path.is_dir() and path.name not in WITHOUT_PACKAGE):
        needed = {path.name for path in group.iterdir() if path.is_dir()}
        for option in group.glob("*.yaml"):
            assert needed <= listed(option), (
                f"{option.relative_to(ROOT)} must list {needed - listed(option)}, null if none"
            )


def listed(option: Path) -> set[str]:
    """The sub-groups in the defaults list of an option and of those it builds on."""
    found: set[str] = set()
    for entry in (yaml.safe_load(option.read_text()) or {}).get("defaults", []):
        if isinstance(entry, dict):
            found |= {key.split("@")[0] for key in entry}
        elif entry != "_self_":
            found |= listed(option.with_name(f"{entry}.yaml"))
    return found


@pytest.mark.parametrize("name", ["experiment", "sweep"])
def test_recipes_begin_with_their_package(name: str) -> None:
    """With anything above that line Hydra puts the file's keys where nobody reads them."""
    for path in (CONF / name).glob("*.yaml"):
        assert path.read_text().startswith("# @package _global_\n"), f"{path.relative_to(ROOT)}: the first line"
