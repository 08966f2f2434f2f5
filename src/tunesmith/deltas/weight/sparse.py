# SPDX-License-Identifier: Apache-2.0
"""The sparse store: a few trained entries of each weight, how they are chosen from scores, and how the choice changes.

A site holds `indices` [k] int64 (flat, rising, frozen) and `values` [k] fp32 (trained); optimiser state exists for the
values alone. A selector is a score for every entry; the largest win, ties going to the lower index. Beside them there
may be, all frozen:

    origin [k] fp32                              what the entries were in the base: `values` are then the entries themselves
    settled_indices, settled_values [l]          entries that train no more, rising, and the change each has learnt
    bias_indices, bias_values, bias_...          the same for the bias [out]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.algebra import Sparse, Update
from tunesmith.core.errors import UsageError
from tunesmith.core.sites import Site
from tunesmith.deltas.weight.difference import added

BIAS = "bias_"


def lora_equivalent(site: Site, rank: int) -> int:
    """The entries that a LoRA of `rank` would train at this site, at most all: min(rank (out + in), out in)."""
    rows, columns = site.shape[0], math.prod(site.shape[1:])
    return min(rank * (rows + columns), rows * columns)


def top(scores: Tensor, k: int) -> Tensor:
    """Flat indices [k] int64, rising, of the k largest scores; ties go to the lower index.

    Raises UsageError unless 1 <= k <= the number of scores, or for a score that is NaN.
    """
    flat = scores.detach().reshape(-1).float()
    if not 1 <= k <= flat.numel():
        raise UsageError(f"cannot choose {k} of {flat.numel()} entries")
    if bool(torch.isnan(flat).any()):
        raise UsageError("a score is not a number, so the entries cannot be ranked")
    least = torch.kthvalue(flat, flat.numel() - k + 1).values
    above = torch.nonzero(flat > least).squeeze(1)
    level = torch.nonzero(flat == least).squeeze(1)[: k - len(above)]
    return torch.cat([above, level]).sort().values


def top_of_all(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k largest scores over all sites together, as flat indices by path; a site without one is left out."""
    sizes = {path: s.numel() for path, s in scores.items()}
    chosen = top(torch.cat([s.detach().reshape(-1).float() for s in scores.values()]), k)
    out, start = {}, 0
    for path, n in sizes.items():
        mine = chosen[(chosen >= start) & (chosen < start + n)] - start
        if len(mine):
            out[path] = mine
        start += n
    return out


def drawn(site: Site, k: int, generator: torch.Generator) -> Tensor:
    """k entries of the site's weight drawn at random, all sets alike, as flat indices, rising."""
    return draw(math.prod(site.shape), k, generator)


