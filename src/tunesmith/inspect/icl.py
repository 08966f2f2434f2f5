# SPDX-License-Identifier: Apache-2.0
"""Does a prompt with demonstrations do to a model what training on them does?

Of the same queries answered with nothing (zsl), with demonstrations in the prompt (icl) and by a delta without them (ft):

    Rec2FTP = |wrong in zsl, right in ft and in icl| / |wrong in zsl, right in ft|
    SimAOU  = cos(n(h_icl) - n(h_zsl), n(h_ft) - n(h_zsl))        n(h) = h / ||h||, per layer, mean over queries
    SimAM   = cos(a_icl, a_ft)                                    attention weights on the query's own tokens
    Kendall, recall: order and top k of the attention paid to demonstrations against that of ft-queries to training tokens

h [n, d] is an attention module's (or block's) output at the last position. Hidden states share a large common component,
hence the subtraction after normalising. A positive cosine is not equality: magnitudes and controls (a zero-mean random
direction, training on shuffled labels, demonstrations of another task) belong beside it; the released random baseline is
uniform on (0, 1), which is not centred.

`implicit_update` is the change of a linear attention's weights that demonstrations amount to, `momentum_attention` the
variant that the paper derives.

Dai et al. 2023, arXiv 2212.10559 (formulas from the released analysis code and the card).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import UsageError
from tunesmith.core.probe import Finding
from tunesmith.inspect.readout import block_states


def rec2ftp(zsl: Sequence[bool], icl: Sequence[bool], ft: Sequence[bool]) -> float | None:
    """Of the queries that training mends, the share that demonstrations mend too; None where training mends none.

    Raises UsageError for unequal lengths.
    """
    if not len(zsl) == len(icl) == len(ft):
        raise UsageError(f"{len(zsl)}, {len(icl)} and {len(ft)} answers are not of the same queries", where="rec2ftp")
    mended = [bool(c) for a, b, c in zip(zsl, ft, icl, strict=True) if not a and b]
    return sum(mended) / len(mended) if mended else None


def sim_aou(zsl: Tensor, icl: Tensor, ft: Tensor) -> Tensor:
    """Cosines [...] of the two changes of states [..., d]; 0 where one of them is zero."""
    if not zsl.shape == icl.shape == ft.shape:
        raise UsageError(f"states of shapes {[list(t.shape) for t in (zsl, icl, ft)]} differ", where="sim_aou")
    base, a, b = (F.normalize(h.double(), dim=-1) for h in (zsl, icl, ft))
    return F.cosine_similarity(a - base, b - base, dim=-1, eps=1e-30)


def sim_am(a: Tensor, b: Tensor) -> Tensor:
    """Cosines [...] of attention weights [..., tokens] on the same tokens."""
    if a.shape != b.shape:
        raise UsageError(f"attention of shapes {list(a.shape)} and {list(b.shape)} differ", where="sim_am")
    return F.cosine_similarity(a.double(), b.double(), dim=-1, eps=1e-30)


def agreement(a: Tensor, b: Tensor, top: int = 100) -> dict[str, float]:
    """Kendall's tau of two weightings [tokens], and which share of the `top` tokens of one is in that of the other."""
    if a.shape != b.shape or a.dim() != 1 or not 1 <= top <= len(a):
        raise UsageError(f"weights of shapes {list(a.shape)}, {list(b.shape)} and top {top}", where="agreement")
    tau = float(kendalltau(a.double().numpy(), b.double().numpy()).statistic)
    first, second = (set(t.double().topk(top).indices.tolist()) for t in (a, b))
    return {"kendall": tau, "recall": len(first & second) / top}


def implicit_update(W_V: Tensor, W_K: Tensor, X: Tensor) -> Tensor:
    """sum_i (W_V x_i)(W_K x_i)^T [d_v, d_k] of demonstrations X [n, d], for attention without softmax and scale."""
    return (X @ W_V.T).T @ (X @ W_K.T)


