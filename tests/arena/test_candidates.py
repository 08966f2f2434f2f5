# SPDX-License-Identifier: Apache-2.0
"""Who takes part: parsing, reasons for leaving methods out, counts on the base, and sizes that are matched."""

from __future__ import annotations

from typing import Any

import pytest

import tunesmith as ts
from tunesmith.arena.candidates import Size, gather, knob_of, parse, size_of, split_names
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.method import methods


def test_names_with_options_are_told_apart() -> None:
    assert list(split_names("lora")) == ["lora"]
    assert list(split_names("lora:rank=4,targets=q,bone, ssf")) == ["lora:rank=4,targets=q", "bone", "ssf"]
    assert list(split_names("ssf,lora:rank=4")) == ["ssf", "lora:rank=4"]
    listed = 'prompt-tuning:start=text,text_ids=[1,2],lora:rank_pattern={"q": 2, "k": 3},alpha=2.0'
    assert [x.split(":")[0] for x in split_names(listed)] == ["prompt-tuning", "lora"]
    made = parse("lora:rank=4,targets=q,head")
    assert made[0][1] == ts.LoRA(rank=4, targets="q") and made[1] == ("head", None)
    with pytest.raises(UsageError, match="named twice"):
        parse("lora,ssf,lora")
    with pytest.raises(UsageError, match="unknown method"):
        parse("lorra")
    with pytest.raises(UsageError, match="no method"):
        parse("")


def test_all_is_every_registered_method_and_each_takes_part_or_is_named_with_a_reason(encoder: Base) -> None:
    listed, left, _ = gather(encoder, "all", has_head=True)
    assert {c.label for c in listed} | {x.label for x in left} == {info.name for info in methods()}
    assert {"lora", "ssf", "bitfit", "full", "head"} <= {c.label for c in listed}
    assert all(x.reason for x in left)


def test_a_method_that_cannot_attach_is_left_out_with_its_reason(encoder: Base) -> None:
    listed, left, _ = gather(encoder, ["lora", ts.LoRA(targets="nowhere")], has_head=True)
    assert [c.label for c in listed] == ["lora"]
    assert left[0].label == "lora:targets=nowhere" and "matches no" in left[0].reason
    _, without_head, _ = gather(encoder, "lora,head", has_head=False)
    assert "no head" in without_head[0].reason
    with pytest.raises(UsageError, match="no method can be attached"):
        gather(encoder, "lora:targets=nowhere", has_head=True)


@pytest.mark.parametrize(
    "method", [ts.LoRA(rank=3), ts.SSF(), ts.BitFit(), ts.IA3(targets="up"), ts.VeRA(rank=8), ts.DoRA(rank=2)]
)
def test_sizes_are_those_of_a_real_delta(encoder: Base, method: Any) -> None:
    delta = Delta.create(encoder, method)
    trained = delta.trainable_parameters
    assert size_of(encoder, method) == Size(trained, delta.nbytes + 3 * 4 * trained)


def test_equal_parameters_matches_counts_on_the_base(encoder: Base) -> None:
    listed, _, target = gather(encoder, "lora:rank=4,vera,dora,bitfit,head", has_head=True, equal="parameters")
    want = size_of(encoder, ts.LoRA(rank=4)).trainable
    assert target == {"target": want, "unit": "trained numbers", "from": "lora:rank=4"}
    by = {c.label: c for c in listed}
    assert by["lora:rank=4"].method.rank == 4
    near = [abs(size_of(encoder, ts.DoRA(rank=r)).trainable - want) for r in (1, 2, 3, 4, 5)]
    assert abs(by["dora"].size.trainable - want) == min(near) and by["dora"].note.startswith("rank=")
    assert "no size option" in by["bitfit"].note and by["head"].note == ""
    given, _, other = gather(encoder, "lora", has_head=True, equal="parameters", parameters=2 * want)
    assert given[0].method.rank == 8 and other["from"] == "given"


def test_equal_memory_counts_what_is_stored_and_not_only_what_trains(encoder: Base) -> None:
    """VeRA stores large frozen matrices, so at equal memory its rank is smaller than at equal parameters."""
    small = "lora:rank=1,vera"
    memory = gather(encoder, small, has_head=True, equal="memory")[0][1]
    parameters = gather(encoder, small, has_head=True, equal="parameters")[0][1]
    assert memory.method.rank < parameters.method.rank
    with pytest.raises(UsageError, match="parameters only"):
        gather(encoder, small, has_head=True, equal="memory", parameters=100)


def test_the_size_option_is_the_rank_where_there_is_one() -> None:
    assert knob_of(ts.LoRA()) == "rank" and knob_of(ts.PrefixTuning()) == "tokens" and knob_of(ts.BitFit()) is None
