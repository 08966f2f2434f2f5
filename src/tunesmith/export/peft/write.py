# SPDX-License-Identifier: Apache-2.0
"""Deltas as PEFT adapters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import SHARED, Delta, Part
from tunesmith.core.errors import ResourceError, UsageError, nearest
from tunesmith.core.patterns import common, pick
from tunesmith.core.replace import publish, recover, scratch
from tunesmith.core.sites import Site
from tunesmith.export.peft import prompts
from tunesmith.export.peft.layout import CONFIG, PREFIX, TENSORS
from tunesmith.export.peft.structured import LOHA, LOKR, VERA

LAYOUT = "0.21.2"  # the version of PEFT whose layout is written
Written = tuple[dict[str, Any], dict[str, Tensor]]


def _sites(base: Base, part: Part) -> dict[str, Site]:
    return {p: base.sites.of(p, k) for p, k in part.kind_of.items()}


def _factors(site: Site, A: Tensor, B: Tensor, word: str, weight: str) -> dict[str, Tensor]:
    """A [r, n] and B [out, r] under PEFT's names at a site of any kind."""
    at = f"{PREFIX}{site.path}.{word}"
    if site.kind == "embedding":
        return {f"{at}_embedding_A": B.T, f"{at}_embedding_B": A.T}
    ones = (1,) * (len(site.shape) - 2)
    A, B = A.reshape(len(A), *site.shape[1:]), B.reshape(*B.shape, *ones)
    return {f"{at}_A{weight}": A, f"{at}_B{weight}": B}


def _lora(base: Base, part: Part) -> Written:
    """LoRA, DoRA, and starts that are relative: s (B A - B0 A0) as a LoRA of rank 2r."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, float] = {}
    scales: dict[str, float] = {}
    sites = _sites(base, part)
    for path, site in sites.items():
        t = part.tensors(path)
        update = part.method.update(site, t) if hasattr(part.method, "update") else None
        A, B = (t["A"], t["B"]) if update is None else (update.A, update.B)
        if update is None:
            alpha, r = float(pick(part.method.alpha_pattern, path, part.method.alpha)), len(A)
            scales[path] = alpha / math.sqrt(r) if part.method.rslora else alpha / r
        else:
            scales[path] = float(update.scale)
        ranks[path] = A.shape[0]
        tensors |= _factors(site, A, B, "lora", ".weight")
        if "m" in t:
            ones = (1,) * (len(site.shape) - 2)
            m = t["m"] if site.kind == "linear" else t["m"].reshape(1, -1, *ones)
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = m
    r, rank_pattern = common(ranks, 8)
    alphas = {p: scales[p] * ranks[p] for p in ranks}
    alpha, alpha_pattern = common(alphas, 8)
    config = {
        "peft_type": "LORA", "r": int(r), "lora_alpha": alpha, "use_dora": part.info.name == "dora",
        "use_rslora": False, "init_lora_weights": True, "bias": "none", "lora_dropout": 0.0,
        "rank_pattern": {_key(p): int(v) for p, v in rank_pattern.items()},
        "alpha_pattern": {_key(p): v for p, v in alpha_pattern.items()},
    }  # fmt: skip
    return config, tensors


def _key(path: str) -> str:
    return "^" + re.escape(path)


def _renamed(base: Base, part: Part, names: Mapping[str, str], turn: bool = True) -> dict[str, Tensor]:
    out = {}
    for path in part.kind_of:
        t = part.tensors(path)
        core = "T" in t or "T_1" in t
        for ours, theirs in names.items():
            if ours in t:
                value = t[ours]
                if core and ours in ("B_1", "B_2", "D_1"):
                    value = value.T
                if core and ours in ("T", "T_1", "T_2") and value.dim() == 3:
                    value = value[..., None]
                out[f"{PREFIX}{path}.{theirs}"] = value
    return out


def _structured(kind: str, names: Mapping[str, str]) -> Callable[[Base, Part], Written]:
    def write(base: Base, part: Part) -> Written:
        m = part.method
        tensors = _renamed(base, part, names)
        for path, site in _sites(base, part).items():  # a full second factor keeps its kernel axes there
            key = f"{PREFIX}{path}.lokr_w2"
            if key in tensors and len(site.shape) > 2:
                D = tensors[key]
                tensors[key] = D.reshape(len(D), -1, *site.shape[2:])
        config = {
            "peft_type": kind, "r": m.rank, "alpha": m.alpha, "use_effective_conv2d": m.tucker,
            "rank_pattern": {_key(p): v for p, v in _exact(part, m.rank_pattern).items()},
            "alpha_pattern": {_key(p): v for p, v in _exact(part, m.alpha_pattern).items()},
        }  # fmt: skip
        if kind == "LOKR":
            config |= {"decompose_both": m.both, "decompose_factor": m.factor}
        return config, tensors

    return write


def _exact(part: Part, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of patterns written out by path."""
    values = {p: pick(table, p, None) for p in part.kind_of}
    return {p: v for p, v in values.items() if v is not None}


