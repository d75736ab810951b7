"""All that is used of Hydra which it calls private: another version of Hydra is to be looked at here, and only here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

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
]


def extend_search_path(
    loader: ConfigLoaderImpl, config_name: str, words: Sequence[Override], repository: CachingConfigRepository
) -> None:
    """Let a repository find what the primary config and a word of the command line add to the folders searched."""
    loader._process_config_searchpath(config_name, list(words), repository)


def load_file(loader: ConfigLoaderImpl, default: ResultDefault, repository: IConfigRepository) -> ConfigResult:
    """The file of an entry in the list of defaults, its content under the package it stands for."""
    return loader._load_single_config(default, repository)


def apply_overrides(loader: ConfigLoaderImpl, words: Sequence[Override], cfg: DictConfig) -> None:
    """Set, add and delete what the words of a command line say."""
    loader._apply_overrides_to_config(list(words), cfg)


def returned(result: JobReturn) -> Any:
    """What a job returned, or the error it ended with, which the public property would raise."""
    return result._return_value


def ended_with(status: JobStatus, value: object) -> JobReturn:
    """A job that has ended so; see `returned`."""
    return JobReturn(status=status, _return_value=value)
