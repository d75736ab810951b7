"""From the overrides of a command line to a checked config.

Only Hydra is imported here, so that mistakes are reported before torch is loaded.
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
from detr_exp.config.published import settle_published
from detr_exp.config.ranges import refuse_out_of_range
from detr_exp.config.renamed import renamed
from detr_exp.values import Values, flat, look_up, values_of

HERE = Path(__file__).resolve().parent.parent
CONF_DIR = next(folder for folder in (HERE / "conf", HERE.parent / "conf") if folder.is_dir())  # installed; a checkout
# mappings to which recipes and users add entries; the code that reads them refuses unknown ones
METRIC = "detr_exp.metric.coco.CocoMetric"
OPEN_KEYS = ("optim.param_groups", "optim.optimizer", "loss.terms", "sets", "contenders")


@dataclass(frozen=True)
class Source:
    """One YAML file and its role in a config.

    Attributes:
        file: its path, as messages show it.
        package: the key of its content; empty for the root.
        values: its content from the root on, unresolved.
        recipe: an experiment or a sweep: sets keys of several groups and defines none.
        sweeps: whether it defines the values of a sweep.
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
        sources: the files in the order in which they were merged; overrides are applied after them.
    """

    cfg: DictConfig
    choices: dict[str, str | None]
    sources: list[Source]


def compose(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "config"
) -> DictConfig:
    """The config for a list of overrides, `group=option` and `key=value`.

    Args:
        overrides: as on the command line, e.g. `["model=rtdetrv2", "loss.focal_gamma=1.5"]`.
        config_dir: a folder with user-defined groups and options, structured like `conf/`.
        config_name: `config` for training; each other command has another one.

    Raises:
        ConfigError: an override that cannot be parsed, an unknown group, option or key, a value of the wrong type.
    """
    return composition(config_loader(config_dir), config_name, overrides).cfg


def config_loader(config_dir: str | Path | None = None) -> ConfigLoaderImpl:
    """Hydra's loader for the configs of this package and of `config_dir`."""
    version.setbase("1.3")
    search_path = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        folder = Path(config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a folder; give one structured like conf/")
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def composition(loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> Composition:
    """Like `compose`, but also returns the chosen options and the source files."""
    parsed = parse_overrides(renamed(config_name, overrides))
    return Composer(loader, config_name, parsed).compose(parsed)


class Composer:
    """Composes several configs from the same files, each of which is read once.

    Args:
        loader: see `config_loader`.
        config_name: see `compose`.
        overrides: may add folders to the search path.

    Attributes:
        groups: every group and its options.

    Raises:
        ConfigError: the primary config cannot be read, or a search path is not a folder.
    """

    def __init__(self, loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[Override]) -> None:
        self.loader, self.config_name = loader, config_name
        self.repository = CachingConfigRepository(loader.repository)
        with as_config_errors():
            extend_search_path(loader, config_name, overrides, self.repository)
            self.groups = groups_of(self.repository)

    def compose(self, overrides: list[Override]) -> Composition:
        """The config for the overrides of a command line.

        Raises:
            ConfigError: see `compose`.
        """
        with as_config_errors():
            refuse_wrong_choices(overrides, self.groups)
            defaults = create_defaults_list(
                self.repository, self.config_name, overrides, prepend_hydra=True, skip_missing=False
            )
            sources, parts = zip(*_sources(self.loader, self.repository, defaults))
            cfg = cast(DictConfig, OmegaConf.unsafe_merge({}, *parts))
            OmegaConf.set_struct(cfg, True)
            settings = [override for override in defaults.config_overrides if not override.is_hydra_override()]
            choices = dict(defaults.overrides.known_choices)
            values = values_of(cfg, resolve=False)
            for override in settings:
                refuse_wrong_override(override, values, choices, self.groups, self.repository)
            _refuse_deleted(settings, sources)
            apply_overrides(self.loader, settings, cfg)
            _refuse_wrong_references(settings, values, cfg, self.groups)
            settle_published(cfg, choices)
        composed = Composition(cfg, choices, list(sources))
        _refuse_unknown_keys(composed)
        return composed


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Raise errors of Hydra, OmegaConf and YAML as `ConfigError`, mistakes of the user."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(summary_of(error)) from error


def refuse_unready(cfg: DictConfig) -> None:
    """Refuse missing values, references to keys that do not exist, numbers out of range, and unknown COCO metrics."""
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
        # content under a package is already a copy; other content belongs to the repository
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
    """Refuse keys that no chosen option has, such as values of a recipe for an option that is not chosen any more.

    A key belongs to the nearest option above it, and must be in the file of that option, or in the root. An empty
    mapping or a plain value there allows any content.
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
            f"choose another {group}, or remove the key with ~{key}"
        )


def _refuse_deleted(overrides: Sequence[Override], sources: Sequence[Source]) -> None:
    """Refuse to delete keys of an option's file: only keys that a recipe or the user has added can be deleted.

    Raises:
        ConfigError: tells to set a value instead.
    """
    own_calls = {
        override.key_or_group.rpartition(".")[0]
        for override in overrides
        if override.key_or_group.endswith("._target_")
    }
    for override in overrides:
        key = override.key_or_group
        is_own = key.startswith(OPEN_KEYS) or key.rpartition(".")[0] in own_calls
        if override.is_delete() and not is_own and any(_sets(source, key) for source in sources if not source.recipe):
            raise ConfigError(f"{override.input_line}: every run needs {key}; set a value instead: {key}=...")


def _refuse_wrong_references(
    overrides: Sequence[Override], values: Values, cfg: DictConfig, groups: Mapping[str, Sequence[str]]
) -> None:
    """Refuse references to a value of the wrong type; `refuse_unready` refuses references to missing keys.

    Raises:
        ConfigError: with the referenced value.
    """
    for override in overrides:
        if override.is_delete() or "${" not in str(override.value()) or not isinstance(override.value(), str):
            continue
        key = override.key_or_group
        try:
            value, present = OmegaConf.select(cfg, key), look_up(values, key)
        except (OmegaConfBaseException, KeyError):
            continue
        problem = wrong_value(key, value, present, groups)
        if problem:
            raise ConfigError(f"{override.input_line} refers to {value!r}: {problem}")


def _knows(source: Source, key: str) -> bool:
    """Whether a file has a key, or allows it."""
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
    """The message of a Hydra error, in one line and without internal details."""
    if isinstance(error, InterpolationResolutionError | UnsupportedInterpolationType | GrammarParseError):
        key = getattr(error, "full_key", None)
        reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).strip().splitlines()[0])
        if "HydraConfig was not set" in reason:
            reason = "${hydra:...} is available in hydra.* only"
        reason = reason.strip('"')
        if not key:
            return f"a reference cannot be resolved: {reason}; write a value instead"
        group, absent = key.split(".")[0], re.search(r"key '((\w+)\.[\w.]+)'", reason)
        if absent and absent[2] != group:
            other = absent[2]
            return (
                f"{key} is {absent[1]}, which the chosen {other} does not have; choose a {other} that has it, "
                f"{other}=..., or another {group}, {group}=..."
            )
        return f"{key} refers to a missing key: {reason}; set a value: {key}=..."
    noise = ("provider=", "See http", "Config search path:", "To append", "full_key", "reference_type", "object_type")
    lines = [line.strip() for e in (error, error.__cause__) if e is not None for line in str(e).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(noise))
