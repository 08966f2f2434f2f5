# SPDX-License-Identifier: Apache-2.0
"""The engine: what a request is answered depends on nothing but the request; nothing leaks and nothing overflows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from serve_cases import ask, engine, moved, tiny_llama

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch, DeltaError, ResourceError, UsageError
from tunesmith.deltas import IA3, SSF, BitFit, Bone, DoRA, LoRA, PrefixTuning, PromptTuning, SHiRA
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling


def written_by_transformers(base: Base, prompt: tuple[int, ...], new: int, delta: Delta | None = None) -> list[int]:
    with torch.no_grad(), base.using(delta):
        ids = torch.tensor([prompt])
        out = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


KINDS = {"lora": LoRA(rank=2), "wide": LoRA(rank=5), "ia3": IA3(), "dora": DoRA(rank=2), "bone": Bone(block=4),
         "sparse": SHiRA(), "ssf": SSF(targets="all-linear"), "bias": BitFit(targets="biases"), "prefix": PrefixTuning(tokens=3),
         "prompt": PromptTuning(tokens=2)}  # fmt: skip


def test_a_mixed_batch_writes_what_each_writes_alone_and_merged() -> None:
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    before = base.digest()
    deltas = {n: moved(base, m, seed=i, name=n) for i, (n, m) in enumerate(KINDS.items())}
    requests = [ask(n, seed=i, n=4 + i, delta=n) for i, n in enumerate(deltas)] + [ask("base", seed=40)]
    together = engine(base, deltas).generate(requests)
    for r in requests:
        alone = engine(base, deltas, chunk=3).generate([r])
        assert together[r.id] == alone[r.id], r.id
        if r.delta in ("prefix", "prompt"):
            continue
        assert together[r.id] == written_by_transformers(base, r.prompt, r.new, deltas.get(r.delta or "")), r.id
        if r.delta is not None:
            merged = base.merged(deltas[r.delta])
            assert together[r.id] == written_by_transformers(merged, r.prompt, r.new), r.id
    assert len({tuple(a) for a in together.values()}) > 6  # the deltas bite
    assert base.digest() == before and not any("forward" in m.__dict__ for m in base.model.modules())


def test_rows_with_prefixes_are_those_of_the_models_own_pass(llama: Base) -> None:
    for method in (PrefixTuning(tokens=3), PromptTuning(tokens=2)):
        delta = moved(llama, method, size=1.0)
        r = ask("p", delta="p")
        ids = list(r.prompt)
        with torch.no_grad(), llama.using(delta):
            for _ in range(r.new):
                ids.append(int(llama.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert engine(llama, {"p": delta}).generate([r])["p"] == ids[len(r.prompt) :]


def test_another_architecture_is_served_by_its_own_pass() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    base = Base(model, family="causal-lm")
    delta = moved(base, LoRA(rank=2))
    e = engine(base, {"d": delta})
    assert e.decoder is None and e.why_slow
    got = e.generate([ask("a", delta="d"), ask("b", 1)])
    assert got["a"] == written_by_transformers(base, ask("a").prompt, 8, delta)
    assert got["b"] == written_by_transformers(base, ask("b", 1).prompt, 8)


@pytest.mark.parametrize("policy", ["fcfs", "cluster", "fair"])
def test_nothing_overflows_and_nothing_leaks(llama: Base, policy: str) -> None:
    deltas = {f"d{i}": moved(llama, LoRA(rank=i + 1, targets="q"), seed=i) for i in range(4)}
    rng = random.Random(3)
    e = engine(llama, deltas, cells=120, requests=6, chunk=7, policy=policy)
    requests = [
        ask(str(i), seed=i, n=rng.randrange(1, 20), new=rng.randrange(1, 12), delta=rng.choice([None, *deltas]))
        for i in range(25)
    ]
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    ends: dict[str, str] = {}
    todo = list(requests)
    while todo or not e.idle:
        for _ in range(rng.randrange(3)):
            if todo:
                e.submit(todo.pop())
        for event in e.step():
            if event.chosen is not None:
                answers[event.id].append(event.chosen.token)
            if event.reason is not None:
                assert event.id not in ends
                ends[event.id] = event.reason
        e.pool.check()
    assert set(ends) == {r.id for r in requests} and set(ends.values()) == {"length"}
    assert e.free == 120 and not e.library._users
    for r in requests[:6]:
        assert answers[r.id] == engine(llama, deltas).generate([r])[r.id]


def test_a_cancelled_request_frees_its_cells_and_disturbs_nobody(llama: Base) -> None:
    e = engine(llama)
    e.submit(ask("keep", new=6))
    e.submit(ask("drop", 1, new=50))
    events = e.step() + e.step()
    assert e.cancel("drop") and not e.cancel("drop")
    while not e.idle:
        events += e.step()
    e.pool.check()
    assert e.free == e.pool.cells
    kept = [x.chosen.token for x in events if x.id == "keep" and x.chosen]
    assert kept == written_by_transformers(llama, ask("keep").prompt, 6)


def test_an_answer_ends_at_a_stop_token_and_sampling_is_the_requests_own(llama: Base) -> None:
    free = engine(llama).generate([ask("a")])["a"]
    stopped = engine(llama).generate([ask("a", stop=frozenset({free[3]}))])["a"]
    assert stopped == free[: free.index(free[3])]
    hot = [ask(str(i), 5, new=10, sampling=Sampling(temperature=1.5, seed=i)) for i in range(4)]
    together = engine(llama).generate(hot)
    assert together == {r.id: engine(llama, chunk=2).generate([r])[r.id] for r in hot}
    assert len({tuple(a) for a in together.values()}) == 4


def test_what_can_never_be_served_is_refused_at_once(llama: Base) -> None:
    e = engine(llama, cells=30)
    with pytest.raises(ResourceError, match="do not fit into 30 cells"):
        e.submit(ask("big", n=20, new=20))
    with pytest.raises(UsageError, match="more than the model's 128"):
        engine(llama).submit(ask("long", n=100, new=60))
    with pytest.raises(UsageError, match="no delta 'nobody'"):
        e.submit(ask("x", delta="nobody"))
    with pytest.raises(UsageError, match="from 0 to 66"):
        e.submit(Request("y", (1, 67), 2))
    e.submit(ask("twice", new=2))
    with pytest.raises(UsageError, match="in use"):
        e.submit(ask("twice"))


def test_deltas_are_read_when_asked_for_and_let_go_when_memory_is_short(llama: Base, tmp_path: Path) -> None:
    for i in range(5):
        moved(llama, LoRA(rank=2), seed=i, name=f"d{i}").save(tmp_path / f"d{i}")
    library = Library(llama, budget=1)
    assert library.scan(tmp_path) == [] and set(library.entries) == {f"d{i}" for i in range(5)} and not library.held
    e = Engine(llama, library, cells=4000)
    first = e.generate([ask("a", delta="d0")])["a"]
    assert library.loads == 1 and not library.held  # over budget and nobody needs it
    library.budget = 1 << 30
    e.generate([ask(str(i), delta=f"d{i}") for i in range(5)])
    assert library.loads == 6 and len(library.held) == 5
    library.pin("d0")
    library.budget = library.held_bytes // 5
    e.generate([ask("b", delta="d3")])
    assert library.held == [library.find("d0").digest]
    assert e.generate([ask("c", delta="d0")])["c"] == first


def test_a_delta_written_anew_takes_effect_for_the_next_request_only(llama: Base, tmp_path: Path) -> None:
    old, new = moved(llama, LoRA(rank=2), seed=1, name="d"), moved(llama, LoRA(rank=3), seed=2, name="d")
    old.save(tmp_path / "d")
    library = Library(llama, budget=1 << 30)
    library.scan(tmp_path)
    e = Engine(llama, library, cells=4000)
    e.submit(ask("before", delta="d"))
    events = e.step()
    new.save(tmp_path / "d")
    e.submit(ask("after", delta="d"))
    while not e.idle:
        events += e.step()
    got = {i: [x.chosen.token for x in events if x.id == i and x.chosen] for i in ("before", "after")}
    assert got["before"] == written_by_transformers(llama, ask("x").prompt, 8, old)
    assert got["after"] == written_by_transformers(llama, ask("x").prompt, 8, new)
    assert e.free == e.pool.cells


def test_what_must_not_be_served_is_refused_with_the_reason(llama: Base, tmp_path: Path) -> None:
    other = tiny_llama(seed=7)
    moved(other, LoRA(rank=2), name="foreign").save(tmp_path / "foreign")
    moved(llama, LoRA(rank=2), name="good").save(tmp_path / "good")
    Delta.create(llama, LoRA(rank=2), name="blank").save(tmp_path / "blank")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "delta.json").write_text("{")
    library = Library(llama, budget=1 << 30)
    refused = {p.name: e for p, e in library.scan(tmp_path)}
    assert set(refused) == {"foreign", "broken"} and isinstance(refused["foreign"], BaseMismatch)
    with pytest.raises(DeltaError, match="every change it makes is zero"):
        library.acquire("blank")
    e = Engine(llama, library, cells=4000)
    e.submit(ask("a", delta="good"))
    e.submit(ask("b", delta="blank"))
    (tmp_path / "good" / "delta.safetensors").write_bytes(b"damaged")
    ends = {}
    while not e.idle:
        ends.update({x.id: x for x in e.step() if x.reason})
    assert {k: x.reason for k, x in ends.items()} == {"a": "error", "b": "error"}
    assert isinstance(ends["a"].error, DeltaError) and e.free == e.pool.cells


def test_a_delta_removed_while_in_use_finishes_and_is_gone(llama: Base) -> None:
    delta = moved(llama, LoRA(rank=2))
    e = engine(llama, {"d": delta})
    e.submit(ask("a", delta="d"))
    events = e.step()
    e.library.remove("d")
    with pytest.raises(UsageError, match="no delta 'd'"):
        e.submit(ask("b", delta="d"))
    while not e.idle:
        events += e.step()
    assert [x.chosen.token for x in events if x.chosen] == written_by_transformers(llama, ask("a").prompt, 8, delta)


def test_what_would_be_late_is_given_up_and_the_rest_is_served(llama: Base) -> None:
    now = [0.0]
    e = engine(llama, requests=1, first_token=5.0, clock=lambda: now[0])
    for i in range(4):
        e.submit(ask(str(i), seed=i, new=3, arrived=float(i)))
    ends: dict[str, str] = {}
    while not e.idle:
        ends.update({x.id: str(x.error or x.reason) for x in e.step() if x.reason})
        now[0] += 2.5
    # four at once are more than can join, so the newest goes first; when it is done the others would be late
    assert [i for i, why in ends.items() if why == "length"] == ["3"]
    assert all("too late" in ends[i] for i in "012") and e.free == e.pool.cells


def test_a_removed_delta_in_the_queue_does_not_stop_other_requests(llama: Base) -> None:
    e = engine(llama, {"gone": moved(llama, LoRA(rank=2)), "here": moved(llama, LoRA(rank=3), seed=1)})
    e.submit(ask("a", delta="gone"))
    e.library.remove("gone")
    e.submit(ask("b", delta="here", new=2))
    ends: dict[str, str] = {}
    while not e.idle:
        ends.update({x.id: x.reason for x in e.step() if x.reason})
    assert ends == {"a": "error", "b": "length"}
