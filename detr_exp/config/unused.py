"""Keys that nobody reads: a word that changes nothing must not look as if it did."""

from __future__ import annotations

import re
from collections.abc import Collection

from omegaconf import DictConfig, OmegaConf

from detr_exp.config.stored import with_derived_nodes
from detr_exp.config.targets import WrongArgumentsError
from detr_exp.values import values_of

_REFERENCES = re.compile(r"(?<!\\)\$\{[^}]*")


def refuse_unused_keys(cfg: DictConfig, group: str, known: Collection[str], further: Collection[str] = ()) -> None:
    """Refuse keys that neither what the group is for nor a node inside of it reads.

    A node reads a key by a reference, `${model.num_heads}`. Out of a file nothing is a reference: there it has a key of
    the same name, or is the user's own, who may call it otherwise.

    Args:
        cfg: the whole config.
        group: its key.
        known: keys that are read.
        further: more of them, which are not worth a word.

    Raises:
        WrongArgumentsError: names them.
    """
    referred = references(cfg)
    settings = values_of(cfg[group])
    names = {name for node in settings.values() if isinstance(node, dict) for name in node}
    idle = [key for key in cfg[group] if key not in {*known, *further, "_target_"}]
    if referred:
        idle = [key for key in idle if not re.search(rf"\b{re.escape(key)}\b", referred)]
    else:
        idle = [] if cfg.get("allow_targets") else [key for key in idle if key not in names]
    if idle:
        raise WrongArgumentsError(
            f"{group} has {', '.join(f'{group}.{key}' for key in idle)}, which nothing reads; it takes "
            f"{', '.join(known)}, and what these refer to by ${{{group}.<key>}}: take it out, ~{group}.{idle[0]}"
        )


def references(cfg: DictConfig) -> str:
    """All references in a config, with those of the nodes that are made of its words; none in one out of a file."""
    values = values_of(cfg, resolve=False)
    found = _REFERENCES.findall(OmegaConf.to_yaml(cfg))
    return " ".join(found and _REFERENCES.findall(OmegaConf.to_yaml(with_derived_nodes(values, resolved=False))))
