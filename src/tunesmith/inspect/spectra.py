# SPDX-License-Identifier: Apache-2.0
"""The singular values of the change, and of the weight before and after it.

    moved      max_i |s_i(W') - s_i(W)| / s_1(W)
    overlap    ||U_k^T U'_k||_F^2 / k          of the k leading left singular vectors of W and W': 1 where they span one space
    inside     ||U_k U_k^T D V_k V_k^T||_F^2 / ||D||_F^2          how much of the change lies in the leading space of W

Needs no data. One decomposition a matrix (that of the base is kept); narrow it with `targets` and `every` on large models.

Shuttleworth et al. 2024, arXiv 2410.21228 (similarity of singular vectors); `inside` after Hu et al. 2021, arXiv
2106.09685, section 7.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.core.algebra import norm
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.probe import Finding, option, probe
from tunesmith.core.sample import Sample
from tunesmith.core.spectrum import svd_of
from tunesmith.inspect.places import EVERY, TARGETS, before_after, left_out, matrices, place


@probe("spectra", paper="2410.21228", data=False)
class Spectra:
    """Singular values of the change and of the weights before and after it."""

    k: int = option(10, "leading singular vectors to compare", low=1, high=4096)
    keep: int = option(32, "singular values kept of each matrix", low=1, high=4096)
    targets: str = option("", TARGETS)
    every: int = option(1, EVERY, low=1, high=10000)

    @torch.no_grad()
    def measure(self, base: Base, delta: Delta | View, sample: Sample | None = None) -> Finding:
        """One row a matrix. Raises UsageError where the delta changes none."""
        rows = []
        for c in matrices(base, delta, self.targets, self.every):
            W0, W1 = before_after(c)
            U1, S1, _ = torch.linalg.svd(W1, full_matrices=False)
            S = svd_of(c.update, vectors=False).S
            U, V = W0.U[:, : self.k], W0.Vh[: self.k]
            size = float(norm(c.update)) ** 2
            within = float((U.T @ c.update.dense().float().flatten(1) @ V.T).square().sum()) / size if size else None
            rows.append({
                **place(c),
                "moved": float((S1 - W0.S).abs().max() / W0.S[0].clamp_min(1e-30)),
                "overlap": float((U.T @ U1[:, : self.k]).square().sum()) / U.shape[1],
                "inside": within,
                "change": S[: self.keep].tolist(),
                "before": W0.S[: self.keep].tolist(),
                "after": S1[: self.keep].tolist(),
            })  # fmt: skip
        turned, most = min(rows, key=lambda r: r["overlap"]), max(rows, key=lambda r: r["moved"])
        known = [r["inside"] for r in rows if r["inside"] is not None]
        values: dict[str, Any] = {
            "matrices": len(rows), "least_overlap": turned["overlap"], "least_overlap_at": turned["tensor"],
            "largest_moved": most["moved"], "largest_moved_at": most["tensor"],
            "mean_inside": sum(known) / len(known) if known else None,
        }  # fmt: skip
        text = (
            f"leading {self.k} singular vectors overlap by at least {turned['overlap']:.3f} ({turned['tensor']}); "
            f"singular values move by at most {100 * most['moved']:.3g} % of the largest"
        )
        return Finding("spectra", text, values, rows, {"k": self.k, **left_out(base, delta)})
