# SPDX-License-Identifier: Apache-2.0
"""What a base is, so that a delta can be refused on another one: config, shapes and sampled weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.delta import tensor_bytes
from tunesmith.core.errors import BaseMismatch, DeltaError

SAMPLES = 64
_IGNORED_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_commit_hash")


@dataclass(frozen=True)
class Fingerprint:
    """`tensors` maps a tensor's name to shape, dtype and a hash of 64 evenly spaced values.

    The sampled values are rounded to bfloat16 first, so one model loaded in fp32 and bf16 is one base; its dtype is
    recorded beside it. Quantised integer tensors are hashed as they are.
    """

    name: str
    config: str
    dtype: str
    quantisation: str
    tensors: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def short(self) -> str:
        return self.digest[:12]

    @cached_property
    def digest(self) -> str:
        body = json.dumps(
            [self.config, self.quantisation, sorted((k, list(v[0]), v[1]) for k, v in self.tensors.items())]
        )
        return hashlib.sha256(body.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        tensors = {k: [list(shape), h] for k, (shape, h) in self.tensors.items()}
        return {
            "name": self.name, "digest": self.digest, "config": self.config, "dtype": self.dtype,
            "quantisation": self.quantisation, "tensors": tensors,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_dict` wrote. Raises DeltaError when a field is missing or ill-typed."""
        try:
            tensors = {str(k): (tuple(int(n) for n in s), str(h)) for k, (s, h) in d["tensors"].items()}
            return cls(str(d["name"]), str(d["config"]), str(d["dtype"]), str(d["quantisation"]), tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DeltaError(f"the base fingerprint in the delta is damaged ({e})") from None

    def differences(self, other: Fingerprint) -> list[str]:
        """What `other` (the delta's base) has otherwise than this base, one line each, most telling first."""
        mine, theirs = self.tensors, other.tensors
        out = [f"{n}: missing here" for n in theirs if n not in mine]
        out += [f"{n}: only here" for n in mine if n not in theirs]
        both = [n for n in theirs if n in mine]
        out += [
            f"{n}: shape {list(theirs[n][0])} there, {list(mine[n][0])} here"
            for n in both
            if theirs[n][0] != mine[n][0]
        ]
        out += [f"{n}: other values" for n in both if theirs[n][0] == mine[n][0] and theirs[n][1] != mine[n][1]]
        if not out and self.quantisation != other.quantisation:
            out.append(f"quantisation: {other.quantisation or 'none'} there, {self.quantisation or 'none'} here")
        if not out and self.config != other.config:
            out.append("config: other settings with the same weights")
        return out

    def require_same(self, made_for: Mapping[str, Any], what: str) -> None:
        """Raise BaseMismatch naming the differing tensors unless `made_for` is this base."""
        if made_for.get("digest") == self.digest:
            return
        other = Fingerprint.from_dict(made_for)
        diff = self.differences(other)
        if not diff:
            return
        shown = "\n    ".join(diff[:5]) + (f"\n    ... and {len(diff) - 5} more" if len(diff) > 5 else "")
        raise BaseMismatch(
            f"delta {what!r} was made for {other.name!r} ({other.digest[:12]}), not for {self.name!r} ({self.short})",
            hint=f"{len(diff)} differences:\n    {shown}",
        )


def sample(t: Tensor) -> str:
    """A hash of 64 evenly spaced values of a tensor."""
    flat = t.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16)
    return hashlib.sha256(tensor_bytes(flat)).hexdigest()[:16]


def settings(model: nn.Module) -> tuple[str, str]:
    """A hash of the configuration without names and versions, and what it says of quantisation."""
    config: Any = getattr(model, "config", None)
    as_dict = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    kept = {k: v for k, v in as_dict.items() if k not in _IGNORED_CONFIG and not k.startswith("_")}
    quantised = json.dumps(kept.pop("quantization_config", ""), sort_keys=True, default=str).strip('"')
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16], quantised


def fingerprint(model: nn.Module, name: str) -> Fingerprint:
    """The fingerprint of a model: all parameters and persistent buffers."""
    config, quantised = settings(model)
    tensors = {n: (tuple(t.shape), sample(t)) for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    dtype = str(next((p.dtype for p in model.parameters() if p.is_floating_point()), "none")).removeprefix("torch.")
    return Fingerprint(name, config, dtype, quantised, tensors)


def weights_digest(model: nn.Module) -> str:
    """sha256 over every byte of every parameter and buffer, for the proof of undo."""
    h = hashlib.sha256()
    for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        h.update(n.encode())
        flat = t.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()
