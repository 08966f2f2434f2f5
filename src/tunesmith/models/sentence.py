# SPDX-License-Identifier: Apache-2.0
"""How a sentence encoder makes one vector of a text, read from the files that sentence-transformers keeps beside a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError

_OLD_NAMES = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}  # fmt: skip


def sentence_layout(read: Callable[[str], Any]) -> dict[str, Any] | None:
    """`{"pooling": name, "normalize": bool, "max_length": int or None, "other": [layer, ...]}`, None for any other model.

    `read` gives the parsed JSON of a file of the model by its name, None where there is none. `pooling` is the name that
    sentence-transformers gives it (several are joined by +), `other` the layers that are neither model, pooling nor
    normalisation. Raises UsageError for files that hold something else.
    """
    modules = read("modules.json")
    if modules is None:
        return None
    try:
        kinds = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
        pools = [read(f"{path}/config.json") or {} for kind, path in kinds if kind == "Pooling"]
        limits = read("sentence_bert_config.json") or {}
        longest = limits.get("max_seq_length")
        return {
            "pooling": "+".join(n for p in pools for n in _pooling(p)) or "none",
            "normalize": any(kind == "Normalize" for kind, _ in kinds),
            "max_length": None if longest is None else int(longest),
            "other": [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"its sentence-transformers files cannot be read ({error!r})", where="modules.json") from None


def _pooling(config: dict[str, Any]) -> list[str]:
    if "pooling_mode" in config:
        found = config["pooling_mode"]
        return [str(found)] if isinstance(found, str) else [str(f) for f in found]
    return [name for key, name in _OLD_NAMES.items() if config.get(key)]


def folder_reader(folder: Path) -> Callable[[str], Any]:
    """Reads JSON files of a model's folder."""

    def read(name: str) -> Any:
        path = folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"cannot be read ({error})", where=str(path)) from None

    return read


def hub_reader(repository: str, offline: bool) -> Callable[[str], Any]:
    """Reads JSON files of a model on the hub; one that is not there, or cannot be reached, is None. `offline`: look in the cache only."""

    def read(name: str) -> Any:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        try:
            path = hf_hub_download(repository, name, local_files_only=offline)
        except (EntryNotFoundError, HfHubHTTPError, OSError):
            return None
        return folder_reader(Path(path).parent)(Path(name).name)

    return read
