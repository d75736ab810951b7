"""From the words of a command line to a checked config.

Only Hydra is imported here: a mistake is answered long before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra import version
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import YAMLError

from detr_exp.config.hydra_private import (
    CachingConfigRepository,
    ConfigLoaderImpl,
    DefaultsList,
    IConfigRepository,
    apply_overrides,
    create_config_search_path,
    create_defaults_list,
    extend_search_path,
    load_file,
)
from detr_exp.config.mistakes import (
    ConfigError,
    groups_of,
    parse_overrides,
    refuse_unknown_metric,
    refuse_wrong_choices,
    refuse_wrong_override,
    wrong_value,
)
from detr_exp.config.ranges import refuse_out_of_range
from detr_exp.config.renamed import renamed
from detr_exp.values import Values, flat, look_up, values_of

HERE = Path(__file__).resolve().parent.parent
CONF_DIR = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())  # installed; a checkout
# mappings to which recipes and users add entries of their own; what reads them refuses what it does not know
METRIC = "detr_exp.metric.coco.CocoMetric"
OPEN_KEYS = ("optim.param_groups", "optim.optimizer", "loss.terms")


@dataclass(frozen=True)
class Source:
    """One YAML file and the part it plays in a config.

    Attributes:
        file: its path, as messages show it.
        package: the key its content stands under; empty for the root.
        values: its content from the root on, unresolved.
        recipe: an experiment or a sweep: sets keys of several groups and owns none.
        sweeps: whether it says what a sweep tries.
    """

    file: str
    package: str
    values: Values
    recipe: bool
    sweeps: bool


@dataclass(frozen=True)
class Composition:
    """A config, unresolved, and where it came from.

    Attributes:
        cfg: the config.
        choices: the chosen option of every group.
        sources: the files in the order in which they were merged; the command line's settings come after them.
    """

    cfg: DictConfig
    choices: dict[str, str | None]
    sources: list[Source]


def compose(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "config"
) -> DictConfig:
    """The config for a list of `group=option` and `key=value` words.

    Args:
        overrides: as on the command line, e.g. `["model=rtdetrv2", "loss.focal_gamma=1.5"]`.
        config_dir: a folder with groups and options of your own, laid out like `conf/`.
        config_name: `config` to train; the other commands have their own.

    Raises:
        ConfigError: a word that cannot be read, an unknown group, option or key, a value of the wrong kind.
    """
    return composition(config_loader(config_dir), config_name, overrides).cfg


def config_loader(config_dir: str | Path | None = None) -> ConfigLoaderImpl:
    """Hydra's loader for our configs and those of `config_dir`."""
    version.setbase("1.3")
    search_path = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        folder = Path(config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a folder; give one laid out like conf/")
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def composition(loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> Composition:
    """What `compose` does, with the provenance kept."""
    words = parse_overrides(renamed(config_name, overrides))
    return Composer(loader, config_name, words).compose(words)


class Composer:
    """Composes configs out of the same files, each of which is read once.

    Args:
        loader: see `config_loader`.
        config_name: see `compose`.
        words: one of them may add to the folders that are searched.

    Attributes:
        groups: every group and its options.

    Raises:
        ConfigError: the primary config cannot be read, or a folder is none.
    """

    def __init__(self, loader: ConfigLoaderImpl, config_name: str, words: Sequence[Override]) -> None:
        self.loader, self.config_name = loader, config_name
        self.repository = CachingConfigRepository(loader.repository)
        with as_config_errors():
            extend_search_path(loader, config_name, words, self.repository)
            self.groups = groups_of(self.repository)

    def compose(self, words: list[Override]) -> Composition:
        """The config for the words of a command line.

        Raises:
            ConfigError: as `compose` does.
        """
        with as_config_errors():
            refuse_wrong_choices(words, self.groups)
            defaults = create_defaults_list(
                self.repository, self.config_name, words, prepend_hydra=True, skip_missing=False
            )
            sources, parts = zip(*_sources(self.loader, self.repository, defaults))
            cfg = cast(DictConfig, OmegaConf.unsafe_merge({}, *parts))
            OmegaConf.set_struct(cfg, True)
            settings = [word for word in defaults.config_overrides if not word.is_hydra_override()]
            choices = dict(defaults.overrides.known_choices)
            values = values_of(cfg, resolve=False)
            for word in settings:
                refuse_wrong_override(word, values, choices, self.groups, self.repository)
            _refuse_deleted(settings, sources)
            apply_overrides(self.loader, settings, cfg)
            _refuse_wrong_references(settings, values, cfg, self.groups)
        composed = Composition(cfg, choices, list(sources))
        _refuse_unknown_keys(composed)
        return composed


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Tell what Hydra, OmegaConf and YAML refuse as a mistake of the user."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(summary_of(error)) from error


def refuse_unready(cfg: DictConfig) -> None:
    """Refuse a config with values left open, references that lead nowhere, numbers out of their range, or a monitor
    that our metric never gives.
    """
    with as_config_errors():
        missing = sorted(OmegaConf.missing_keys(cfg))
        if not missing:
            OmegaConf.to_container(cfg, resolve=True)
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given: {' '.join(f'{key}=...' for key in missing)}")
    refuse_out_of_range(cfg)
    if OmegaConf.select(cfg, "metric._target_") == METRIC:
        refuse_unknown_metric(OmegaConf.select(cfg, "trainer.monitor"))


def _sources(
    loader: ConfigLoaderImpl, repository: IConfigRepository, defaults: DefaultsList
) -> Iterator[tuple[Source, DictConfig]]:
    """The files in the order in which they are merged, and their content to merge."""
    for default in defaults.defaults:
        if default.package == "hydra" or (default.package or "").startswith("hydra."):
            continue
        loaded = load_file(loader, default, repository)
        # what is put under a package is a copy already, anything else is what the repository keeps
        config = cast(DictConfig, loaded.config if default.package else deepcopy(loaded.config))
        sweeps = bool(OmegaConf.select(config, "hydra.sweeper.params"))
        config.pop("hydra", None)
        values = values_of(config, resolve=False)
        folder = Path(loaded.path.removeprefix("file://"))
        shown = folder.name if folder == CONF_DIR else str(folder)
        source = Source(
            file=f"{shown}/{default.config_path}.yaml",
            package=default.package or "",
            values=values,
            recipe=not default.package and not default.primary,
            sweeps=sweeps,
        )
        yield source, config


def _refuse_unknown_keys(composed: Composition) -> None:
    """Refuse keys that no chosen option knows: a recipe's values must not survive the choice they were meant for.

    A key belongs to the option that stands nearest above it, and must be in that option's file, or in the root. An
    empty mapping or a plain value there leaves open what may stand in its place.
    """
    owners: dict[str, list[Source]] = {}
    for source in composed.sources:
        if not source.recipe:
            owners.setdefault(source.package, []).append(source)
    root = [source for source in composed.sources if not source.recipe and not source.package]
    for key in flat(values_of(composed.cfg, resolve=False)):
        parts = key.split(".")
        package = next(p for n in range(len(parts), -1, -1) if (p := ".".join(parts[:n])) in owners)
        if key.startswith(OPEN_KEYS) or any(_knows(source, key) for source in [*owners[package], *root]):
            continue
        setters = [source.file for source in composed.sources if _sets(source, key)]
        group = package.replace(".", "/")
        holder = f"{group}={composed.choices.get(group)}" if package else "the root of the configuration"
        own = {name: None for source in owners[package] for name in look_up(source.values, package)}
        if not setters:
            raise ConfigError(f"{holder} has no key {key}; it has: {', '.join(own)}; leave {key} out")
        raise ConfigError(
            f"{setters[-1]} sets {key}, which {holder} does not have (it has: {', '.join(own)}); "
            f"choose another {group}, or take the key out with ~{key}"
        )


def _refuse_deleted(words: Sequence[Override], sources: Sequence[Source]) -> None:
    """Refuse to take out what an option's own file has: only what a recipe or the user has added may go.

    Raises:
        ConfigError: what to do instead.
    """
    own_calls = {word.key_or_group.rpartition(".")[0] for word in words if word.key_or_group.endswith("._target_")}
    for word in words:
        key = word.key_or_group
        is_own = key.startswith(OPEN_KEYS) or key.rpartition(".")[0] in own_calls
        if word.is_delete() and not is_own and any(_sets(source, key) for source in sources if not source.recipe):
            raise ConfigError(f"{word.input_line}: no run can do without {key}; give it a value instead: {key}=...")


def _refuse_wrong_references(
    words: Sequence[Override], values: Values, cfg: DictConfig, groups: Mapping[str, Sequence[str]]
) -> None:
    """Refuse references that lead to a value of the wrong kind; `refuse_unready` tells which lead nowhere.

    Raises:
        ConfigError: with the value they lead to.
    """
    for word in words:
        if word.is_delete() or "${" not in str(word.value()) or not isinstance(word.value(), str):
            continue
        key = word.key_or_group
        try:
            found, present = OmegaConf.select(cfg, key), look_up(values, key)
        except (OmegaConfBaseException, KeyError):
            continue
        problem = wrong_value(key, found, present, groups)
        if problem:
            raise ConfigError(f"{word.input_line} leads to {found!r}: {problem}")


def _knows(source: Source, key: str) -> bool:
    """Whether a file has a key, or leaves it open."""
    values: object = source.values
    for part in key.split("."):
        if not isinstance(values, dict) or not values:
            return True
        if part not in values:
            return False
        values = values[part]
    return True


def _sets(source: Source, key: str) -> bool:
    try:
        look_up(source.values, key)
    except KeyError:
        return False
    return True


def summary_of(error: Exception) -> str:
    """Hydra's message about what it could not compose, in one line and without its internals."""
    if isinstance(error, InterpolationResolutionError | UnsupportedInterpolationType | GrammarParseError):
        key = getattr(error, "full_key", None)
        reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).strip().splitlines()[0])
        if "HydraConfig was not set" in reason:
            reason = "${hydra:...} is known inside of hydra.* only"
        reason = reason.strip('"')
        if not key:
            return f"a reference leads nowhere: {reason}; write a value in its place"
        return f"{key} refers to what is not there: {reason}; give it a value: {key}=..."
    noise = ("provider=", "See http", "Config search path:", "To append", "full_key", "reference_type", "object_type")
    lines = [line.strip() for e in (error, error.__cause__) if e is not None for line in str(e).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(noise))
