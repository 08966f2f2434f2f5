# SPDX-License-Identifier: Apache-2.0
"""What readers of PEFT adapters share: the folder, its settings, its tensors by module, and how a part is made of them.

Everything in an adapter must be accounted for: a tensor nobody took and a setting nobody understood are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import SHARED, Part
from tunesmith.core.errors import BaseMismatch, DeltaError, UsageError, nearest
from tunesmith.core.header import JSON_LIMIT, strict_json
from tunesmith.core.sites import Site

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that say where the tensors came from or how they were trained, and change no output.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "beta1", "beta2", "boft_block_num", "boft_dropout", "corda_config",
    "d_initial", "decompose_both", "decompose_factor", "deltaT", "encoder_dropout", "encoder_hidden_size",
    "encoder_num_layers", "encoder_reparameterization_type", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "feedforward_modules", "hira_dropout", "inference_mode", "init_ia3_weights", "init_in_layers",
    "init_lora_weights", "init_r", "init_weights", "kasa_config", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "mask_type", "megatron_config", "megatron_core", "miss_dropout",
    "module_dropout", "modules_to_save", "monteclora_config", "n_frequency_pattern", "num_attention_heads",
    "num_layers", "num_transformer_submodules", "num_virtual_tokens", "orth_reg_weight", "peft_type", "peft_version",
    "prefix_projection", "projection_prng_key", "prompt_tuning_init", "prompt_tuning_init_text", "qalora_group_size",
    "random_seed", "rank_dropout", "rank_dropout_scale", "revision", "save_projection", "target_modules", "target_r",
    "task_type", "tfinal", "tinit", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path", "total_step",
    "use_effective_conv2d", "velora_config", "vera_dropout",
}  # fmt: skip


@dataclass
class Adapter:
    """The settings and tensors of a PEFT adapter for one base. `take` and `option` keep count of what was understood."""

    base: Base
    config: Mapping[str, Any]
    tensors: dict[str, Tensor]
    where: str
    understood: set[str] = field(default_factory=set)

    def option(self, name: str, default: Any = None) -> Any:
        """A setting, now accounted for."""
        self.understood.add(name)
        value = self.config.get(name, default)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        """A setting that must be a finite number. Raises DeltaError."""
        value = self.option(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or abs(value) == float("inf")
        ):
            raise DeltaError(f"{name} must be a number, got {value!r}", where=self.where)
        return value

    def pattern(self, name: str, path: str, default: float) -> float:
        """The value at a module of a table such as `rank_pattern`, whose keys are patterns of the end of a path."""
        table = self.option(name, {})
        for key, value in table.items() if isinstance(table, dict) else ():
            try:
                found = re.match(rf"(.*\.)?({key})$", path)
            except re.error:
                raise DeltaError(f"{name} holds {key!r}, which is no pattern", where=self.where) from None
            if found and isinstance(value, int | float) and not isinstance(value, bool):
                return value
        return default

    def by_path(self, *suffixes: str) -> dict[str, dict[str, Tensor]]:
        """{path: {suffix: tensor}} of the keys `base_model.model.PATH.SUFFIX`; they are taken out."""
        out: dict[str, dict[str, Tensor]] = {}
        for key in list(self.tensors):
            for suffix in suffixes:
                if key.startswith(PREFIX) and key.endswith("." + suffix):
                    path = key[len(PREFIX) : -len(suffix) - 1]
                    out.setdefault(path, {})[suffix] = self.tensors.pop(key)
                    break
        return out

    def site(self, path: str, kinds: Iterable[str] | None = None) -> Site:
        """The site at a path of the adapter, of one of `kinds`. Raises BaseMismatch, UsageError."""
        found = [s for s in self.base.sites.all() if s.path == path and (kinds is None or s.kind in kinds)]
        if found:
            return found[0]
        here = [s for s in self.base.sites.all() if s.path == path]
        if here:
            raise UsageError(f"is a {here[0].kind}, which the method cannot attach to here", where=path)
        raise BaseMismatch("the base has no such layer", where=path, hint=nearest(path, list(self.base.sites)))

    def finish(self) -> None:
        """Raise UsageError naming settings and tensors that no reader understood."""
        for name, value in self.config.items():
            empty = value in (None, False, 0, "none", "") or value == {} or value == []
            if name not in self.understood and name not in HARMLESS and not empty:
                hint = "merge the adapter with PEFT and load the merged model as a base"
                raise UsageError(f"the setting {name}={value!r:.60} cannot be represented", where=self.where, hint=hint)
        if self.tensors:
            shown = ", ".join(sorted(self.tensors)[:3])
            raise UsageError(f"{len(self.tensors)} tensors cannot be represented: {shown}", where=self.where)


@dataclass
class Piece:
    """One part to be: a method and its tensors by path (`""` holds shared ones)."""

    method: Any
    tensors: dict[str, dict[str, Tensor]]
    name: str = ""
    tied: str = "untie"


def open_folder(folder: str | Path, base: Base) -> Adapter:
    """Read an adapter's folder. Raises DeltaError for one that is none, damaged, or holds a pickle instead of tensors."""
    place = Path(folder)
    config, tensors = place / CONFIG, place / TENSORS
    if not config.is_file():
        raise DeltaError(f"there is no {CONFIG}", where=str(place), hint="give the folder that PEFT saved")
    if not tensors.is_file():
        pickled = (place / "adapter_model.bin").exists()
        hint = "save it again with safe_serialization=True; pickle files are never read" if pickled else None
        raise DeltaError(f"there is no {TENSORS}", where=str(place), hint=hint)
    if config.stat().st_size > JSON_LIMIT:
        raise DeltaError(f"{CONFIG} is too large", where=str(place))
    settings = strict_json(config.read_bytes(), str(config))
    found: dict[str, Tensor] = {}
    try:
        with safe_open(str(tensors), framework="pt", device="cpu") as f:
            for key in f.keys():  # noqa: SIM118 (a reader, not a mapping)
                found[key] = f.get_tensor(key)
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise DeltaError(f"the tensors cannot be read ({e})", where=str(tensors)) from None
    for key, t in found.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise DeltaError(f"the tensor {key!r} holds values that are not finite", where=str(tensors))
    return Adapter(base, settings, {k: t.float() if t.is_floating_point() else t for k, t in found.items()}, str(place))


