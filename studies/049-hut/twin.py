# SPDX-License-Identifier: Apache-2.0
"""The same short training through PEFT's HiRA and through HUT: they are one method, so outputs must coincide."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.trace import primary

LEAVES = ("query", "value")


def coincide(base: Base, batches: list[dict[str, Tensor]], rank: int, lr: float) -> dict[str, Any]:
    """Train both in fp32 on the same batches with AdamW and a fixed random readout; the largest gap of the outputs.

    `gap` is None with a reason where PEFT is not installed or has no HiRA.
    """
    try:
        import peft

        config = peft.HiraConfig(r=rank, target_modules=list(LEAVES))
    except (ImportError, AttributeError) as error:
        return {"gap": None, "reason": f"PEFT with HiRA is not installed ({error})"}
    twin = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    delta = Delta.create(base, ts.HUT(rank=rank, targets=",".join(LEAVES)), seed=0)
    theirs: list[nn.Parameter] = []
    with torch.no_grad():
        for path, module in twin.named_modules():
            site = path.removeprefix("base_model.model.")
            if hasattr(module, "hira_A") and site in delta.parts[0].kind_of:
                t = delta.parts[0].tensors(site)
                for factor in ("A", "B"):
                    p = getattr(module, f"hira_{factor}")["default"]
                    p.copy_(t[factor])
                    theirs.append(p)
    mine = [t for _, t in delta.items()]
    steps = [torch.optim.AdamW(p, lr=lr, weight_decay=0.0) for p in (mine, theirs)]
    first, gap, moved = None, 0.0, 0.0
    for batch in batches:
        with base.frozen(), base.using(delta):
            a = _out(base.model, batch)
        b = _out(twin, batch)
        gap = max(gap, float((a - b).detach().abs().max()))
        first = a.detach() if first is None else first
        g = torch.Generator().manual_seed(1)
        readout = torch.randn(a.shape[-1], 4, generator=g) / a.shape[-1] ** 0.5
        for out, step in ((a, steps[0]), (b, steps[1])):
            F.cross_entropy(out @ readout, batch["labels"] % 4).backward()
            step.step()
            step.zero_grad()
    with torch.no_grad(), base.using(delta):
        moved = float((_out(base.model, batches[0]) - first).abs().max())
    return {"gap": gap, "moved": moved, "steps": len(batches), "layers": len(theirs) // 2}


def _out(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first token's last state, [B, d]."""
    out = primary(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
    assert out is not None
    return out[:, 0]
