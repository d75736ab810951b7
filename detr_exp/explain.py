"""Where a value comes from: `python -m detr_exp.explain key=optim.lr [experiment=... ...]` or `run=<folder or id>`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from detr_exp import cli
from detr_exp.config.compose import Composition, composition, config_loader
from detr_exp.config.hydra_private import get_args_parser
from detr_exp.config.mistakes import ConfigError, parse_overrides
from detr_exp.config.stored import literal
from detr_exp.runs.past import PastRun, find_one
from detr_exp.terminal import say
from detr_exp.tracker.provenance import versions
from detr_exp.tracker.secrets import masked
from detr_exp.values import Values, flat, look_up, values_of, walk

USAGE = """\
Show which file or override set a value, and how a run differs from its recipe.

  python -m detr_exp.explain key=optim.lr                               in the default config
  python -m detr_exp.explain key=optim.lr experiment=rtdetrv2_r18vd_120e_coco optim.lr=2e-4
  python -m detr_exp.explain run=outputs/<day>/<run>                    how it differs from its recipe
  python -m detr_exp.explain run=outputs/<day>/<run> key=loss           all values under a key

  key            a key or a group; without it: only the differences
  run            a run folder or a run id; without it: the config of the other overrides, as in training
  --config-dir   custom groups and options
"""
ABSENT = "-"


def explain(overrides: Sequence[str], config_dir: str | None = None) -> str:
    """The output of the command.

    Args:
        overrides: `key=`, and `run=` or the overrides of a training.
        config_dir: folder with custom groups and options.

    Raises:
        ValueError: the overrides cannot be composed, or there is no such key or run.
    """
    requested = {name: _value_of(overrides, name) for name in ("key", "run")}
    own = [override for override in overrides if not override.startswith(("key=", "run="))]
    run = PastRun.load(find_one(requested["run"])) if requested["run"] else None
    if run is not None:
        if own:
            raise ConfigError(f"{' '.join(own)} is given with run=, which has its own overrides; drop one of them")
        own = run.record.words
    composed = composition(config_loader(config_dir), "config", own)
    values = resolved(composed.cfg) if run is None else run.config
    parts = []
    if requested["key"]:
        parts.append("\n".join(origins(composed, own, values, requested["key"])))
    if run is not None or not requested["key"]:
        parts.append(difference(composed, own, values, config_dir))
    return "\n\n".join(parts)


def origins(composed: Composition, overrides: Sequence[str], values: Values, key: str) -> Iterator[str]:
    """Lines about a key: its value, then everything that set it, in order; the last one counts.

    For a section: a line for every value in it, with its last origin.

    Raises:
        ConfigError: there is no such key.
    """
    key = key.replace("/", ".")
    try:
        value = look_up(values, key)
    except KeyError:
        from difflib import get_close_matches

        near = get_close_matches(key, [name for name, _ in walk(values)], n=1) or ["optim"]
        raise ConfigError(f"there is no key {key}; did you mean key={near[0]}?") from None
    option = composed.choices.get(key.replace(".", "/"))
    if option is not None:
        yield f"{key.replace('.', '/')}={option}"
    if isinstance(value, dict) and value:
        rows = [
            (name, _shown(value), setters(composed, overrides, name)) for name, value in flat(value, f"{key}.").items()
        ]
        yield from _aligned([(f"  {name}", value, by[-1][0] if by else "") for name, value, by in rows])
        return
    yield f"{key} = {_shown(value)}"
    settings = setters(composed, overrides, key)
    *earlier, (where, last) = [(f"  {where}", _shown(value)) for where, value in settings]
    yield from _aligned([*((*row, "") for row in earlier), (where, last, "<- counts" if earlier else "")])
    references = re.findall(r"\$\{([\w.]+)\}", last)
    if last not in (_shown(value), "???") and not references:
        yield f"  the run recorded {_shown(value)}: it was sampled at the start, or the files have changed since"
    for name in references:
        yield from origins(composed, overrides, values, name)


def setters(composed: Composition, overrides: Sequence[str], key: str) -> list[tuple[str, object]]:
    """Every file and override that sets a key, with the value; later ones win."""
    settings: list[tuple[str, object]] = []
    for source in composed.sources:
        try:
            settings.append((source.file, look_up(source.values, key)))
        except KeyError:
            continue
    for override in parse_overrides(overrides):
        name, value = override.key_or_group, override.value()
        if name not in composed.choices and (key == name or key.startswith(f"{name}.")):
            inside = value
            if key != name:
                inside = OmegaConf.select(OmegaConf.create({"value": value}), f"value{key.removeprefix(name)}")
            settings.append((f"command line: {masked(str(override.input_line))}", masked(inside, key)))
    return settings


def difference(composed: Composition, overrides: Sequence[str], values: Values, config_dir: str | None) -> str:
    """Differences from the published recipe, or, where there is none, from the defaults of the options."""
    experiment = composed.choices.get("experiment")
    chosen = [
        override.input_line for override in parse_overrides(overrides) if override.key_or_group in composed.choices
    ]
    base = [f"experiment={experiment}"] if experiment else [str(override) for override in chosen]
    recipe = composition(config_loader(config_dir), "config", base)
    given = flat(values)
    for key in OmegaConf.missing_keys(recipe.cfg):  # values that every user has to give are no difference
        OmegaConf.update(recipe.cfg, key, literal(given.get(key)))
    groups = [group for group in composed.choices if not group.startswith("hydra/")]
    rows = [(group, str(recipe.choices.get(group)), str(composed.choices[group])) for group in groups]
    before, now = (
        {key: _shown(value) for key, value in flat(masked(side)).items()} for side in (resolved(recipe.cfg), values)
    )
    rows += [(key, before.get(key, ABSENT), now.get(key, ABSENT)) for key in dict.fromkeys([*now, *before])]
    rows = [row for row in rows if row[1] != row[2]]
    of = f"its recipe, experiment={experiment}" if experiment else f"the defaults{_of(base)}"
    if not rows:
        return f"it does not differ from {of}"
    many = "differences" if rows[1:] else "difference"
    return "\n".join([f"{len(rows)} {many} from {of}", *_aligned([(f"  {k}", f"{a} -> {b}") for k, a, b in rows])])


def resolved(cfg: DictConfig) -> Values:
    """The values of a config; those that must be given and are missing become a note."""
    copy = cfg.copy()
    for key in OmegaConf.missing_keys(copy):
        OmegaConf.update(copy, key, "(must be given)")
    return values_of(copy)


def _value_of(overrides: Sequence[str], name: str) -> str | None:
    return next((one.partition("=")[2] for one in overrides if one.startswith(f"{name}=")), None)


def _of(overrides: Sequence[str]) -> str:
    return f" of {' '.join(overrides)}" if overrides else ""


def _shown(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict | list) or value is None or isinstance(value, bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [min(60, max(map(len, column))) for column in zip(*rows)]
    return ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    args = get_args_parser().parse_args(sys.argv[1:])
    try:
        if args.version:
            say(versions())
        else:
            say(USAGE if args.help or not args.overrides else explain(args.overrides, args.config_dir))
    except cli.ENDINGS as error:
        sys.exit(cli.report(error))


if __name__ == "__main__":
    main()
