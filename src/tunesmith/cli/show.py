# SPDX-License-Identifier: Apache-2.0
"""`tunesmith show`: a delta's card, read without loading a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Json, Result, amount, cells, examples, table
from tunesmith.cli.places import delta_folder, run_folder

if TYPE_CHECKING:
    from rich.console import Console

HELP = examples("tunesmith show demo", "tunesmith show runs/demo/delta --json")


def attach(app: typer.Typer) -> None:
    app.command("show", epilog=HELP, short_help="A delta's card")(show)


def show(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="A delta's folder, a run's folder or a run's name.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Show a delta: what it is for, how it was made, what it holds, what it was measured to do."""
    from tunesmith.core import store

    folder = delta_folder(delta)
    head = store.peek(folder)
    facts = head["provenance"]
    run = run_folder(folder)
    receipt = run / "receipt.json" if run is not None else None
    receipt_at = str(receipt) if receipt is not None and receipt.is_file() else None

    def view(console: Console) -> None:
        shown = table("", "")
        for label, value in _rows(head, facts):
            shown.add_row(*cells(label, value))
        shown.add_row(*cells("folder", folder))
        if receipt_at:
            shown.add_row(*cells("receipt", receipt_at))
        console.print(shown)

    parameters = sum(_count(t["shape"]) for t in head["tensors"].values())
    proof = (
        f"{len(head['tensors'])} tensors, {parameters:,} values, {head['file']['bytes']:,} bytes, "
        f"digest {head['digest'][:12]}, header checksum holds (tunesmith verify re-proves the rest)"
    )
    data = {k: head[k] for k in ("name", "created", "written_by", "digest", "file", "layout", "provenance")}
    data["provenance"] = _without_tensors(facts)
    return Result({"folder": str(folder), **data, "parts": head["parts"], "receipt": receipt_at}, proof, view)


def _rows(head: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    base = facts.get("base") or {}
    rows: list[tuple[str, Any]] = [("delta", head["name"])]
    rows.append(("base", f"{base.get('name', '?')} ({str(base.get('digest', ''))[:12]}, {base.get('dtype', '?')})"))
    for part in head["parts"]:
        options = ", ".join(f"{k}={json.dumps(v)}" for k, v in part["options"].items())
        scope = f", scope {part['scope']}" if part["scope"] else ""
        rows.append((f"part {part['name']}", f"{part['method']} ({part['carrier']}{scope}), {_sites(part)}"))
        rows.append(("", options))
    rows.append(("tensors", f"{len(head['tensors'])}, {amount(head['file']['bytes'])}"))
    rows.extend(
        (key, _plain(facts[key])) for key in ("data", "context", "seeds", "metrics", "lineage") if facts.get(key)
    )
    effect = facts.get("effect")
    if isinstance(effect, dict):
        rows.append(("effect", f"largest change on the probe {effect.get('max_abs')}"))
    template = head["layout"].get("template")
    if isinstance(template, dict):
        stops = sorted({*(template.get("eos_ids") or []), *(template.get("eot_ids") or [])})
        rows.append(("template", f"sha256 {str(template.get('sha256', ''))[:12]}, stop tokens {stops}"))
    labels = head["layout"].get("labels")
    if labels:
        rows.append(("labels", ", ".join(map(str, labels))))
    versions = ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or head["written_by"]).items())
    return [*rows, ("made", f"{head['created']} with {versions}"), ("digest", head["digest"])]


def _sites(part: Mapping[str, Any]) -> str:
    paths = [path or "model" for path, _ in part["sites"]]
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"{len(paths)} sites: {shown}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _count(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _without_tensors(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance without the base's list of tensor hashes, which is long and says nothing to a reader."""
    base = facts.get("base")
    return {**facts, "base": {k: v for k, v in base.items() if k != "tensors"}} if isinstance(base, dict) else {**facts}