def need(tensors: Mapping[str, Tensor], name: str, path: str) -> Tensor:
    """A tensor of a module. Raises DeltaError where it is missing."""
    if name not in tensors:
        raise DeltaError(f"the tensor {name!r} is missing", where=path, hint=f"there are: {sorted(tensors)}")
    return tensors[name]


def make_part(base: Base, piece: Piece) -> Part:
    """A part of the tensors of a piece. Raises DeltaError for names or shapes that the method does not make here."""
    method = piece.method
    info = method.info
    of_model = "model" in info.kinds  # its path is that of shared tensors
    sites = {p: _site_of(base, p, info.kinds) for p in piece.tensors if p != SHARED or of_model}
    frozen = {n for hook in ("frozen", "books") if hasattr(method, hook) for n in getattr(method, hook)()}
    part = Part(method, [(s.path, s.kind) for s in sites.values()], name=piece.name or info.name, tied=piece.tied)
    if piece.tied == "both":
        part.alias = {other: p for p, s in sites.items() for other in s.tied if other not in sites}
    for path, tensors in piece.tensors.items():
        if path in sites:
            why = method.fits(sites[path]) if hasattr(method, "fits") else None
            if why:
                raise UsageError(f"{info.name} cannot attach: {why}", where=path)
            _check_shapes(method.init(sites[path], torch.Generator().manual_seed(0)), tensors, path)
        for name, value in tensors.items():
            part.put(path, name, value.detach().clone().to(base.device), trainable=name not in frozen)
    return part


def _site_of(base: Base, path: str, kinds: tuple[str, ...]) -> Site:
    found = [s for s in base.sites.all() if s.path == path and s.kind in kinds]
    if not found:
        raise BaseMismatch(f"the base has no {' or '.join(kinds)} there", where=path or "model",
                           hint=nearest(path, list(base.sites)))  # fmt: skip
    return found[0]


def _check_shapes(fresh: Mapping[str, Tensor], given: Mapping[str, Tensor], path: str) -> None:
    for name in fresh:
        if name not in given:
            raise DeltaError(f"the tensor {name!r} is missing", where=path)
    for name, value in given.items():
        if name not in fresh or fresh[name].shape != value.shape:
            want = tuple(fresh[name].shape) if name in fresh else "none"
            raise DeltaError(f"the tensor {name!r} has shape {tuple(value.shape)}, {want} fits this base", where=path)
