# SPDX-License-Identifier: Apache-2.0
"""Decoders as served models: beside ordinary rows, to the tokens that `generate` gives, counted in cells that suffice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from serve_cases import moved, tiny_llama
from serve_http import Served, asked

from tunesmith.core.base import Base
from tunesmith.core.decoding import Decoder, digest
from tunesmith.core.delta import Delta
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.decode import combine, contrastive, handoff
from tunesmith.deltas import LoRA
from tunesmith.evaluate.generate import generate
from tunesmith.serve import guided
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Request
from tunesmith.serve.sampling import Sampling
from tunesmith.serve.selftest import selftest


@pytest.fixture(scope="module")
def large() -> Base:
    return tiny_llama(seed=4, num_hidden_layers=4)


def ask(id: str, delta: str | None, n: int = 5, new: int = 7, **more: Any) -> Request:
    first = sum(map(ord, id))
    prompt = tuple((first + 7 * i) % 67 for i in range(n))
    return Request(id, prompt, new, delta, more.pop("sampling", Sampling(temperature=0)), **more)


def library(base: Base, decoders: dict[str, Decoder], *deltas: Delta) -> Library:
    made = Library(base, budget=1 << 30)
    for d in deltas:
        made.add(d)
    for name, decoder in decoders.items():
        made.guide(decoder, name)
    return made


def test_their_rows_stand_beside_ordinary_ones(llama: Base, large: Base) -> None:
    a, b = moved(llama, LoRA(rank=2), seed=1, name="a"), moved(llama, LoRA(rank=3), seed=2, name="b")
    decoders: dict[str, Decoder] = {
        "up": combine(large, [(1.0, (llama, a), llama)]), "more": combine(llama, [(1.5, a), (0.5, b)]),
        "guard": handoff(llama, b, 3), "against": contrastive(large, llama),
    }  # fmt: skip
    lib = library(llama, decoders, a, b)
    requests = [ask(f"{n}{i}", n, 4 + i) for n in (*decoders, "a", "b", None) for i in range(2)]
    e = Engine(llama, lib, cells=4000)
    together = e.generate(requests)
    for r in requests:
        if r.delta in decoders:
            want = dict(generate(decoders[r.delta], [r.prompt], max_new_tokens=r.new, stop_ids=[]))[0]
            assert together[r.id] == want, r.id
        else:
            assert together[r.id] == Engine(llama, lib, cells=4000).generate([r])[r.id]
    e.pool.check()
    assert e.free == e.pool.cells and len({tuple(t) for t in together.values()}) > 8
    assert lib.find("up").caches == 4, "the large model has twice the layers"
    with pytest.raises(UsageError, match="is taken"):
        lib.guide(decoders["up"], "a")
    with pytest.raises(UsageError, match="is a decoder"):
        lib.view("up")
    proof = selftest(llama, lib, [[1, 2, 3], [4, 5]], new=5)
    assert proof.holds and set(proof.live_only) == set(decoders)


def test_cells_suffice_and_come_back(llama: Base) -> None:
    a = moved(llama, LoRA(rank=1, targets="q"), seed=1, name="a")
    lib = library(llama, {"more": combine(llama, [(2.0, a)]), "guard": handoff(llama, a, 2)}, a)
    e = Engine(llama, lib, cells=70, requests=6)
    requests = [ask(str(i), ["more", "guard", "a", None][i % 4], 3 + i % 5, 4 + i % 7) for i in range(16)]
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    for r in requests:
        e.submit(r)
    while not e.idle:
        for event in e.step():
            assert event.error is None
            if event.chosen is not None:
                answers[event.id].append(event.chosen.token)
        e.pool.check()
    assert e.free == 70 and all(len(answers[r.id]) == r.new for r in requests)
    with pytest.raises(TunesmithError, match="do not fit into 70 cells"):
        e.submit(ask("x", "more", 20, 30))


def test_settings_and_ends_are_the_requests_own(llama: Base) -> None:
    a = moved(llama, LoRA(rank=2), seed=1, name="a")
    lib = library(llama, {"more": combine(llama, [(1.5, a)])}, a)
    free = Engine(llama, lib, cells=900).generate([ask("r", "more")])["r"]
    cut = Engine(llama, lib, cells=900).generate([ask("r", "more", stop=frozenset({free[2]}))])["r"]
    assert cut == free[: free.index(free[2])]
    hot = [ask("r", "more", sampling=Sampling(temperature=2.0, seed=s)) for s in (1, 1, 2)]
    one, two, three = (Engine(llama, lib, cells=900).generate([r])["r"] for r in hot)
    assert one == two != three
    e = Engine(llama, lib, cells=900)
    e.submit(ask("gone", "more", new=50))
    e.step()
    assert e.cancel("gone") and e.free == 900


def test_they_are_read_from_files_beside_the_deltas(llama: Base, tmp_path: Path) -> None:
    a = moved(llama, LoRA(rank=2), seed=1, name="a")
    a.layout = {"stop": ["x"]}
    a.save(tmp_path / "a")
    specs: dict[str, dict[str, Any]] = {
        "more": {"kind": "combine", "terms": [{"weight": 1.5, "tuned": {"delta": "a"}}], "top_p": 0.9},
        "weak": {"kind": "combine", "terms": [{"weight": -0.5, "tuned": {"delta": "a"}, "reference": None}]},
        "guard": {"kind": "handoff", "tuned": {"delta": "a"}, "k": 4, "recompute": False},
        "bad-kind": {"kind": "sum", "terms": []}, "bad-key": {"kind": "handoff", "tuned": {"delta": "a"}, "K": 4},
        "bad-name": {"kind": "handoff", "tuned": {"delta": "b"}}, "bad-term": {"kind": "combine", "terms": [{}]},
        "bad-model": {"kind": "handoff", "tuned": "a"}, "bad-none": {"kind": "handoff"},
    }  # fmt: skip
    for name, spec in specs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / guided.FILE).write_text(json.dumps({"format": guided.FORMAT, **spec}))
    lib = Library(llama, budget=1 << 30)
    refused = {p.name: str(e) for p, e in lib.scan(tmp_path)}
    assert set(refused) == {n for n in specs if n.startswith("bad")}
    assert "no entry 'K'" in refused["bad-key"] and "no delta 'b'" in refused["bad-name"]
    assert set(lib.entries) == {"a", "more", "weak", "guard"} and lib.find("more").layout == {"stop": ["x"]}
    got = Engine(llama, lib, cells=900).generate([ask(n, n) for n in ("more", "weak", "guard")])
    for name, want in (
        ("more", combine(llama, [(1.5, a)], top_p=0.9)), ("weak", combine(llama, [(-0.5, a, None)])),
        ("guard", handoff(llama, a, 4, recompute=False)),
    ):  # fmt: skip
        assert got[name] == dict(generate(want, [ask(name, name).prompt], max_new_tokens=7, stop_ids=[]))[0]


def test_a_model_of_another_base_is_opened_by_name(llama: Base, large: Base, tmp_path: Path) -> None:
    delta = moved(large, LoRA(rank=1), seed=2)
    delta.save(tmp_path / "up" / "theirs")
    spec = {"format": guided.FORMAT, "kind": "combine", "terms": [
        {"weight": 1.0, "tuned": {"model": "big", "delta": "theirs"}, "reference": {"model": "big"}}]}  # fmt: skip
    (tmp_path / "up" / guided.FILE).write_text(json.dumps(spec))
    asked: list[str] = []

    def opened(name: str) -> Base:
        asked.append(name)
        return large

    made = guided.read(tmp_path / "up" / guided.FILE, Library(llama, budget=1 << 30), opened)
    assert asked == ["big"] and digest(made) == digest(combine(llama, [(1.0, (large, delta), large)]))


def test_they_are_models_of_the_api(base: Base, tmp_path: Path) -> None:
    delta = moved(base, LoRA(rank=2), seed=3, name="d")
    delta.save(tmp_path / "d")
    (tmp_path / "guarded").mkdir()
    spec = {"format": guided.FORMAT, "kind": "handoff", "tuned": {"delta": "d"}, "k": 4}
    (tmp_path / "guarded" / guided.FILE).write_text(json.dumps(spec))
    served = Served(base, tmp_path)
    try:
        found: Any = {m.id: m for m in served.client().models.list()}["guarded"]
        assert found.methods == ["handoff"] and found.fingerprint == digest(handoff(base, delta, 4))
        text = asked(served.client(), "guarded").choices[0].message.content
        pieces = asked(served.client(), "guarded", stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in pieces if c.choices) == text
        messages = [{"role": "user", "content": "hello there"}]
        ids = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        new = dict(generate(handoff(base, delta, 4), [ids], max_new_tokens=12, stop_ids=[]))[0]
        assert text == base.tokenizer.decode(new, skip_special_tokens=True)
        assert text != asked(served.client(), "d").choices[0].message.content and served.settled()
    finally:
        served.close()


def test_digests_tell_decoders_apart(llama: Base) -> None:
    a, b = moved(llama, LoRA(rank=2), seed=1), moved(llama, LoRA(rank=2), seed=2)
    made = [combine(llama, [(1.0, a)]), combine(llama, [(1.1, a)]), combine(llama, [(1.0, b)]), handoff(llama, a, 3),
            handoff(llama, a, math.inf), combine(llama, [(1.0, a)], top_p=0.9)]  # fmt: skip
    assert len({digest(d) for d in made}) == len(made)
    assert digest(combine(llama, [(1.0, a)])) == digest(made[0])
