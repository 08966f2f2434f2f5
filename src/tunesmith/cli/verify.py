# SPDX-License-Identifier: Apache-2.0
"""`tunesmith verify`: prove a saved delta again, against its base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Device, Json, Model, Result, cells, examples, table
from tunesmith.cli.places import delta_folder, load_base
from tunesmith.core.errors import DeltaError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta

HELP = examples("tunesmith verify demo", "tunesmith verify runs/demo/delta --model smollm2-135m-instruct")
# Of the largest output: sums in another order, and one rounding of each merged weight.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Check:
    """One thing proved: `ok` is None where it does not apply."""

    name: str
    ok: bool | None
    detail: str
    measured: float | None = None


def attach(app: typer.Typer) -> None:
    app.command("verify", epilog=HELP, short_help="Re-prove a delta against its base")(verify)


def verify(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="A delta's folder, a run's folder or a run's name.")],
    model: Model = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Re-prove a delta: files, base fingerprint, effect, exact undo, merged against applied.

    Exits with 4 when anything does not hold and with 5 for another base.
    """
    import torch

    from tunesmith.core import store
    from tunesmith.core.delta import Delta
    from tunesmith.core.effect import check_effect

    folder = delta_folder(delta)
    head = store.peek(folder)
    Delta.load(folder)  # checksums and names first: they need no base
    base = load_base(folder, head, model, device)
    before, digest = base.probe_outputs(), base.digest()
    loaded = Delta.load(folder, base)
    checks = [
        Check(
            "files", True, f"{len(head['tensors'])} tensors, {head['file']['bytes']:,} bytes, sha256 and digest hold"
        ),
        Check("base", True, f"{base.name}, fingerprint {base.fingerprint.short}"),
    ]
    found = check_effect(base, loaded)
    idle = found.max_abs == 0.0
    what = "changes nothing on the probe (it is declared untrained)" if idle else str(found)
    checks.append(Check("effect", not idle, what, found.max_abs))
    with base.using(loaded):
        applied = base.probe_outputs()
    same_outputs, same_weights = torch.equal(before, base.probe_outputs()), digest == base.digest()
    detail = f"outputs {_same(same_outputs)}, weights {_same(same_weights)} (sha256 {digest[:12]})"
    checks.append(Check("undo", same_outputs and same_weights, detail))
    if base.dtype in (torch.bfloat16, torch.float16) and base.device.type == "cpu":
        # Rounding of thirty layers can look like a wrong merge: the folding itself is proved where it can be seen.
        base = load_base(folder, head, model, device, exact=True)
        loaded = Delta.load(folder, base)
        before = base.probe_outputs()
        with base.using(loaded):
            applied = base.probe_outputs()
    checks.append(merge_check(base, loaded, before, applied))
    bad = [c for c in checks if c.ok is False]

    def view(console: Console) -> None:
        shown = table("check", "", "")
        for c in checks:
            shown.add_row(*cells(c.name, {True: "holds", False: "FAILS", None: "not asked"}[c.ok], c.detail))
        console.print(shown)

    proof = f"{store.proof(loaded, base)}; undo {detail}; merge {checks[-1].detail}"
    return Result(
        {"delta": loaded.name, "folder": str(folder), "holds": not bad, "checks": [asdict(c) for c in checks]}, proof,
        view, exit_code=DeltaError.exit_code if bad else 0, failure="; ".join(f"{c.name} does not hold: {c.detail}" for c in bad),
    )  # fmt: skip


def _same(value: bool) -> str:
    return "bit-identical" if value else "CHANGED"


def merge_check(base: Base, delta: Delta, before: Tensor, applied: Tensor) -> Check:
    """Merge into a copy and compare its outputs with those of the applied delta."""
    import torch

    if torch.equal(before, applied):
        return Check("merge", None, "nothing to merge")
    live = [f"{p.info.name} ({p.info.merge})" for p in delta.parts if not p.info.mergeable]
    if live:
        return Check("merge", None, f"not possible: {', '.join(live)}")
    return gap_check("merge", before, applied, base.merged(delta).probe_outputs())


def gap_check(name: str, before: Tensor, applied: Tensor, merged: Tensor) -> Check:
    """Whether `merged` gives the outputs of the applied delta and not those of the base.

    The gap must be within the dtype's tolerance of the largest output, and below half the delta's own effect: a merge
    that was lost in rounding would otherwise pass for a small delta.
    """
    if merged.shape != applied.shape:
        return Check(name, False, f"merged outputs have shape {list(merged.shape)}, applied {list(applied.shape)}")
    gap, moved = _largest(merged, applied), _largest(merged, before)
    effect = _largest(applied, before)
    limit = TOLERANCE.get(str(applied.dtype).removeprefix("torch."), 1e-4) * float(applied.double().abs().max())
    ok = gap <= limit and moved > 0 and (effect == 0 or gap < effect / 2)
    detail = f"gap to applied {gap:.3g} (limit {limit:.3g}), difference from the base {moved:.6g}"
    return Check(name, ok, detail, gap)


def _largest(a: Any, b: Any) -> float:
    """Largest absolute difference; all of `a` where the shapes differ."""
    if a.shape != b.shape:
        return float(a.double().abs().max())
    return float((a.double() - b.double()).abs().max())