def _vera(base: Base, part: Part) -> Written:
    tensors = _renamed(base, part, VERA)
    shared = part.tensors(next(iter(part.kind_of)))
    tensors |= {f"base_model.vera_{n}": shared[n] for n in "AB"}
    return {"peft_type": "VERA", "r": part.method.rank, "save_projection": True, "d_initial": 0.1}, tensors


def _fourierft(base: Base, part: Part) -> Written:
    m = part.method
    for p, site in _sites(base, part).items():
        if not torch.equal(part.tensors(p)["at"], m.drawn_places(site)):
            hint = "nearest_lora(base, delta, rank) gives the closest LoRA with its error"
            raise UsageError("PEFT draws the places from one seed, and these are others", where=p, hint=hint)
    config = {"peft_type": "FOURIERFT", "n_frequency": m.n, "scaling": m.scale, "random_loc_seed": m.places}
    return config, {f"{PREFIX}{p}.fourierft_spectrum": part.tensors(p)["c"] for p in part.kind_of}


def _hira(base: Base, part: Part) -> Written:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, float] = {}
    for path, site in _sites(base, part).items():
        t = part.tensors(path)
        ranks[path] = len(t["A"])
        tensors |= _factors(site, t["A"], t["B"], "hira", "")
    r, pattern = common(ranks, 32)
    return {"peft_type": "HIRA", "r": int(r), "rank_pattern": {_key(p): int(v) for p, v in pattern.items()}}, tensors


def _miss(base: Base, part: Part) -> Written:
    m = part.method
    if m.rank_pattern:
        raise UsageError("PEFT's MiSS has one rank for all layers", where="rank_pattern")
    config = {
        "peft_type": "MISS",
        "r": m.rank,
        "mini_r": m.mini_rank,
        "init_weights": "mini" if m.mode == "mini" else True,
    }
    return config, {f"{PREFIX}{p}.miss_block": part.tensors(p)["B"] for p in part.kind_of}


def _bone(base: Base, part: Part) -> Written:
    config = {"peft_type": "MISS", "r": part.method.block, "mini_r": 1, "init_weights": "bat"}
    return config, {f"{PREFIX}{p}.miss_block": part.tensors(p)["M"] for p in part.kind_of}


def _oft(base: Base, part: Part) -> Written:
    m = part.method
    config = {
        "peft_type": "OFT", "r": 0, "oft_block_size": m.block, "block_share": m.block_share, "coft": m.coft, "eps": m.eps,
        "use_cayley_neumann": m.neumann_terms > 0, "num_cayley_neumann_terms": m.neumann_terms or 5,
    }  # fmt: skip
    return config, {f"{PREFIX}{p}.oft_R.weight": part.tensors(p)["q"] for p in part.kind_of}


def _boft(base: Base, part: Part) -> Written:
    m = part.method
    config = {
        "peft_type": "BOFT",
        "boft_block_size": m.block,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": m.factors,
    }
    tensors = {}
    for p in part.kind_of:
        t = part.tensors(p)
        tensors |= {f"{PREFIX}{p}.boft_R": t["D"], f"{PREFIX}{p}.boft_s": t["s"][:, None]}
    return config, tensors


def _ia3(base: Base, part: Part) -> Written:
    tensors, feed = {}, []
    for p, site in _sites(base, part).items():
        l = part.tensors(p)["l"]
        on_input = part.method.on_input(site)
        tensors[f"{PREFIX}{p}.ia3_l"] = l[None] if on_input else l[:, None]
        feed += [p] if on_input else []
    return {"peft_type": "IA3", "feedforward_modules": feed}, tensors


