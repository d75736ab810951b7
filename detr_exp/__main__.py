"""All commands under one name: `detr-exp <command> ...`, or `python -m detr_exp <command> ...`."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module

from detr_exp import cli
from detr_exp.config.compose import CONF_DIR
from detr_exp.config.mistakes import ConfigError, did_you_mean
from detr_exp.streams import keep_open
from detr_exp.terminal import say
from detr_exp.tracker.provenance import versions

COMMANDS = {
    "train": "train a detector, or a sweep of them: detr-exp train model=rtdetrv2 data=auto data.root=FOLDER",
    "predict": "detect objects in images, folders, videos, cameras, addresses",
    "evaluate": "the metrics of a checkpoint, in all and per class",
    "export": "write ONNX, OpenVINO, TorchScript or TensorRT files, and check them",
    "export_weights": "write weights for other code (safetensors, Hugging Face), and send them to the hub",
    "benchmark": "latency, throughput, FLOPs and memory of a network",
    "pareto": "which smaller, quicker networks a checkpoint holds, and what they reach",
    "check_data": "what a data set contains, and its errors",
    "shard": "write a data set as tar files with an index, to train on from afar",
    "weights": "list, download and verify published weights",
    "review": "one page to look at the mistakes of a detector, and at labels that may be wrong",
    "report": "one page about a sweep or any runs",
    "compare": "whether the difference of two runs is significant",
    "reproduce": "train a run again, and compare every metric",
    "explain": "which file or override set a value of the config",
    "sync": "send missing values of a run to its trackers",
    "torchrun": "train on several machines",
    "proof": "train several programs on the same data, and compare them",
}
USAGE = """\
Train, compare and use detection transformers: RT-DETR, RT-DETRv2, D-FINE, DEIM, DEIMv2, EdgeCrafter, LW-DETR, RF-DETR.

  detr-exp COMMAND [group=option ...] [key=value ...]     or: python -m detr_exp.COMMAND ...

{}

  detr-exp COMMAND --help    groups, keys and examples
  detr-exp model=...         without a command: train
  detr-exp --version         versions for a bug report
  eval "$(detr-exp --shell-completion install=bash)"    completes commands, groups, options and keys; or install=zsh
  detr-exp --shell-completion install=fish | source     the same for fish
"""
# Hydra's completion for zsh is that for bash, and needs these
ZSH = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\nautoload -Uz bashcompinit && bashcompinit"


def main() -> None:
    """
    Raises:
        SystemExit: the command failed.
    """
    keep_open()
    sys.argv[0] = "detr-exp"
    words = sys.argv[1:]
    first = words[0] if words else "--help"
    if first in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        say(USAGE.format("\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())))
    elif first == "--version":
        say(versions())
    elif first in ("--shell-completion", "-sc") and words[1:2] and words[1].startswith("query="):
        complete(os.environ.get("COMP_LINE", ""), words[1])
    elif first in ("--shell-completion", "-sc") and words[1:] == ["install=zsh"]:
        say(ZSH)
        import_module("detr_exp.train").main()
    elif first in COMMANDS:
        del sys.argv[1]
        import_module(f"detr_exp.{first}").main()
    elif "=" in first or first.startswith(("-", "~", "+")):
        import_module("detr_exp.train").main()
    else:
        cli.of_words(refuse, USAGE)


def refuse(words: list[str]) -> None:
    """
    Raises:
        ConfigError: the first word is no command.
    """
    near = did_you_mean(words[0], COMMANDS)
    raise ConfigError(f"{words[0]} is not a command; {near}use one of {', '.join(COMMANDS)}, or key=value to train")


def complete(line: str, query: str) -> None:
    """Print what may come next: a command, or else groups, options and keys of the command's config.

    Args:
        line: what has been typed so far, with the name of the program.
        query: `query=` and the name of a shell.
    """
    typed = re.match(r"\s*\S+\s+(\S*)(\s?.*)", line)
    first, rest = typed.groups() if typed else ("", "")
    if not rest and (near := [name for name in COMMANDS if name.startswith(first)]):
        say(*near) if query == "query=fish" else say(" ".join(near))
        return
    name = first if first in COMMANDS else "train"
    config = "config" if name == "train" else name
    if not (CONF_DIR / f"{config}.yaml").exists():
        return
    os.environ["COMP_LINE"] = f"detr-exp {rest if first in COMMANDS else first + rest}".replace("  ", " ")
    cli.main(_run_nothing, config, USAGE)


def _run_nothing(_: object) -> None:
    """The task of a command line that only asks what may follow."""


if __name__ == "__main__":
    main()
