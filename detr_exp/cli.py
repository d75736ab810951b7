"""Shared code of all commands: run with Hydra, one message per mistake, and exit statuses.

0 success, 1 failure at run time, 2 a mistake in configuration or data, 130 / 143 / 129 / 75 ended by SIGINT / SIGTERM /
SIGHUP / SIGUSR1 or SIGUSR2 after saving.
"""

from __future__ import annotations

import argparse
import errno
import functools
import gc
import logging
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from detr_exp.config import grid
from detr_exp.config.compose import CONF_DIR, as_config_errors, composition, config_loader, refuse_unready, summary_of
from detr_exp.config.hydra_private import get_args_parser, sweeping
from detr_exp.config.mistakes import (
    OUR_PACKAGES,
    ConfigError,
    groups_of,
    is_raised_by_us,
    parse_overrides,
    refuse_wrong_choices,
)
from detr_exp.config.published import refuse_absent_weights
from detr_exp.config.renamed import renamed
from detr_exp.folder import hydra_files, refuse_run_folder, remove_empty_folders, start_writing
from detr_exp.signals import Interrupt, Interrupted
from detr_exp.streams import name_files_in_utf8
from detr_exp.terminal import ConsoleHandler, guard_messages, say
from detr_exp.tracker.provenance import versions
from detr_exp.trainer import run_status

Task = Callable[[DictConfig], float | None]
TRAINING = ("config", "reproduce")  # primary configs of the commands that train
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
OPEN_FILES = (errno.EMFILE, errno.ENFILE)
ENDINGS = (Exception, KeyboardInterrupt, Interrupted)


def main(task: Task, config_name: str, usage: str) -> None:
    """Run `task` with the config of the command line, or a sweep of them.

    Args:
        task: function of a config.
        config_name: of the primary config in `conf/`.
        usage: what `--help` prints; `{groups}` in it is replaced by the groups and their options.

    Raises:
        SystemExit: the task failed.
    """
    name_files_in_utf8()
    if "torch" not in sys.modules:
        gc.freeze()  # objects that exist now stay; scanning them for garbage would delay error messages
    with_traceback = "HYDRA_FULL_ERROR" in os.environ
    # threads that spin while waiting make training a hundred times slower if another process uses a core
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing and exiting
    guard_messages()
    started = time.time()
    try:
        with Interrupt(raises=True):
            args = parse_arguments(renamed(config_name, sys.argv[1:]))
            if args.help or args.version:
                print(usage.format(groups=options(args.config_dir)) if args.help else versions())
                return
            refuse_before_start(args, config_name)
            app = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)
            with _hydra_errors(args), sweeping() if args.multirun else nullcontext():
                app(_with_exit_status(task, started, trains=config_name in TRAINING))()
    except ENDINGS as error:
        if with_traceback:
            say("".join(traceback.format_exception(error)), file=sys.stderr)
        sys.exit(report(error))


def main_without_folder(task: Callable[[DictConfig], object], config_name: str, usage: str) -> None:
    """Run `task` as `main` does, for commands that write no files of their own.

    Raises:
        SystemExit: the task failed.
    """

    def composed(words: list[str]) -> None:
        cfg = composition(config_loader(), config_name, list(map(_as_list, words))).cfg
        refuse_unready(cfg)
        task(cfg)

    of_words(composed, usage)


def of_words(task: Callable[[list[str]], object], usage: str) -> None:
    """Run `task` with the words of the command line, which are no config.

    Raises:
        SystemExit: unless everything went well.
    """
    name_files_in_utf8()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[ConsoleHandler()])
    guard_messages()
    try:
        with Interrupt(raises=True):
            overrides = sys.argv[1:]
            if {"--help", "-h", "--version"} & set(overrides):
                print(versions() if "--version" in overrides else usage)
                return
            task(overrides)
    except ENDINGS as error:
        sys.exit(report(error))


def _as_list(override: str) -> str:
    """`key=a,b` as `key=[a,b]`, for commands without sweeps."""
    key, _, value = override.partition("=")
    several = "," in value and not value.startswith(("[", "{", "'", '"')) and "\\," not in value
    return f"{key}=[{value}]" if several else override


