# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md that the code knows better than any hand: verbs and methods.

    python tools/readme_tables.py            rewrite the blocks between <!-- NAME:begin --> and <!-- NAME:end -->
    python tools/readme_tables.py --check    change nothing, exit with 1 when a block is out of date

The verbs come from the command line's parser, the methods from the registry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a column break inside a cell is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verbs() -> str:
    """One row per verb of the command line, in the order of `tunesmith --help`."""
    from typer.main import get_command

    from tunesmith.cli.main import app

    commands = getattr(get_command(app), "commands", {})
    return table(("verb", "what it does"), ((f"`{n}`", c.get_short_help_str(200)) for n, c in commands.items()))


def methods() -> str:
    """One row per registered method: name, Python name, carrier, whether it merges, paper, what it does."""
    import tunesmith.deltas
    from tunesmith.core import method as registry
    from tunesmith.core.derive import trainable_recipes

    def row(info: registry.MethodInfo) -> tuple[str, ...]:
        paper = f"[{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else ""
        merges = info.merge if info.mergeable else "no"
        return f"`{info.name}`", f"`ts.{info.cls.__name__}`", info.carrier, merges, paper, info.summary

    ours = [i for i in registry.methods() if i.cls.__name__ in tunesmith.deltas.__all__]
    rows = [row(i) for i in ours]
    for i in trainable_recipes():
        paper = f"[{i.paper}](https://arxiv.org/abs/{i.paper})" if i.paper else ""
        rows.append((f"`{i.name}`", f"`ts.derive.{i.cls.__name__}`", "a new base", "yes", paper, i.summary))
    return table(("name", "in Python", "carrier", "merges", "paper", "what it does"), rows)


BLOCKS: dict[str, Callable[[], str]] = {"verbs": verbs, "methods": methods}


def replaced(text: str, name: str, block: str) -> str:
    """`text` with the block between the markers of `name` replaced. Raises ValueError unless each is there once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} before one {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the blocks; 0 when they were or are up to date, else 1."""
    parser = argparse.ArgumentParser(description="the generated tables of README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when out of date")
    parser.add_argument("file", nargs="?", type=Path, default=README)
    given = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT / "src"))
    text = made = given.file.read_text(encoding="utf-8")
    stale = []
    for name, block in BLOCKS.items():
        try:
            after = replaced(made, name, block())
        except ValueError as error:
            print(f"{given.file.name}: {error}", file=sys.stderr)
            return 1
        stale += [name] if after != made else []
        made = after
    if given.check:
        for name in stale:
            print(f"{given.file.name}: the table of {name} is out of date; run python tools/readme_tables.py")
        return 1 if stale else 0
    if made != text:
        given.file.write_text(made, encoding="utf-8")
    print(f"tables: {', '.join(BLOCKS)}; {len(stale)} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
