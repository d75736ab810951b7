"""Keys without effect: an override that changes nothing must be an error."""

from __future__ import annotations

import re
from collections.abc import Collection

from omegaconf import DictConfig

from detr_exp.config.stored import with_derived_nodes
from detr_exp.config.targets import WrongArgumentsError
from detr_exp.values import values_of

_REFERENCES = re.compile(r"(?<!\\)\$\{[^}]*")


def refuse_unused_keys(cfg: DictConfig, group: str, known: Collection[str], further: Collection[str] = ()) -> None:
    """Refuse keys of a group that neither its target nor a node inside it reads.

    A node reads a key by a reference, `${model.num_heads}`. A config from a file has no references: there the node has
    a key of the same name, or is user-defined and may use another name.

    Args:
        cfg: the whole config.
        group: its key.
        known: keys that are read.
        further: more such keys, which the message does not list.

    Raises:
        WrongArgumentsError: with these keys.
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
            f"{', '.join(known)}, and what these refer to by ${{{group}.<key>}}: remove it: ~{group}.{idle[0]}"
        )


def references(cfg: DictConfig) -> str:
    """All references in a config, including those of derived nodes; a config from a file has none."""
    values = values_of(cfg, resolve=False)
    if not _REFERENCES.search(str(values)):
        return ""
    return " ".join(_REFERENCES.findall(str(with_derived_nodes(values, resolved=False))))
