# SPDX-License-Identifier: Apache-2.0
"""Token tables matched by token string, and what a model without a token is taken to have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import model_folder, read_all, tokenizer, toy

from tunesmith.compose.folders import FolderChanges, ModelFolder
from tunesmith.compose.stream import merge_folders
from tunesmith.compose.vocabulary import LACKS, VocabularyPlan, align, read_vocabulary
from tunesmith.core.algebra import Dense, Update
from tunesmith.core.combine import Now, Place
from tunesmith.core.errors import UsageError

Make = Callable[..., Path]
WORDS = ["<unk>", "a", "b", "c", "d", "e"]  # of 8 rows: two are padding


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(model_folder, tmp_path)


class Mean:
    """The plain mean of the changes."""

    def combine(self, at: Place, changes: Sequence[Update | None], weights: Sequence[float], now: Now) -> Update | None:
        terms = [c.dense() for c in changes if c is not None]
        return Dense(sum(terms[1:], terms[0]) / len(changes)) if terms else None


def models(make: Make) -> tuple[ModelFolder, list[ModelFolder]]:
    """A base; one with its tokens in another order and one more row; one that lacks "e" and adds "<x>"."""
    base = make("base", toy(0), tokens=tokenizer(WORDS))
    order = ["<unk>", "e", "d", "c", "b", "a", "f"]
    a = make("a", toy(1, rows=9), tokens=tokenizer(order), vocab_size=9)
    b = make("b", toy(2, rows=6), tokens=tokenizer(WORDS[:5], added=("<x>",)), vocab_size=6)
    return ModelFolder(base), [ModelFolder(a), ModelFolder(b)]


def test_differing_vocabularies_are_an_error_that_says_so(make: Make) -> None:
    base = make("base", toy(0), tokens=tokenizer(WORDS))
    swapped = make("swapped", toy(1), tokens=tokenizer(["<unk>", "b", "a", "c", "d", "e"]))
    with pytest.raises(UsageError, match=r"0 tokens added, 0 missing, 2 moved .*'a'(?s:.*)align them first"):
        FolderChanges(base, [swapped])
    FolderChanges(base, [make("same", toy(1), tokens=tokenizer(WORDS))])
    larger = make("larger", toy(1, rows=9), vocab_size=9)  # no tokenizer: only the size tells
    with pytest.raises(UsageError, match=r"'embed.weight' has shape \[9, 4\](?s:.*)align them first"):
        FolderChanges(base, [larger])
    with pytest.raises(UsageError, match=r"has no tokenizer.json"):
        align(ModelFolder(base), [ModelFolder(larger)])


def test_the_plan_lists_common_moved_added_and_dropped(make: Make) -> None:
    base, folders = models(make)
    plan = align(base, folders)
    a, b = plan.matches
    assert (a.common, [t for t, _, _ in a.moved], a.added, a.dropped) == (6, ["a", "b", "d", "e"], ["f"], [])
    assert a.moved[0] == ("a", 1, 5)
    assert (b.common, b.moved, b.added, b.dropped) == (5, [], ["<x>"], ["e"])
    assert plan.rows == 8 and plan.base_index == list(range(8))
    assert plan.index[0] == [0, 5, 4, 3, 2, 1, LACKS, 7]  # row 6 is "f" there, padding here
    assert plan.index[1] == [0, 1, 2, 3, 4, LACKS, LACKS, LACKS]
    said = plan.summary()
    assert "a: 6 tokens in common, 4 moved ('a', 'b', 'd', 'e'), 1 added ('f')" in said
    assert "1 dropped ('e')" in said and "8 rows, 0 new tokens" in said
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["models"][1]["dropped"] == ["e"] and data["missing"] == "base"


@pytest.mark.parametrize("missing", ["base", "mean", "zero"])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_rows_are_matched_by_token(make: Make, missing: str, name: str) -> None:
    base, folders = models(make)
    plan = align(base, folders, missing=missing)
    found = FolderChanges(base, folders, vocabulary=plan)
    w, a, b = (f.read(name) for f in (base, *folders))
    place = found.place(name)
    assert place.shape == (8, 4) and torch.equal(place.base(), w)
    first, second = (c.dense() for c in found.at(place) if c is not None)
    assert torch.equal(first[1], a[5] - w[1]) and torch.equal(first[3], a[3] - w[3])  # "a" moved, "c" did not
    assert torch.equal(second[1], b[1] - w[1])
    e = a[1] - w[5]  # the change of "e" in the only model that has it
    want = {"base": (e, 0 * e), "mean": (e, e), "zero": (0 * e, 0 * e)}[missing]
    assert torch.equal(first[5], want[0]) and torch.allclose(second[5], want[1])
    assert bool((second[6] == 0).all())  # padding in the base: no model has such a token
    inner = found.place("layers.0.q.weight")
    assert torch.equal(found.at(inner)[0].dense(), folders[0].read(inner.key) - base.read(inner.key))  # type: ignore[union-attr]


def test_union_gives_added_tokens_rows_that_start_at_their_mean(make: Make, tmp_path: Path) -> None:
    base, folders = models(make)
    c = make("c", toy(3, rows=8), tokens=tokenizer(WORDS, added=("<y>", "<x>")))
    folders = [*folders, ModelFolder(c)]
    plan = align(base, folders, target="union")
    assert [(t["content"], t["id"]) for t in plan.new_tokens] == [("<x>", 6), ("<y>", 7)]  # "f" is no added token
    assert plan.base_index[6:] == [LACKS, LACKS] and plan.rows == 8
    found = FolderChanges(base, folders, vocabulary=plan)
    tables = [f.read("embed.weight") for f in folders]
    start = found.place("embed.weight").base()
    assert torch.allclose(start[6], (tables[1][5] + tables[2][7]) / 2)
    assert torch.allclose(start[7], tables[2][6])
    out = tmp_path / "out"
    merge_folders(base, folders, Mean(), None, out, vocabulary=plan)
    got = read_all(out)["embed.weight"]
    assert torch.allclose(got[7], tables[2][6])
    kept = start[1] + (tables[0][5] + tables[1][1] + tables[2][1] - 3 * start[1]) / 3
    assert torch.allclose(got[1], kept, atol=1e-6)
    vocabulary = read_vocabulary(out / "tokenizer.json")
    assert vocabulary["<x>"] == 6 and vocabulary["<y>"] == 7
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("a <y> b").ids == [1, 7, 2]
    record = json.loads((out / "tunesmith_merge.json").read_text())
    assert record["vocabulary"]["new_tokens"] == ["<x>", "<y>"]


def test_union_grows_the_table_and_the_config(make: Make, tmp_path: Path) -> None:
    full = [f"w{i}" for i in range(8)]
    base = ModelFolder(make("base", toy(0), tokens=tokenizer(full)))
    other = ModelFolder(make("a", toy(1, rows=10), tokens=tokenizer(full, added=("<x>", "<y>")), vocab_size=10))
    plan = align(base, [other], target="union")
    merge_folders(base, [other], Mean(), None, tmp_path / "out", vocabulary=plan)
    got = read_all(tmp_path / "out")
    for name in ("embed.weight", "head.weight"):
        assert torch.allclose(got[name], other.read(name), atol=1e-6)  # one source at weight 1 is that source
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 10


def test_equal_vocabularies_give_the_plan_that_changes_nothing(make: Make) -> None:
    base = ModelFolder(make("base", toy(0), tokens=tokenizer(WORDS)))
    other = ModelFolder(make("a", toy(1), tokens=tokenizer(WORDS)))
    plan = align(base, [other], missing="zero")
    assert plan.index == [list(range(8))]
    plain, planned = FolderChanges(base, [other]), FolderChanges(base, [other], vocabulary=plan)
    for place in plain.places():
        (x,), (y,) = plain.at(place), planned.at(place)
        assert torch.equal(x.dense(), y.dense())  # type: ignore[union-attr]


def test_bad_plans_and_choices_are_refused(make: Make) -> None:
    base, folders = models(make)
    for key in ("target", "missing"):
        with pytest.raises(UsageError, match=f"unknown choice {key}='bas'(?s:.*)'base'"):
            align(base, folders, **{key: "bas"})
    with pytest.raises(UsageError, match="is for 2 models, not for 1"):
        FolderChanges(base, folders[:1], vocabulary=align(base, folders))
    odd = VocabularyPlan(8, "base", "base", list(range(8)), [[-7] * 8], [])
    with pytest.raises(UsageError, match="impossible rows"):
        FolderChanges(base, folders[:1], vocabulary=odd)
    short = make("short", toy(0, rows=4), tokens=tokenizer(WORDS), vocab_size=4)
    with pytest.raises(UsageError, match="'d' has id 4, the table has 4 rows"):
        align(base, [ModelFolder(short)])


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ({"model": {"vocab": {"a": -1}}}, "damaged"),
        ({"model": {"vocab": {"a": "0"}}}, "damaged"),
        ({"model": {"vocab": {"a": True}}}, "damaged"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "have one id, 0"),
        ({"model": {"vocab": [["a", 0.0], "b"]}}, "damaged"),
        ({"model": []}, "damaged"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}, "damaged"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": 3}, "damaged"),
        ({}, "damaged"),
    ],
)
def test_tokenizer_files_are_not_trusted(tmp_path: Path, root: Any, says: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    with pytest.raises(UsageError, match=says):
        read_vocabulary(tmp_path / "tokenizer.json")


def test_unigram_tokens_have_the_ids_of_their_places(tmp_path: Path) -> None:
    root = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 2, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    assert read_vocabulary(tmp_path / "tokenizer.json") == {"a": 0, "b": 1, "<x>": 2}