def options(config_dir: str | None) -> str:
    """One line per group with its options."""
    groups = groups_of(config_loader(config_dir).repository)
    width = max(map(len, groups))
    return "\n".join(
        textwrap.fill(
            ", ".join(names), 120, initial_indent=f"  {group:<{width}}  ", subsequent_indent=" " * (width + 4)
        )
        for group, names in groups.items()
        if names
    )


def refuse_before_start(args: argparse.Namespace, config_name: str) -> None:
    """Compose the config before Hydra does, so that mistakes give a clear message and create no run folder.

    The runs of a sweep are composed by its sweeper, except those of a plain grid.
    """
    files = [word for word in args.overrides if word.startswith("sweep=")]
    if len(files) > 1 or any("," in word for word in files):
        others = [name for name in re.findall(r"\w+", " ".join(files)) if name not in ("sweep", "seeds")]
        raise ConfigError(
            f"{' '.join(files)} names several files, and a command takes one; give the keys of the others beside it: "
            f"sweep={next(iter(others), 'learning_rates')} seed=0,1,2"
        )
    if args.hydra_help or args.info or args.shell_completion:
        return
    loader = config_loader(args.config_dir)
    if files:
        refuse_wrong_choices(parse_overrides(files), groups_of(loader.repository))
        return
    if args.multirun:
        grid.refuse_before_start(loader, config_name, args.overrides)
        return
    cfg = composition(loader, config_name, args.overrides).cfg
    if not args.cfg:
        refuse_unready(cfg)
        if config_name in TRAINING:
            refuse_absent_weights(cfg)
    elif args.cfg == "job" and args.package not in (None, "_global_") and OmegaConf.select(cfg, args.package) is None:
        groups = ", ".join(str(key) for key in cfg)
        raise ConfigError(f"--package {args.package}: there is no such key; the first parts of all keys: {groups}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse a command line, and sort `sys.argv` into the order that Hydra needs.

    Raises:
        ConfigError: an option that does not exist, lacks its value, or has no meaning here.
    """
    parser = get_args_parser()
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            raise ConfigError(f"{word} is not an option; settings are written key=value, e.g. {name[2:]}=...")
    parser.error = _refuse_option  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    _refuse_options(args)
    options = list(argv)
    for word in reversed(args.overrides):  # Hydra needs all options before, or all after, the overrides
        del options[len(options) - 1 - options[::-1].index(word)]
    sys.argv[1:] = [*options, *args.overrides]
    return args


def _refuse_option(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see --help")


def _refuse_options(args: argparse.Namespace) -> None:
    """Refuse options of Hydra that contradict each other or have no meaning here.

    Raises:
        ConfigError: tells what to use instead.
    """
    if args.config_name is not None or args.config_path is not None:
        option = "--config-path" if args.config_name is None else "--config-name"
        raise ConfigError(
            f"{option} {args.config_path or args.config_name}: every command has a fixed config; choose its options "
            "with group=option, and your own options with --config-dir FOLDER experiment=NAME"
        )
    if args.experimental_rerun is not None:
        raise ConfigError(
            f"--experimental-rerun {args.experimental_rerun}: pickled files can run code and are not opened; repeat a "
            "run with python -m detr_exp.reproduce run=FOLDER"
        )
    requested = {
        "--run": args.run,
        "--multirun": args.multirun,
        "--cfg": args.cfg,
        "--info": args.info,
        "--shell-completion": args.shell_completion,
    }
    if len(given := [name for name, value in requested.items() if value]) > 1:
        raise ConfigError(f"{' and '.join(given)} cannot be combined; use one of them")
    for option, value in (("--package", args.package), ("--resolve", args.resolve)):
        if value and not args.cfg:
            raise ConfigError(f"{option} changes the output of --cfg; add it: --cfg job {option}{_shown(value)}")
    if args.shell_completion and not re.fullmatch(
        "(install|uninstall|query)=(bash|fish|zsh)", " ".join(args.overrides)
    ):
        raise ConfigError(
            f"--shell-completion {' '.join(args.overrides)} is not valid; use "
            "--shell-completion install=bash, or fish or zsh, or uninstall=..."
        )


def _shown(value: object) -> str:
    return "" if value is True else f" {value}"


@contextmanager
def _hydra_errors(args: argparse.Namespace) -> Iterator[None]:
    """Raise errors of Hydra itself as `ConfigError`; errors of tasks are reported inside.

    Raises:
        ConfigError: `hydra.*` cannot be resolved, or a folder cannot be created.
    """
    folder = "hydra.sweep.dir" if args.multirun else "hydra.run.dir"
    try:
        with as_config_errors():
            yield
    except OSError as error:
        where = str(error.filename)[:200]
        raise ConfigError(
            f"{where} cannot be created or used ({error.strerror}); choose another folder: {folder}=..."
        ) from None


def _with_exit_status(task: Task, started: float, trains: bool) -> Task:
    """Wrap a task: in a single run a failure ends the process; in a sweep it is reported and raised for the sweeper.

    Args:
        task: function of a config.
        started: time at which the command was started; new folders of refused runs are removed.
        trains: whether the task is a training, which starts writing to its folder itself.
    """

    @functools.wraps(task)
    def run(cfg: DictConfig) -> float | None:
        guard_messages()  # a sweep may have started this process
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            if not trains:
                refuse_run_folder(folder)
            result = task(cfg)
        except ENDINGS as error:
            status = report(error)
            if status != 2 and not trains:
                start_writing(folder, hydra_files(cfg))
            if HydraConfig.get().mode is RunMode.MULTIRUN and status in (0, 1, 2):
                raise
            if status == 2:
                remove_empty_folders(folder, started)
            sys.exit(status)
        if not trains:
            start_writing(folder, hydra_files(cfg))
        return result

    return run


def report(error: BaseException) -> int:
    """Print an error, with a traceback only for bugs of this package, and return the exit status."""
    error = _interrupt_behind(error)
    status = status_of(error)
    if isinstance(error, KeyboardInterrupt):
        say("interrupted", file=sys.stderr)
    elif hasattr(error, "exit_status"):
        say(error, file=sys.stderr)
    elif status == 2:
        message = summary_of(error) if isinstance(error, HydraException) else error
        if isinstance(error, OSError):
            where = error.filename or "a file of the run"
            fix = "raise ulimit -f" if error.errno == errno.EFBIG else "free space"
            message = f"{where} cannot be used ({error.strerror}); {fix}, or choose another folder: hydra.run.dir=..."
        say(f"error: {message}", file=sys.stderr)
    elif isinstance(error, RuntimeError) and type(error).__module__.startswith(OUR_PACKAGES):
        say(f"error: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in OPEN_FILES:
        say(f"error: {error}; raise the limit of open files: ulimit -n 4096, or data.num_workers=0", file=sys.stderr)
    elif run_status.status_of(error) == "oom":
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(
            f"error: memory ran out ({first}); use less: trainer.batch_size=1, or auto; or raise ulimit -v and -u",
            file=sys.stderr,
        )
    else:
        say("".join(traceback.format_exception(error)), file=sys.stderr)
    return status


def status_of(error: BaseException) -> int:
    """The exit status for an error; 2 for mistakes in the request."""
    error = _interrupt_behind(error)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if hasattr(error, "exit_status"):
        return error.exit_status
    mistake = isinstance(error, ValueError) and is_raised_by_us(error)
    of_hydra = isinstance(error, HydraException) and not isinstance(error, InstantiationException)
    of_disk = isinstance(error, OSError) and error.errno in DISK
    return 2 if mistake or of_hydra or of_disk else 1


def _interrupt_behind(error: BaseException) -> BaseException:
    """The interrupt that caused an error in a library, or the error itself."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, Interrupted):
        behind = behind.__context__
    return error if behind is None or is_raised_by_us(error) else behind
