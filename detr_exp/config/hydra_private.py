"""All private names of Hydra that this package uses: only this file depends on the version of Hydra."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal import utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.utils import create_config_search_path
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

__all__ = [
    "CachingConfigRepository",
    "ConfigLoaderImpl",
    "DefaultsList",
    "IConfigRepository",
    "apply_overrides",
    "create_config_search_path",
    "create_defaults_list",
    "ended_with",
    "extend_search_path",
    "get_args_parser",
    "load_file",
    "returned",
    "sweeping",
]


def get_args_parser() -> ArgumentParser:
    """Hydra's parser, except that `--version` is a flag: a command has a version of its own."""
    parser = ArgumentParser(add_help=False, parents=[utils.get_args_parser()], conflict_handler="resolve")
    parser.add_argument("--version", action="store_true", help="versions of this package, torch, CUDA and Python")
    return parser


def extend_search_path(
    loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[Override], repository: CachingConfigRepository
) -> None:
    """Add the folders that the primary config and the overrides add to the search path of a repository."""
    loader._process_config_searchpath(config_name, list(overrides), repository)


def load_file(loader: ConfigLoaderImpl, default: ResultDefault, repository: IConfigRepository) -> ConfigResult:
    """Load the file of an entry in the defaults list, with its content under the package of that entry."""
    return loader._load_single_config(default, repository)


def apply_overrides(loader: ConfigLoaderImpl, overrides: Sequence[Override], cfg: DictConfig) -> None:
    """Set, add and delete keys as the overrides say."""
    loader._apply_overrides_to_config(list(overrides), cfg)


@contextmanager
def sweeping() -> Iterator[None]:
    """A sweep has a config of its own, which Hydra composes without the groups that are swept.

    Keys that only their options have are left out of it. Configs of runs have all groups, and refuse unknown keys.
    """
    load, apply = ConfigLoaderImpl.load_configuration, ConfigLoaderImpl._apply_overrides_to_config

    def apply_known(overrides: list[Override], cfg: DictConfig) -> None:
        apply([one for one in overrides if _fits(cfg, one)], cfg)

    def load_by_mode(self: ConfigLoaderImpl, *args: object, **settings: object) -> DictConfig:
        is_sweep = RunMode.MULTIRUN in (*args, *settings.values())
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply_known if is_sweep else apply)  # type: ignore
        try:
            return load(self, *args, **settings)  # type: ignore
        finally:
            ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)  # type: ignore

    ConfigLoaderImpl.load_configuration = load_by_mode  # type: ignore
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore


def _fits(cfg: DictConfig, override: Override) -> bool:
    above, _, key = override.key_or_group.rpartition(".")
    parent = OmegaConf.select(cfg, above) if above else cfg
    is_there = OmegaConf.is_dict(parent) and key in list(parent)  # also if its value is missing
    return is_there or override.is_hydra_override() or override.is_add() or override.is_force_add()


def returned(result: JobReturn) -> Any:
    """The return value of a job, or its error, which the public property would raise."""
    return result._return_value


def ended_with(status: JobStatus, value: object) -> JobReturn:
    """The result of a job with this status and return value; see `returned`."""
    return JobReturn(status=status, _return_value=value)