def momentum_attention(q: Tensor, K: Tensor, V: Tensor, eta: float) -> Tensor:
    """Causal attention plus a decaying sum of earlier values: Attn(V, K, q_t) + sum_{i<t} eta^(t-i) v_i.

    q and K [..., T, d_k], V [..., T, d_v]. Raises UsageError for an eta outside 0..1.
    """
    if not 0 <= eta < 1:
        raise UsageError(f"eta must lie in 0..1, got {eta}", where="momentum_attention")
    out = F.scaled_dot_product_attention(q, K, V, is_causal=True)
    t = torch.arange(q.shape[-2], device=q.device)
    gap = (t[:, None] - t[None]).to(V.dtype)
    decay = torch.where(gap > 0, torch.as_tensor(eta, dtype=V.dtype, device=V.device) ** gap.clamp_min(0), 0.0)
    return out + decay @ V


def compare(
    zsl: Mapping[str, Tensor], icl: Mapping[str, Tensor], ft: Mapping[str, Tensor],
    right: Mapping[str, Sequence[bool]] | None = None, *, controls: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> Finding:  # fmt: skip
    """SimAOU of every layer with its baselines, and Rec2FTP.

    Args:
        zsl, icl, ft: states [n, d] by layer of the same queries.
        right: "zsl", "icl" and "ft": whether each query was answered rightly.
        controls: states by layer of other deltas or prompts, to stand in ft's place.
    Raises UsageError for other layers or shapes.
    """
    if not zsl or not zsl.keys() == icl.keys() == ft.keys():
        raise UsageError("the three sets of states are of different layers", where="icl")
    g, rows = torch.Generator().manual_seed(seed), []
    for layer, h in zsl.items():
        size = (F.normalize(ft[layer].double(), dim=-1) - F.normalize(h.double(), dim=-1)).norm(dim=-1)
        moved = (F.normalize(icl[layer].double(), dim=-1) - F.normalize(h.double(), dim=-1)).norm(dim=-1)
        noise = torch.randn(h.shape, generator=g, dtype=torch.float64).to(
            h.device
        )  # zero mean, unlike the released one
        direction = F.normalize(icl[layer].double(), dim=-1) - F.normalize(h.double(), dim=-1)
        row: dict[str, Any] = {
            "layer": layer, "sim": float(sim_aou(h, icl[layer], ft[layer]).mean()),
            "random": float(F.cosine_similarity(direction, noise, dim=-1, eps=1e-30).mean()),
            "moved_icl": float(moved.mean()), "moved_ft": float(size.mean()),
        }  # fmt: skip
        row |= {name: float(sim_aou(h, icl[layer], other[layer]).mean()) for name, other in (controls or {}).items()}
        rows.append(row)
    names = ["sim", "random", *(controls or {})]
    values: dict[str, Any] = {name: sum(r[name] for r in rows) / len(rows) for name in names}
    if right is not None:
        values["rec2ftp"] = rec2ftp(right["zsl"], right["icl"], right["ft"])
        wrong = [c for a, c in zip(right["zsl"], right["icl"], strict=True) if not a]
        values["icl_on_wrong"] = sum(wrong) / len(wrong) if wrong else None  # what Rec2FTP would be by chance
    told = (
        f"The prompt moves states as training does with a cosine of {values['sim']:.3f} (random {values['random']:.3f})"
    )
    return Finding("icl", told, values, rows)


def icl(
    base: Base, delta: Delta | View, queries: Iterable[Any], demonstrated: Iterable[Any],
    run: Callable[[Base, Any], Any], position: Callable[[Any], Tensor] | None = None, *, each: str = "attentions",
    controls: Mapping[str, Delta | View] | None = None, right: Mapping[str, Sequence[bool]] | None = None,
) -> Finding:  # fmt: skip
    """`compare` for a delta: batches of bare queries, and the same queries in the same order with demonstrations."""
    bare = list(queries)
    zsl, shown = (block_states(base, some, run, position, each=each) for some in (bare, list(demonstrated)))

    def under(d: Delta | View) -> dict[str, Tensor]:
        with base.using(d):
            return block_states(base, bare, run, position, each=each)

    return compare(zsl, shown, under(delta), right, controls={name: under(d) for name, d in (controls or {}).items()})
