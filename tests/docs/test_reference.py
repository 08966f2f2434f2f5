# SPDX-License-Identifier: Apache-2.0
"""What the documents say about formats, rules and numbers is what the code does."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core import errors, sites
from tunesmith.data import formats, sources
from tunesmith.evaluate import gates, metrics, panels, receipt
from tunesmith.study import report, spec
from tunesmith.train import checkpoint, runs
from tunesmith.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = {p.name: p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def rows(document: str, mark: str) -> list[list[str]]:
    """The cells of the table between two markers, without its head."""
    text = DOCS[document].split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def import_rule() -> Any:
    spec_ = importlib.util.spec_from_file_location("check_imports_for_docs", ROOT / "tools" / "check_imports.py")
    assert spec_ is not None and spec_.loader is not None
    module = importlib.util.module_from_spec(spec_)
    sys.modules[spec_.name] = module  # its dataclasses look their module up
    spec_.loader.exec_module(module)
    return module


def test_the_import_table_is_the_rule_that_is_enforced() -> None:
    allowed = import_rule().ALLOWED
    said = {}
    for folder, _, may in rows("architecture.md", "imports"):
        names = frozenset(ticked(may))
        said[ticked(folder)[0].rstrip("/")] = None if may == "anything" else names
        assert names or may in ("anything", "nothing of ours")
    assert said == {name: allowed[name] for name in said}
    folders = {p.name for p in (ROOT / "src" / "tunesmith").iterdir() if p.is_dir() and any(p.glob("**/*.py"))}
    assert said.keys() == folders
    for name in allowed.keys() - folders - {""}:
        assert f"`{name}`" in DOCS["architecture.md"], name


def test_every_dependency_is_justified() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = DOCS["architecture.md"].split("## Dependencies")[1].split("\n## ")[0]
    said = re.findall(r"^\| ([\w-]+) \| (.{10,}) \|$", table, re.MULTILINE)
    named = [re.split(r"[<>=]", d)[0] for d in project["dependencies"]]
    assert [n for n, _ in said if n != "package"] == named
    for extra, packages in project["optional-dependencies"].items():
        assert f"`{extra}`" in table
        if extra != "dev":
            assert all(f"`{re.split(r'[<>=]', p)[0]}`" in table for p in packages)


def test_the_settings_table_is_the_configuration() -> None:
    said = {ticked(name)[0]: default for name, default, _ in rows("formats.md", "settings")}
    assert said == {f.name: "none" if f.default is None else str(f.default) for f in dataclasses.fields(TrainConfig)}


def test_the_forms_of_data_are_those_that_are_recognised() -> None:
    table = rows("formats.md", "layouts")
    assert [ticked(r[0])[0] for r in table] == [x.name for x in formats.LAYOUTS]
    for (_, kind, needs, may), layout in zip(table, formats.LAYOUTS, strict=True):
        assert kind == layout.kind
        assert tuple(ticked(re.sub(r"\(.*?\)", "", needs))) == layout.needs
        assert tuple(ticked(re.sub(r"\(.*?\)", "", may))) == layout.may
    text = DOCS["formats.md"].split("<!-- layouts:begin -->")[1].split("<!-- layouts:end -->")[0]
    assert {alias for group in formats.ALIASES.values() for alias in group} <= set(ticked(text))
    limits = sources.Limits()
    for value, words in ((limits.line, "32 MiB"), (limits.document, "512 MiB"), (limits.expanded, "2 GiB")):
        number, unit = words.split()
        assert value == int(number) * {"MiB": 2**20, "GiB": 2**30}[unit] and words in DOCS["formats.md"]


def names_in(cls: Any) -> set[str]:
    """Field names of a dataclass and of those it holds."""
    out: set[str] = set()
    for f in dataclasses.fields(cls):
        out.add(f.name)
        stack = [typing.get_type_hints(cls)[f.name]]
        while stack:
            hint = stack.pop()
            if dataclasses.is_dataclass(hint):
                out |= names_in(hint)
            elif isinstance(hint, types.UnionType) or typing.get_args(hint):
                stack += typing.get_args(hint)
    return out


def test_every_key_of_a_comparison_is_described() -> None:
    from tunesmith.arena import report as arena

    said = {name for key, _ in rows("formats.md", "compare") for name in ticked(key)}
    assert set(arena._KEYS) <= said
    assert arena.FORMAT in DOCS["formats.md"]


def test_what_a_method_may_collect_from_data_is_described() -> None:
    from tunesmith.core import sample
    from tunesmith.train.surgery import Now

    text = DOCS["write-a-method.md"]
    for name in ("look", "inputs", "second_moments", "gradients"):
        assert callable(getattr(sample, name)) and f"`{name}(" in text
    assert all(f"sample.{name}" in text for name in ("trained", "of", "read") if hasattr(sample.Sample, name))
    assert callable(Now.slow) and "`now.slow(factor)`" in text


def test_every_field_of_a_receipt_is_described() -> None:
    table = rows("formats.md", "receipt")
    assert [ticked(r[0])[0] for r in table] == [f.name for f in dataclasses.fields(receipt.Receipt)]
    said = {name for r in table for cell in r for name in ticked(cell)}
    assert names_in(receipt.Receipt) <= said
    for name, kind in typing.get_type_hints(receipt.Receipt).items():
        if dataclasses.is_dataclass(kind):
            cell = next(r[1] for r in table if ticked(r[0]) == [name])
            assert {f.name for f in dataclasses.fields(kind)} <= set(ticked(cell)), name


def test_every_field_of_a_study_result_is_described() -> None:
    said = [name for r in rows("formats.md", "study") for name in ticked(r[0])]
    assert sorted(said) == sorted(report._FIELDS)
    verdicts = next(r[1] for r in rows("formats.md", "study") if "`verdict`" in r[0])
    assert all(label in verdicts for label in spec.LABELS)


def test_format_names_and_exit_codes() -> None:
    for name in (runs.FORMAT, checkpoint.FORMAT, receipt.FORMAT, report.FORMAT):
        assert f"`{name}`" in DOCS["formats.md"], name
    said = {error: int(code) for code, error, _ in rows("formats.md", "codes") if error}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.TunesmithError)]
    assert said == {c.__name__: c.exit_code for c in classes}


def test_gates_metrics_and_probe_sizes_of_the_receipt_page() -> None:
    text = DOCS["receipts.md"]
    table = rows("receipts.md", "gates")
    assert [ticked(r[0])[0] for r in table if "EXTRA" not in r[0]] == list(gates.NAMES)
    for name, _, unit in table:
        for known in gates.UNITS.get(ticked(name)[0], {}):
            assert known in ("", "b", "%") or known in unit or "as memory" in unit, (name, known)
    assert all(f"`{name}`" in text for name in metrics.METRICS)
    wanted = (
        f"{panels.TEXTS} plain English passages", f"{panels.CHOICES} easy multiple-choice", f"{panels.CHATS} everyday",
        f"{panels.PROMPTS} plainly harmful", f"{panels.PROMPTS} harmless", f"({panels.ANSWER} tokens)",
    )  # fmt: skip
    assert [w for w in wanted if w not in text] == []


def test_targets_named_are_those_that_exist() -> None:
    text = DOCS["write-a-method.md"].split("## Where it attaches")[1]
    groups, roles = text.split("Groups:")[1].split("Roles:")
    assert ticked(groups) == list(sites.GROUPS)
    assert ticked(roles.split("found")[0]) == list(sites.ROLES)
    kinds = DOCS["write-a-method.md"].split("| `kinds` |")[1].splitlines()[0]
    assert set(ticked(kinds)) == set(sites.KINDS)


@pytest.mark.parametrize("name", sorted(DOCS))
def test_links_lead_somewhere(name: str) -> None:
    here = ROOT if name == "README.md" else ROOT / "docs"
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCS[name])
    for target in targets:
        if not target.startswith("http"):
            assert (here / target).exists(), target


@pytest.mark.parametrize("name", sorted(DOCS))
def test_files_named_in_the_text_exist(name: str) -> None:
    for path in re.findall(r"`((?:src|tests|tools|benchmarks|examples|docs|studies)/[\w./-]+)`", DOCS[name]):
        assert (ROOT / path).exists() or "NNN-" in path or "/CARRIER/" in path, path


def test_the_optional_functions_are_called() -> None:
    places = [ROOT / "src" / "tunesmith" / folder for folder in ("core", "train")]
    called = "".join(p.read_text(encoding="utf-8") for place in places for p in place.glob("*.py"))
    optional = DOCS["write-a-method.md"].split("## Optional functions")[1].split("\n## ")[0]
    for hook in re.findall(r"^\| `(\w+)\(", optional, re.MULTILINE):
        assert f".{hook}(" in called or f'"{hook}"' in called, hook