def draw(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k of the numbers 0 .. n - 1 drawn at random, all sets alike, int64, rising. Memory goes by k where k is small.

    Raises UsageError for more than there are.
    """
    if not 0 <= k <= n:
        raise UsageError(f"cannot choose {k} of {n} entries")
    if 4 * k > n:
        return torch.randperm(n, generator=generator)[:k].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < k:
        found = torch.unique(torch.cat([found, torch.randint(n, (k + 8,), generator=generator)]))
    return found[torch.randperm(len(found), generator=generator)[:k]].sort().values


def entries(indices: Tensor) -> dict[str, Tensor]:
    """`indices` [k] and `values` [k], fp32 zeros, so that a fresh change is none."""
    return {"indices": indices.to(torch.int64), "values": torch.zeros(len(indices))}


def settling(indices: Tensor) -> dict[str, Tensor]:
    """`entries` with an empty settled store, for a choice that changes in mid-run."""
    return {**entries(indices), **unsettled(indices.device)}


def overwritten(weight: Tensor, indices: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """A store whose values are the entries themselves: they start as those of `weight`, which `origin` keeps."""
    start = weight.detach().reshape(-1)[indices].float()
    found = {"indices": indices.to(torch.int64), "values": start, "origin": start.clone(), **unsettled(start.device)}
    return {prefix + name: t for name, t in found.items()}


def unsettled(device: torch.device | None = None) -> dict[str, Tensor]:
    """The empty store of entries that train no more."""
    return {
        "settled_indices": torch.empty(0, dtype=torch.int64, device=device),
        "settled_values": torch.empty(0, device=device),
    }


BOOKS = ("indices", "origin", "settled_indices", "settled_values")


def change(site: Site, t: Mapping[str, Tensor], prefix: str = "") -> Sparse:
    """The change of the weight (with `prefix` "bias_" of the bias): of the entries that train and of settled ones."""
    indices, values = t[prefix + "indices"], t[prefix + "values"]
    if prefix + "origin" in t:
        values = values - t[prefix + "origin"]
    if prefix + "settled_values" in t and len(t[prefix + "settled_values"]):
        indices = torch.cat([indices, t[prefix + "settled_indices"]])
        values = torch.cat([values, t[prefix + "settled_values"]])
    return Sparse(indices, values, site.shape[:1] if prefix else site.shape)


def changed(site: Site, t: Mapping[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    """`params` plus the changes of weight and bias that the site has a store for."""
    return added(params, {n: u.dense() for n, u in differences(site, t).items()})


def differences(site: Site, t: Mapping[str, Tensor]) -> dict[str, Update]:
    """The changes of weight and bias that the site has a store for."""
    stores = {"weight": "", "bias": BIAS}
    return {n: change(site, t, p) for n, p in stores.items() if p + "values" in t}


def beside(site: Site, t: Mapping[str, Tensor], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """The site's output plus that of the changes, with no new weight; for linear, embedding and convolution."""
    y = call(x)
    if "values" in t:
        y = y + change(site, t).apply(x, site).to(y.dtype)
    if BIAS + "values" in t and site.has_bias:
        b = change(site, t, BIAS).dense().to(y.dtype)  # [out]
        y = y + b.reshape(-1, *[1] * (len(site.shape) - 2))
    return y


def survivors(old: Tensor, new: Tensor) -> Tensor:
    """Where each of the `new` indices [k] was in the rising `old` ones, -1 for a newcomer (see `Now.replace`)."""
    if not len(old):
        return torch.full_like(new, -1)
    at = torch.searchsorted(old, new).clamp_max(len(old) - 1)
    return torch.where(old[at] == new, at, torch.full_like(at, -1))


@torch.no_grad()
def reselect(part: Any, now: Any, path: str, chosen: Tensor) -> None:
    """Make `chosen` [k] int64, rising, the trained entries of a site from here on.

    Survivors keep value and moments. One that leaves is settled with what it has learnt; one that comes back goes on from
    there, a new one starts at zero, both without moments. For stores without `origin`.
    """
    t = part.tensors(path)
    old, values = t["indices"], t["values"]
    keep = survivors(old, chosen)
    learnt = _at(t["settled_values"], survivors(t["settled_indices"], chosen))
    new = torch.where(keep < 0, learnt, _at(values, keep))
    _settle(part, now, path, survivors(chosen, old) < 0, values, back=chosen)
    now.replace(path, "values", new, keep=keep)
    now.replace(path, "indices", chosen)


@torch.no_grad()
def settle(part: Any, now: Any, path: str, leaving: Tensor, prefix: str = "") -> None:
    """Let the trained entries where `leaving` [k] stop training: they keep the change they have learnt.

    The others keep value and moments.
    """
    if not bool(leaving.any()):
        return
    t = part.tensors(path)
    stay = torch.nonzero(~leaving).squeeze(1)
    learnt = t[prefix + "values"] - t[prefix + "origin"] if prefix + "origin" in t else t[prefix + "values"]
    _settle(part, now, path, leaving, learnt, prefix)
    for name in ("values", "indices", "origin"):
        if prefix + name in t:
            now.replace(path, prefix + name, t[prefix + name][stay].clone(), keep=stay)


def _settle(
    part: Any, now: Any, path: str, leaving: Tensor, learnt: Tensor, prefix: str = "", back: Tensor | None = None
) -> None:
    """Add the leaving entries that have changed to the settled ones, and take those of `back` out."""
    t = part.tensors(path)
    places, values = t[prefix + "settled_indices"], t[prefix + "settled_values"]
    if back is not None:
        stays = survivors(back, places) < 0
        places, values = places[stays], values[stays]
    leaving = leaving & (learnt != 0)
    places, order = torch.cat([places, t[prefix + "indices"][leaving]]).sort()
    now.replace(path, prefix + "settled_indices", places)
    now.replace(path, prefix + "settled_values", torch.cat([values, learnt[leaving]])[order].detach())


def _at(values: Tensor, at: Tensor) -> Tensor:
    """values[at], 0 where at is -1."""
    if not len(values):
        return torch.zeros(len(at), device=values.device)
    return torch.where(at < 0, torch.zeros((), device=values.device), values[at.clamp_min(0)])