def _shira(base: Base, part: Part) -> Written:
    if part.method.rank_pattern:
        raise UsageError("PEFT's SHiRA has one r for all layers", where="rank_pattern")
    tensors = {}
    for p, site in _sites(base, part).items():
        t = part.tensors(p)
        tensors[f"{PREFIX}{p}.shira_weight"] = t["values"]
        at = t["indices"]
        tensors[f"{PREFIX}{p}.shira_indices"] = torch.stack([at // site.shape[1], at % site.shape[1]]).to(torch.int32)
    return {"peft_type": "SHIRA", "r": part.method.rank, "mask_type": "random"}, tensors


def _norms(base: Base, part: Part) -> Written:
    tensors = {}
    for p, site in _sites(base, part).items():
        params = site.params()
        for name, d in part.tensors(p).items():
            tensors[f"{PREFIX}{p}.ln_tuning_layers.{name}"] = params[name].detach().float() + d
    return {"peft_type": "LN_TUNING"}, tensors


def _tokens(base: Base, part: Part) -> Written:
    sites = _sites(base, part)
    if len(sites) != 1:
        raise UsageError("PEFT trains the rows of one embedding", where="targets")
    ((path, site),) = sites.items()
    t = part.tensors(path)
    rows = site.params()["weight"].detach().float()[t["rows"]] + t["d"]
    return {"peft_type": "TRAINABLE_TOKENS", "token_indices": t["rows"].tolist()}, {
        f"{PREFIX}{path}.trainable_tokens_delta": rows
    }


def _prompt(base: Base, part: Part) -> Written:
    return prompts.write_prompt(base, part.tensors(""))


def _prefix(base: Base, part: Part) -> Written:
    return prompts.write_prefix(base, {p: part.tensors(p) for p in part.kind_of})


WRITERS: dict[str, Callable[[Base, Part], Written]] = {
    "lora": _lora,
    "dora": _lora,
    "pissa": _lora,
    "olora": _lora,
    "corda": _lora,
    "eva": _lora,
    "block-lora": _lora,
    "lora-refactor": _lora,
    "loha": _structured("LOHA", LOHA),
    "lokr": _structured("LOKR", LOKR),
    "vera": _vera,
    "fourierft": _fourierft,
    "hira": _hira,
    "miss": _miss,
    "bone": _bone,
    "oft": _oft,
    "boft": _boft,
    "ia3": _ia3,
    "shira": _shira,
    "norm-tuning": _norms,
    "trainable-tokens": _tokens,
    "prompt-tuning": _prompt,
    "prefix-tuning": _prefix,
}
# What PEFT attaches to, where it is less than what the method does here.
LINEAR_ONLY = ("oft", "vera", "fourierft", "miss", "bone", "ia3", "shira")
PROMPTS = ("prompt-tuning", "prefix-tuning")


def write_peft(delta: Delta, base: Base, folder: str | Path, *, part: str | None = None) -> Path:
    """Write one part of a delta as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        part: the part to write, for a delta with several.
    Raises UsageError where PEFT has no form for it (the hint offers a low-rank fit), ResourceError where the folder
    cannot be written.
    """
    chosen = _one(delta, part)
    name = chosen.info.name
    if name not in WRITERS:
        hint = "nearest_lora(base, delta, rank) gives the closest LoRA with its error (on the command line: --fit-rank)"
        raise UsageError(f"PEFT cannot hold {name}", where=delta.name, hint=hint)
    for path, kind in chosen.kind_of.items():
        if name in LINEAR_ONLY and kind != "linear":
            raise UsageError(f"PEFT's {name} attaches to linear layers alone", where=path, hint="use --fit-rank")
    if chosen.alias and name != "trainable-tokens":
        what = f"{', '.join(chosen.alias)} is tied to it and changes too, which PEFT's {name} does not"
        hint = "train with tied='untie', or merge the delta"
        raise UsageError(what, where=", ".join(chosen.alias.values()), hint=hint)
    with torch.no_grad():
        config, tensors = WRITERS[name](base, chosen)
    common_settings = _common_settings(base)
    if name in PROMPTS:
        common_settings["task_type"] = "CAUSAL_LM" if base.family == "causal-lm" else "FEATURE_EXTRACTION"
    else:
        config["target_modules"] = _targets(base, [p for p in chosen.kind_of if p != SHARED])
    save_adapter({**common_settings, **config}, tensors, Path(folder))
    return Path(folder)


def lora_config(base: Base, paths: list[str], rank: int) -> dict[str, Any]:
    """The settings of a LoRA of one rank at these layers, its scale in its tensors."""
    lora = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_dora": False, "use_rslora": False,
        "init_lora_weights": True, "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    return {**_common_settings(base), **lora, "target_modules": _targets(base, paths)}


def _common_settings(base: Base) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base.source.get("path") or base.source.get("name"), "inference_mode": True,
        "task_type": "CAUSAL_LM" if base.family == "causal-lm" else None, "peft_version": LAYOUT, "modules_to_save": None,
    }  # fmt: skip


def _one(delta: Delta, part: str | None) -> Part:
    if part is not None:
        return delta.part(part)
    if len(delta.parts) != 1:
        names = [p.name for p in delta.parts]
        raise UsageError(
            f"a PEFT adapter holds one method, the delta has {len(names)}: {', '.join(names)}", where=delta.name,
            hint=f"choose one with part={nearest('', names) or names[0]!r}; the others must go another way",
        )  # fmt: skip
    return delta.parts[0]


def _targets(base: Base, paths: list[str]) -> list[str] | str:
    """Module names that PEFT matches to exactly these paths: it takes whole names and ends of names."""
    hit = [m for m in base.modules if any(m == p or m.endswith("." + p) for p in paths)]
    return sorted(paths) if sorted(hit) == sorted(paths) else "|".join(re.escape(p) for p in sorted(paths))


OWN = (CONFIG, TENSORS)


def save_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write both files, replacing an older adapter in one step. Raises ResourceError where that cannot be."""
    whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover(folder, OWN)
        with scratch(folder) as fresh:
            (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(whole, fresh / TENSORS, metadata={"format": "pt"})
            publish(fresh, folder, OWN)
    except OSError as e:
        hint = "choose another folder; nothing was written"
        raise ResourceError(f"cannot be written ({e.strerror or e})", where=str(folder), hint=hint) from None


def known() -> list[str]:
    """Names of the registered methods that have a form in PEFT."""
    return [m.name for m in methods.methods() if m.name in WRITERS]
