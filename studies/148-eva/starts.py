# SPDX-License-Identifier: Apache-2.0
"""LoRA from several starts that differ in A only: what the study compares EVA with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.sample import Sample, second_moments
from tunesmith.core.sites import Site
from tunesmith.deltas import EVA, LoRA, PiSSA
from tunesmith.deltas.weight.explained import Found


class Orthogonal(LoRA):
    """LoRA whose A has random orthonormal rows."""

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        t = super().init(site, generator)
        drawn = torch.randn(t["A"].shape[1], len(t["A"]), generator=generator)
        return {**t, "A": torch.linalg.qr(drawn).Q.T.contiguous()}


class Least(EVA):
    """The control: the directions in which inputs vary least, as many for every layer."""

    def directions(
        self, base: Base, sites: list[Site], sample: Sample, rank: Mapping[str, int], most: Mapping[str, int]
    ) -> dict[str, Found]:
        few = replace(sample, batches=lambda: itertools.islice(sample.batches(), self.limit))
        found = {}
        for path, C in second_moments(base, sites, few, scaled=False, supervised=self.labelled).items():
            values, vectors = torch.linalg.eigh(C.double())  # rising
            share = values.clamp_min(0) / values.sum()
            found[path] = Found(vectors.T.float(), values.clamp_min(0).sqrt().float(), share, rank[path])
        return found


def methods(arm: str, rank: int, limit: int) -> list[Any]:
    """The method of an arm at scale 1."""
    same: dict[str, Any] = {"rank": rank, "alpha": float(rank)}
    look: dict[str, Any] = {**same, "limit": limit}
    return {
        "kaiming": [LoRA(**same)],
        "orthogonal": [Orthogonal(**same)],
        "pissa": [PiSSA(**same)],
        "eva rho 1": [EVA(rho=1.0, **look)],
        "eva rho 2": [EVA(rho=2.0, **look)],
        "least variance": [Least(rho=1.0, **look)],
    }[arm]
