# SPDX-License-Identifier: Apache-2.0
"""Deltas under one gate: the sources come out as they went in, and what has no such form is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serve_cases import moved, tiny_llama

from tunesmith.compose import merge, reset, route, trace
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.deltas import IA3, BitFit, Full, LoRA, SHiRA
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_llama()


@pytest.fixture(scope="module")
def three(base: Base) -> list[Delta]:
    return [
        moved(base, LoRA(rank=2), seed=1, name="a"),
        moved(base, LoRA(rank=5, alpha=3.0, targets="q,down"), seed=2, name="b"),
        moved(base, LoRA(rank=1, targets="o"), LoRA(rank=2, targets="o,up"), seed=3, name="c"),
    ]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 5e-5 * b.abs().max()


def out(base: Base, *deltas: object) -> torch.Tensor:
    with base.using(*deltas):
        return base.probe_outputs()


def test_whichever_of_three_equal_deltas_is_chosen_it_is_that_delta(base: Base, three: list[Delta]) -> None:
    for i, delta in enumerate(three):
        alike = [delta, Delta("twin", delta.parts), Delta("triplet", delta.parts)]
        gated = route(base, alike, top_k=1, start="normal")
        assert [s["name"] for s in gated.provenance["composed"]["sources"]] == [delta.name, "twin", "triplet"]
        close(out(base, gated), out(base, delta))
        close(out(base, reset(gated, top_k=2)), out(base, delta))
        assert (out(base, gated) - out(base)).abs().max() > 1e-2, i


def test_the_mean_of_all_is_the_merge(base: Base, three: list[Delta]) -> None:
    mean = route(base, three, top_k=3, temperature=1e9)
    want = merge(base, three, "linear")
    close(out(base, mean), out(base, want))
    half = route(base, [three[0].at(0.5), three[1]], top_k=2, temperature=1e9)
    close(out(base, half), out(base, merge(base, [three[0].at(0.5), three[1]], "linear")))


def test_it_saves_loads_resets_and_leaves_its_sources(base: Base, three: list[Delta], tmp_path: Path) -> None:
    before = [d.digest for d in three], base.digest()
    both = route(base, three, seed=4)
    assert route(base, three, seed=4).digest == both.digest != route(base, three, seed=5).digest
    both.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", base)
    assert again.digest == both.digest and torch.equal(out(base, again), out(base, both))
    warm = reset(both, temperature=15.0)
    assert warm.parts[0].method.temperature == 15.0 and warm.digest != both.digest
    assert (out(base, warm) - out(base, both)).abs().max() > 1e-4
    close(out(base, reset(both, top_k=3, temperature=1e9)), out(base, merge(base, three, "linear")))
    assert ([d.digest for d in three], base.digest()) == before
    with pytest.raises(UsageError, match="cannot be changed afterwards"):
        reset(both, start="normal")
    with pytest.raises(UsageError, match="has no gates"):
        reset(three[0], top_k=1)


def test_a_trace_says_who_counted_for_each_token(base: Base, three: list[Delta]) -> None:
    ids = torch.randint(0, 67, (2, 6), generator=torch.Generator().manual_seed(0))
    seen = trace(base, route(base, three), ids)
    assert len(seen) == 14 and all(w.shape == (2, 6, 3) for w in seen.values())
    for w in seen.values():
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 6))
        assert ((w > 0).sum(-1) == 2).all()


def test_what_cannot_be_gated_is_refused(base: Base, three: list[Delta]) -> None:
    for bad, match in (
        (moved(base, SHiRA(), name="s"), "not low-rank"),
        (moved(base, Full(targets="q"), name="f"), "not low-rank"),
        (moved(base, LoRA(targets="embed"), name="e"), "only weights of linear layers"),
        (moved(base, IA3(), name="i"), "not low-rank"),
    ):
        with pytest.raises(UsageError, match=match):
            route(base, [three[0], bad])
    biased = tiny_llama(attention_bias=True)
    with pytest.raises(UsageError, match="only weights of linear layers"):
        route(biased, [moved(biased, LoRA(), name="a"), moved(biased, BitFit(targets="biases"), name="b")])
    with pytest.raises(UsageError, match="nothing to choose between"):
        route(base, three[:1])
    with pytest.raises(UsageError, match="share a name"):
        route(base, [three[0], three[0]])


def test_it_is_served_in_a_mixed_batch_as_ordinary_rows(base: Base, three: list[Delta]) -> None:
    both = route(base, three, start="normal", name="both")
    library = Library(base, budget=1 << 30)
    for d in (both, three[0]):
        library.add(d)
    names = ["both", None, "a", "both", None]
    requests = [
        Request(str(i), tuple(range(3 + i, 9 + 2 * i)), 8, n, Sampling(temperature=0)) for i, n in enumerate(names)
    ]
    e = Engine(base, library, cells=4000)
    for r in requests:
        e.submit(r)
    e.step()
    assert all(live.shared for live in e.live.values()), "gated rows run in the common pass"
    for r in requests:
        e.cancel(r.id)
    together = Engine(base, library, cells=4000).generate(requests)
    for r in requests:
        ids = torch.tensor([r.prompt])
        with torch.no_grad(), base.using({"both": both, "a": three[0], None: None}[r.delta]):
            want = base.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
                eos_token_id=None,
            )  # fmt: skip
        assert together[r.id] == want[0, len(r.prompt) :].tolist(), r.id
