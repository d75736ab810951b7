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


def explain(words: Sequence[str], config_dir: str | None = None) -> str:
    """What the command prints.

    Args:
        words: `key=`, and `run=` or the words of a training.
        config_dir: groups and options of your own.

    Raises:
        ValueError: words that cannot be composed, a key that is not there, a run that is not found.
    """
    asked = {name: _taken(words, name) for name in ("key", "run")}
    said = [word for word in words if not word.startswith(("key=", "run="))]
    run = PastRun.load(find_one(asked["run"])) if asked["run"] else None
    if run is not None:
        if said:
            raise ConfigError(f"{' '.join(said)} is given beside run=, which has its own words; leave out one of them")
        said = run.record.words
    composed = composition(config_loader(config_dir), "config", said)
    values = resolved(composed.cfg) if run is None else run.config
    parts = []
    if asked["key"]:
        parts.append("\n".join(origins(composed, said, values, asked["key"])))
    if run is not None or not asked["key"]:
        parts.append(difference(composed, said, values, config_dir))
    return "\n\n".join(parts)


def origins(composed: Composition, words: Sequence[str], values: Values, key: str) -> Iterator[str]:
    """Lines about a key: its value, then everything that set it, in order; the last one counts.

    For a section: a line for every value in it, with what counts.

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
        rows = [(name, _shown(found), setters(composed, words, name)) for name, found in flat(value, f"{key}.").items()]
        yield from _aligned([(f"  {name}", found, by[-1][0] if by else "") for name, found, by in rows])
        return
    yield f"{key} = {_shown(value)}"
    found = setters(composed, words, key)
    *earlier, (where, last) = [(f"  {where}", _shown(given)) for where, given in found]
    yield from _aligned([*((*row, "") for row in earlier), (where, last, "<- counts" if earlier else "")])
    references = re.findall(r"\$\{([\w.]+)\}", last)
    if last not in (_shown(value), "???") and not references:
        yield f"  the run recorded {_shown(value)}: it was drawn when it started, or the files have changed since"
    for name in references:
        yield from origins(composed, words, values, name)


def setters(composed: Composition, words: Sequence[str], key: str) -> list[tuple[str, object]]:
    """Every file and word that sets a key, in the order in which they count, with what they set it to."""
    found: list[tuple[str, object]] = []
    for source in composed.sources:
        try:
            found.append((source.file, look_up(source.values, key)))
        except KeyError:
            continue
    for word in parse_overrides(words):
        name, value = word.key_or_group, word.value()
        if name not in composed.choices and (key == name or key.startswith(f"{name}.")):
            inside = value
            if key != name:
                inside = OmegaConf.select(OmegaConf.create({"said": value}), f"said{key.removeprefix(name)}")
            found.append((f"command line: {masked(str(word.input_line))}", masked(inside, key)))
    return found


def difference(composed: Composition, words: Sequence[str], values: Values, config_dir: str | None) -> str:
    """Where values differ from the published recipe, or, where there is none, from the defaults of the options."""
    experiment = composed.choices.get("experiment")
    chosen = [word.input_line for word in parse_overrides(words) if word.key_or_group in composed.choices]
    base = [f"experiment={experiment}"] if experiment else [str(word) for word in chosen]
    recipe = composition(config_loader(config_dir), "config", base)
    given = flat(values)
    for key in OmegaConf.missing_keys(recipe.cfg):  # what every user has to give is no difference
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
    """The values of a config; what must be given and is not stays `???`."""
    copy = cfg.copy()
    for key in OmegaConf.missing_keys(copy):
        OmegaConf.update(copy, key, "(must be given)")
    return values_of(copy)


def _taken(words: Sequence[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)


def _of(words: Sequence[str]) -> str:
    return f" of {' '.join(words)}" if words else ""


def _shown(value: object) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, dict | list) or value is None or isinstance(value, bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [min(60, max(map(len, column))) for column in zip(*rows)]
    return ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    args = get_args_parser().parse_args(sys.argv[1:])
    try:
        say(USAGE if args.help or not args.overrides else explain(args.overrides, args.config_dir))
    except cli.ENDINGS as error:
        sys.exit(cli.report(error))


if __name__ == "__main__":
    main()
