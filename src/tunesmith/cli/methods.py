# SPDX-License-Identifier: Apache-2.0
"""`tunesmith methods`: every registered method, combiner, recipe or probe, or the options of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.output import Debug, Json, Result, cells, examples, table
from tunesmith.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.core.method import MethodInfo
    from tunesmith.core.registry import Info

HELP = examples("tunesmith methods", "tunesmith methods lora", "tunesmith methods --family combiners")
FAMILIES = ("methods", "combiners", "recipes", "probes")


def attach(app: typer.Typer) -> None:
    app.command("methods", epilog=HELP, short_help="The methods, or the options of one")(methods)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show the options of this one.")] = None,
    family: Annotated[
        str, typer.Option("--family", metavar="NAME", help="methods, combiners, recipes or probes.")
    ] = "methods",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """List what --method takes: name, carrier, paper, capabilities, one line. With NAME, its options and their ranges.

    --family lists the ways to combine deltas (merge --method), to derive a base, or to inspect a delta instead.
    """
    if family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}", where="--family", hint=nearest(family, FAMILIES))
    if family != "methods":
        return _family(family, name)
    import tunesmith.deltas  # noqa: F401 (registers them)
    from tunesmith.core import method as registry
    from tunesmith.core.derive import trainable_recipes

    recipes = trainable_recipes()
    if name in {i.name for i in recipes}:
        return _family("recipes", name)
    return _all(registry.methods(), recipes) if name is None else _one(registry.get(name))


def _facts(info: MethodInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "carrier": info.carrier,
        "paper": info.paper,
        "capabilities": list(info.capabilities),
        "kinds": list(info.kinds),
        "summary": info.summary,
    }


def _all(infos: list[MethodInfo], recipes: list[Info]) -> Result:
    rows = [_facts(i) for i in infos]
    rows += [
        {"name": i.name, "carrier": "base", "paper": i.paper, "capabilities": ["makes a new base first"], "kinds": [],
         "summary": i.summary} for i in recipes
    ]  # fmt: skip

    def view(console: Console) -> None:
        shown = table("name", "carrier", "paper", "capabilities", "what it does")
        for r in rows:
            shown.add_row(*cells(r["name"], r["carrier"], r["paper"], "\n".join(r["capabilities"]), r["summary"]))
        console.print(shown)

    carriers = {i.carrier for i in infos}
    proof = f"{len(infos)} methods over {len(carriers)} carriers, and {len(recipes)} that first make a new base"
    return Result({"methods": rows}, proof, view)


def _family(family: str, name: str | None) -> Result:
    """Entries of a registry, or the options of one."""
    from tunesmith.core.combine import COMBINERS
    from tunesmith.core.derive import RECIPES
    from tunesmith.core.probe import PROBES
    from tunesmith.core.registry import schema

    known = {"combiners": COMBINERS, "recipes": RECIPES, "probes": PROBES}[family]
    infos = known.all() if name is None else [known.get(name)]
    rows = []
    for i in infos:
        options = [{**o, "choices": list(o["choices"]) if o["choices"] else None} for o in schema(i.cls)]
        rows.append({"name": i.name, "paper": i.paper, "summary": i.summary, "options": options})

    def view(console: Console) -> None:
        if name is None:
            shown = table("name", "paper", "what it does", "options")
            for r in rows:
                shown.add_row(*cells(r["name"], r["paper"], r["summary"], ", ".join(o["name"] for o in r["options"])))
        else:
            console.print((infos[0].cls.__doc__ or "").strip() + "\n", soft_wrap=True)
            shown = table("option", "type", "default", "range", "")
            for o in rows[0]["options"]:
                shown.add_row(*cells(o["name"], o["type"], repr(o["default"]), _range(o), o["help"]))
        console.print(shown)

    if name is not None:
        return Result(dict(rows[0]), f"{name}: {len(rows[0]['options'])} options", view)
    return Result({family: rows}, f"{len(rows)} {family}", view)


def _one(info: MethodInfo) -> Result:
    from tunesmith.core.method import schema

    options = [{**row, "choices": list(row["choices"]) if row["choices"] else None} for row in schema(info.cls)]
    facts = _facts(info)
    rest = (info.cls.__doc__ or "").strip()

    def view(console: Console) -> None:
        console.print(f"{info.name} ({info.carrier}; paper {info.paper or 'none'}; {', '.join(info.capabilities)})")
        console.print(f"attaches to: {', '.join(info.kinds)}\n\n{rest}\n", soft_wrap=True)
        shown = table("option", "type", "default", "range", "")
        for o in options:
            shown.add_row(*cells(o["name"], o["type"], repr(o["default"]), _range(o), o["help"]))
        console.print(shown)

    data = {**facts, "merge": info.merge, "options": options, "doc": rest}
    sample = next((f":{o['name']}={o['default']}" for o in options if isinstance(o["default"], int)), "")
    proof = f"{info.name}: {len(options)} options; use it as --method {info.name}{sample}"
    return Result(data, proof, view)


def _range(option: dict[str, Any]) -> str:
    if option["choices"]:
        return " | ".join(map(str, option["choices"]))
    low, high = option["low"], option["high"]
    return "" if low is None and high is None else f"{'' if low is None else low}..{'' if high is None else high}"
