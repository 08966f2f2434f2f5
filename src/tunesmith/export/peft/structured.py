# SPDX-License-Identifier: Apache-2.0
"""Readers of LoHa, LoKr, VeRA, FourierFT, HiRA, MiSS, OFT and BOFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core import method as methods
from tunesmith.core.delta import SHARED
from tunesmith.core.errors import DeltaError, UsageError
from tunesmith.core.patterns import common, targets_of
from tunesmith.export.peft.layout import Adapter, Piece, need

# Our name of a tensor -> PEFT's.
LOHA = {
    "B_1": "hada_w1_a",
    "A_1": "hada_w1_b",
    "T_1": "hada_t1",
    "B_2": "hada_w2_a",
    "A_2": "hada_w2_b",
    "T_2": "hada_t2",
}
LOKR = {
    "C": "lokr_w1", "C_1": "lokr_w1_a", "C_2": "lokr_w1_b", "D": "lokr_w2", "D_1": "lokr_w2_a", "D_2": "lokr_w2_b",
    "T": "lokr_t2",
}  # fmt: skip
VERA = {"b": "vera_lambda_b", "d": "vera_lambda_d"}


def _renamed(t: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {ours: t[theirs] for ours, theirs in names.items() if theirs in t}


def _made(
    a: Adapter, name: str, tensors: dict[str, dict[str, Tensor]], ranks: dict[str, float], **options: Any
) -> Piece:
    """A piece of method `name` with its targets and, where ranks differ, their pattern."""
    r, pattern = common(ranks, 8)
    targets = targets_of(a.base, [p for p in tensors if p != SHARED], methods.get(name).kinds)
    options = {"rank": int(r), "rank_pattern": {p: int(v) for p, v in pattern.items()}, "targets": targets, **options}
    return Piece(methods.build(name, options), tensors)


def _alphas(a: Adapter, paths: Any) -> tuple[float, dict[str, float]]:
    alpha = a.number("alpha", 8)
    return common({p: float(a.pattern("alpha_pattern", p, alpha)) for p in paths}, alpha)


def _ranks(a: Adapter, paths: Any) -> dict[str, float]:
    r = a.number("r", 8)
    return {p: int(a.pattern("rank_pattern", p, r)) for p in paths}


def read_loha(a: Adapter) -> list[Piece]:
    """LoHa, flat or with kernel axes of its own."""
    tensors = {}
    for path, t in a.by_path(*LOHA.values()).items():
        mine = _renamed(t, LOHA)
        if "T_1" in mine:  # [r, out] there, [out, r] here; a conv1d's core has one axis too many
            kernel = a.site(path).shape[2:]
            mine |= {f"B_{i}": mine[f"B_{i}"].T.contiguous() for i in (1, 2)}
            mine |= {f"T_{i}": mine[f"T_{i}"].reshape(*mine[f"T_{i}"].shape[:2], *kernel) for i in (1, 2)}
        tensors[path] = mine
    alpha, pattern = _alphas(a, tensors)
    tucker = any("T_1" in t for t in tensors.values())
    return [_made(a, "loha", tensors, _ranks(a, tensors), alpha=float(alpha), alpha_pattern=pattern, tucker=tucker)]


def read_lokr(a: Adapter) -> list[Piece]:
    """LoKr in all forms of its two factors."""
    tensors = {}
    for path, t in a.by_path(*LOKR.values()).items():
        mine = _renamed(t, LOKR)
        if "D" in mine:
            mine["D"] = mine["D"].flatten(1)
        if "T" in mine:
            mine["D_1"] = mine["D_1"].T.contiguous()
            mine["T"] = mine["T"].reshape(*mine["T"].shape[:2], *a.site(path).shape[2:])
        tensors[path] = mine
    alpha, pattern = _alphas(a, tensors)
    options = {
        "alpha": float(alpha), "alpha_pattern": pattern, "both": bool(a.option("decompose_both", False)),
        "factor": int(a.number("decompose_factor", -1)), "tucker": any("T" in t for t in tensors.values()),
    }  # fmt: skip
    return [_made(a, "lokr", tensors, _ranks(a, tensors), **options)]


def read_vera(a: Adapter) -> list[Piece]:
    """VeRA. Where the shared pair was not saved it is drawn again from its key, as PEFT does."""
    tensors = {p: _renamed(t, VERA) for p, t in a.by_path(*VERA.values()).items()}
    r = int(a.number("r", 256))
    A, B = (a.tensors.pop(f"base_model.vera_{n}", None) for n in "AB")
    if A is None or B is None:
        sites = [a.site(p) for p in tensors]
        g = torch.Generator().manual_seed(int(a.number("projection_prng_key", 0)))
        A, B = torch.empty(r, max(s.shape[1] for s in sites)), torch.empty(max(s.shape[0] for s in sites), r)
        for M in (A, B):  # Kaiming uniform with gain sqrt 2
            M.uniform_(-math.sqrt(6 / M.shape[1]), math.sqrt(6 / M.shape[1]), generator=g)
    for path in tensors:
        rows, width = a.site(path).shape[:2]
        if B.shape[0] < rows or A.shape[1] < width or A.shape[0] != r or B.shape[1] != r:
            raise DeltaError(f"the shared pair {tuple(B.shape)}, {tuple(A.shape)} is too small", where=path)
    targets = targets_of(a.base, tensors, methods.get("vera").kinds)
    return [Piece(methods.build("vera", {"rank": r, "targets": targets}), {SHARED: {"A": A, "B": B}, **tensors})]


def read_fourierft(a: Adapter) -> list[Piece]:
    """FourierFT; the places are drawn again from their seed."""
    a.option("n_frequency_pattern")
    scale, seed = a.number("scaling", 150.0), int(a.number("random_loc_seed", 777))
    found = a.by_path("fourierft_spectrum")
    n = {len(t["fourierft_spectrum"]) for t in found.values()}
    if len(n) > 1:
        raise UsageError("layers with different numbers of frequencies cannot be represented", where=a.where)
    a.option("n_frequency")
    tensors = {}
    for path, t in found.items():
        c, size = t["fourierft_spectrum"], math.prod(a.site(path, ("linear",)).shape)
        at = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: len(c)]
        tensors[path] = {"c": c, "at": at}
    options = {
        "n": max(n, default=1),
        "scale": float(scale),
        "places": seed,
        "targets": targets_of(a.base, tensors, ("linear",)),
    }
    return [Piece(methods.build("fourierft", options), tensors)]


def read_hira(a: Adapter) -> list[Piece]:
    """HiRA on linear, convolution and embedding weights."""
    tensors = {}
    for path, t in a.by_path("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B").items():
        if "hira_embedding_A" in t:
            B, A = t["hira_embedding_A"].T, need(t, "hira_embedding_B", path).T
        else:
            B, A = need(t, "hira_B", path).flatten(1), need(t, "hira_A", path).flatten(1)
        tensors[path] = {"A": A.contiguous(), "B": B.contiguous()}
    a.option("r"), a.option("rank_pattern")
    return [_made(a, "hira", tensors, {p: len(t["A"]) for p, t in tensors.items()})]


def read_miss(a: Adapter) -> list[Piece]:
    """MiSS: tile, mini, or block affine (which is Bone)."""
    found, mode = a.by_path("miss_block"), a.option("init_weights", True)
    r = int(a.number("r", 64))
    mini = int(a.number("mini_r", 1))
    tensors = {p: {"M" if mode == "bat" else "B": t["miss_block"]} for p, t in found.items()}
    if mode == "bat":
        options = {"block": r, "targets": targets_of(a.base, tensors, methods.get("bone").kinds)}
        return [Piece(methods.build("bone", options), tensors)]
    shape = {"mode": "mini", "mini_rank": mini} if mode == "mini" else {"mode": "tile"}
    return [_made(a, "miss", tensors, {p: float(r) for p in tensors}, **shape)]


def read_oft(a: Adapter) -> list[Piece]:
    """OFT, exact or by the series; one block size for all layers.

    Convolutions are refused: unmerged, PEFT rotates their overlapping patches and folds them again, which is not what it
    merges and no change of the kernel.
    """
    found = a.by_path("oft_R.weight")
    for path in found:
        if a.site(path).kind != "linear":
            hint = "merge it with PEFT and load the merged model as a base"
            raise UsageError("OFT on a convolution cannot be represented as PEFT runs it", where=path, hint=hint)
    tensors = {p: {"q": t["oft_R.weight"]} for p, t in found.items()}
    a.option("r"), a.option("oft_block_size")
    sides = {p: _side(t["q"].shape[1]) for p, t in tensors.items()}
    if len(set(sides.values())) > 1:
        raise UsageError(f"blocks of several sizes cannot be represented: {sorted(set(sides.values()))}", where=a.where)
    terms = int(a.number("num_cayley_neumann_terms", 5))
    options = {
        "block": next(iter(sides.values()), 32), "block_share": bool(a.option("block_share", False)),
        "coft": bool(a.option("coft", False)), "eps": float(a.number("eps", 6e-5)),
        "neumann_terms": terms if a.option("use_cayley_neumann", True) else 0,
        "targets": targets_of(a.base, tensors, methods.get("oft").kinds),
    }  # fmt: skip
    a.option("use_cayley_neumann")
    return [Piece(methods.build("oft", options), tensors)]


def _side(n: int) -> int:
    """k of k (k - 1) / 2 = n."""
    return round((1 + math.sqrt(1 + 8 * n)) / 2)


def read_boft(a: Adapter) -> list[Piece]:
    """BOFT; PEFT numbers the factors from 0 for one."""
    tensors = {p: {"D": need(t, "boft_R", p), "s": need(t, "boft_s", p).flatten()}
               for p, t in a.by_path("boft_R", "boft_s").items()}  # fmt: skip
    a.option("boft_block_size"), a.option("boft_block_num"), a.option("boft_n_butterfly_factor")
    sizes = {tuple(t["D"].shape[:1]) + tuple(t["D"].shape[2:3]) for t in tensors.values()}
    if len(sizes) > 1:
        raise UsageError("blocks of several sizes cannot be represented", where=a.where)
    factors, block = next(iter(sizes), (1, 4))
    options = {"block": block, "factors": factors, "targets": targets_of(a.base, tensors, methods.get("boft").kinds)}
    return [Piece(methods.build("boft", options), tensors)]
