# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters as deltas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError, nearest
from tunesmith.export.peft import prompts, structured, weights
from tunesmith.export.peft.layout import Adapter, Piece, make_part, open_folder

READERS: dict[str, Callable[[Adapter], list[Piece]]] = {
    "LORA": weights.read_lora,
    "ADALORA": weights.read_adalora,
    "LOHA": structured.read_loha,
    "LOKR": structured.read_lokr,
    "VERA": structured.read_vera,
    "FOURIERFT": structured.read_fourierft,
    "HIRA": structured.read_hira,
    "MISS": structured.read_miss,
    "OFT": structured.read_oft,
    "BOFT": structured.read_boft,
    "IA3": weights.read_ia3,
    "SHIRA": weights.read_shira,
    "LN_TUNING": weights.read_ln_tuning,
    "TRAINABLE_TOKENS": weights.read_trainable_tokens,
    "PROMPT_TUNING": prompts.read_prompt,
    "P_TUNING": prompts.read_prompt,
    "PREFIX_TUNING": prompts.read_prefix,
}


def read_peft(folder: str | Path, base: Base, name: str | None = None) -> Delta:
    """The delta with the outputs of a PEFT adapter on `base`.

    Biases and whole modules that the adapter carries (`bias`, `modules_to_save`) become parts of their own. Raises
    DeltaError for a folder that is no adapter or is damaged, UsageError for a type, setting or tensor that cannot be
    represented, BaseMismatch for layers the base does not have.
    """
    adapter = open_folder(folder, base)
    kind = adapter.option("peft_type", "")
    if kind not in READERS:
        hint = nearest(str(kind), READERS)
        raise UsageError(f"adapters of type {kind!r} cannot be read", where=adapter.where, hint=hint)
    pieces = READERS[kind](adapter)
    pieces += weights.read_rows(adapter)
    pieces += weights.read_biases(adapter)
    pieces += weights.read_modules(adapter)
    adapter.finish()
    parts = [make_part(base, p) for p in pieces if p.tensors]
    if not parts:
        raise UsageError("the adapter holds nothing that acts", where=adapter.where)
    facts = {
        "base": base.fingerprint.to_dict(),
        "imported": {"format": "peft", "type": kind, "version": str(adapter.config.get("peft_version", ""))[:40]},
    }
    return Delta(name or Path(folder).resolve().name, parts, provenance=facts)
