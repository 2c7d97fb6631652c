"""The table of a model type that the shipped one does not know, derived on the spot.

The checkpoint's own config.json says what to build; only code of the installed transformers
builds it, on the meta device, without the network. The table is kept in `$TAIA_CACHE` (or
~/.cache/taia) under a name made of the config, the version of transformers and these rules.

A config is input from outside: what would fetch or run something (`auto_map`, kernels,
pretrained backbones) is taken out of it, and sizes that no model has are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Table = dict[str, Any]

LEFT_OUT = {
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "use_pretrained_backbone",
    "backbone",
    "_name_or_path",
}
"""Fields that make transformers fetch or run something, and change no module's name."""

COUNTS = re.compile(r"^(num_\w*layers|n_layers?|num_layers|depth|depths|num_\w*blocks)$")
MOST_LAYERS = 2048
NESTED = 16

INSTALL = "pip install 'taia[train]'"
UPGRADE = "pip install --upgrade transformers"

_made: dict[str, Table | str] = {}


def derived_table(model_type: str, config: Mapping[str, Any] | None) -> Table | str:
    """The table of one model type, or the sentence that says why not, and what to do.

    config: the checkpoint's config.json; None for the type's default.
    """
    if find_spec("transformers") is None or find_spec("torch") is None:
        return (
            "With transformers installed, taia derives a type from the structure of its "
            f"models: {INSTALL}"
        )
    try:
        stated = json.dumps(_clean(config or {}), sort_keys=True, default=str)
    except (TypeError, ValueError) as error:
        return f"Its config cannot be read: {error}"
    text = "\n".join([model_type, version("transformers"), _rules(), stated])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if key not in _made:
        _made[key] = _stored(key) or _built(model_type, config, key)
    return _made[key]


def _built(model_type: str, config: Mapping[str, Any] | None, key: str) -> Table | str:
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        own = " Its code comes with its weights, and such code is never run." if (
            config and config.get("auto_map")
        ) else ""  # fmt: skip
        return (
            f"The installed transformers {transformers.__version__} does not know it either."
            f"{own} If a later one does: {UPGRADE}"
        )
    try:
        table = _from_config(model_type, config)
    except Exception as error:  # whatever a foreign constructor raises is a reason
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"Its structure cannot be derived from its config: {type(error).__name__}: {reason}"
    _keep(key, table)
    return table


def _from_config(model_type: str, config: Mapping[str, Any] | None) -> Table:
    import transformers

    from taia.derivation.family import table_of, table_of_type
    from taia.derivation.models import architectures, of_class, quietly_on_meta

    known = architectures().get(model_type)
    if not config:
        if known is None:
            raise ValueError("it has no class with a text decoder")
        return table_of_type(model_type)
    wanted = [name for name in config.get("architectures") or [] if name in (known or [])]
    if not known:
        raise ValueError("it has no class with a text decoder")
    _check_sizes(config)
    with quietly_on_meta(), _Offline():
        made = transformers.CONFIG_MAPPING[model_type].from_dict(_clean(config))
        model = of_class(made, wanted[0] if wanted else known[0])
        return table_of([model])


def _clean(value: Any, depth: int = 0) -> Any:
    if depth > NESTED:
        raise ValueError("config.json is nested too deeply")
    if isinstance(value, Mapping):
        return {k: _clean(v, depth + 1) for k, v in value.items() if k not in LEFT_OUT}
    return [_clean(item, depth + 1) for item in value] if isinstance(value, list) else value


def _check_sizes(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
        numbers = value if isinstance(value, list) else [value]
        if COUNTS.match(str(name)) and any(isinstance(n, int) and n > MOST_LAYERS for n in numbers):
            raise ValueError(f"{name} is {value}, more than any model has")


class _Offline:
    """transformers asks no hub while a model is built."""

    def __enter__(self) -> None:
        from huggingface_hub import constants

        self.before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True

    def __exit__(self, *error: object) -> None:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = self.before


@cache
def _rules() -> str:
    """A digest of this package: other rules make other tables."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _place(key: str) -> Path:
    home = Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser()
    return home / "kinds" / f"{key}.json"


def _stored(key: str) -> Table | None:
    try:
        table = json.loads(_place(key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) and "rows" in table else None


def _keep(key: str, table: Table) -> None:
    from taia.files import atomic_write

    place = _place(key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, json.dumps(table, indent=1) + "\n")
    except OSError:
        return  # a cache that cannot be written costs time, not a result
