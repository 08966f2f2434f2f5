# SPDX-License-Identifier: Apache-2.0
"""The pull of AdamR: parameters go back towards their start before each Adam step, by the step size of the whole model.

    theta <- theta - wd * lr / sqrt(mean v_hat) * (theta - theta_0)          l1: sign(theta - theta_0)

v_hat is Adam's bias-corrected second moment with the present gradient in it; its mean is over all parameters given. The
pull never goes past theta_0. Deng et al. 2025, arXiv 2410.09344.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FORMS = ("l2", "l1")


def mean_second_moment(gradients: Iterable[tuple[Tensor, Mapping[str, Any]]], beta2: float) -> float:
    """The mean of v_hat over all entries, from each tensor's gradient and its Adam state before the step (may be empty)."""
    total, count = 0.0, 0
    for grad, state in gradients:
        n = float(state.get("step", 0)) + 1
        v = (1 - beta2) * grad.double().square()
        if state:
            v = v + beta2 * state["exp_avg_sq"].double()
        total, count = total + float(v.sum()) / (1 - beta2**n), count + grad.numel()
    return total / count if count else 0.0


@torch.no_grad()
def pull(t: Tensor, anchor: Tensor | None, pull: float, lr: float, mean: float, form: str = "l2") -> None:
    """Move t towards its anchor (None is zero), in place; `mean` is that of `mean_second_moment`."""
    rate = pull * lr / max(math.sqrt(mean), 1e-30)
    away = t if anchor is None else t - anchor
    t.sub_(min(rate, 1.0) * away if form == "l2" else away.sign() * away.abs().clamp(max=rate))
