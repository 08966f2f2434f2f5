# SPDX-License-Identifier: Apache-2.0
"""Answers under a schema: whatever the model would rather write, the text is JSON that validates."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from serve_cases import moved, tiny_llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tunesmith.core.base import Base
from tunesmith.core.errors import UsageError
from tunesmith.deltas import LoRA, PrefixTuning
from tunesmith.serve.constrain import ANY_OBJECT, Schemas
from tunesmith.serve.engine import Engine
from tunesmith.serve.library import Library
from tunesmith.serve.requests import Event, Request
from tunesmith.serve.sampling import Sampling
from tunesmith.serve.text import Writer

WORD = {"type": "string", "maxLength": 6}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {"rows": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"$ref": "#/$defs/row"}}},
        "required": ["rows"],
        "additionalProperties": False,
        "$defs": {
            "row": {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}, "tag": {"enum": ["a", "b", None]}},
                "required": ["ok", "tag"],
                "additionalProperties": False,
            }
        },
    },
    "choice": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"const": 7}, "maxItems": 2}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "enum": {"enum": ["yes", "no", 'with "quotes" and \\ and /']},
    "letters": {"enum": ["déjà vu", "日本", "🙂"]},
    "number": {"type": "number", "minimum": -2, "maximum": 2, "multipleOf": 0.25},
    "integer": {"type": "integer", "minimum": 5, "maximum": 99999},
}


@pytest.fixture(scope="module")
def base() -> Base:
    found = tiny_llama(vocab_size=310, max_position_embeddings=512, eos_token_id=None, bos_token_id=None)
    return Base(found.model, tokenizer=byte_tokenizer(), name="tiny", family="causal-lm")


def text_of(base: Base, tokens: list[int]) -> str:
    writer = Writer(base.tokenizer)
    return "".join(writer.push(t) for t in tokens) + writer.finish()


def run(engine: Engine, requests: list[Request]) -> dict[str, tuple[list[int], str]]:
    """Tokens and reason of every answer."""
    out: dict[str, tuple[list[int], str]] = {}
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    for r in requests:
        engine.submit(r)
    while not engine.idle:
        events: list[Event] = engine.step()
        for e in events:
            assert e.error is None, e.error
            tokens[e.id] += [e.chosen.token] if e.chosen is not None else []
            if e.reason is not None:
                out[e.id] = (tokens[e.id], e.reason)
    engine.pool.check()
    return out


def test_every_answer_validates_and_the_other_rows_are_undisturbed(base: Base) -> None:
    library = Library(base, 1 << 30)
    for name, method in (("lora", LoRA(rank=2)), ("prefix", PrefixTuning(tokens=2))):
        library.add(moved(base, method, name=name), name)
    schemas, rng = Schemas(base.tokenizer), random.Random(0)
    end = frozenset({base.tokenizer.eos_token_id})
    prompts = [tuple(rng.randrange(290) for _ in range(5)) for _ in range(200)]
    requests, free = [], []
    for i, (name, schema) in enumerate(SCHEMAS.items()):
        for seed in range(6):
            at = Sampling(temperature=(0.0, 0.7, 1.5)[seed % 3], seed=seed)
            delta = (None, "lora", "prefix")[(i + seed) % 3]
            requests.append(
                Request(f"{name}#{seed}", prompts[10 * i + seed], 300, delta, at, end, rule=schemas.rule(schema))
            )
    for seed, delta in enumerate((None, "lora")):
        free.append(Request(f"free#{seed}", prompts[100 + seed], 40, delta, Sampling(seed=seed)))
    found = run(Engine(base, library, cells=40_000), requests + free)
    for r in requests:
        tokens, reason = found[r.id]
        assert reason == "stop", (r.id, text_of(base, tokens))
        jsonschema.validate(json.loads(text_of(base, tokens)), SCHEMAS[r.id.partition("#")[0]])
    for r in free:
        assert Engine(base, library, cells=4000).generate([r])[r.id] == found[r.id][0]


def test_without_a_token_that_ends_it_an_answer_ends_when_it_is_whole(base: Base) -> None:
    rule = Schemas(base.tokenizer).rule(SCHEMAS["object"])
    requests = [Request(str(s), (1, 2, 3), 300, None, Sampling(seed=s), rule=rule) for s in range(4)]
    for tokens, reason in run(Engine(base, Library(base, 1)), requests).values():
        assert reason == "stop"
        jsonschema.validate(json.loads(text_of(base, tokens)), SCHEMAS["object"])


def test_what_is_cut_by_the_limit_says_so(base: Base) -> None:
    rule = Schemas(base.tokenizer).rule(SCHEMAS["nested"])
    found = run(Engine(base, Library(base, 1)), [Request("a", (1, 2), 6, rule=rule)])
    assert found["a"][1] == "length" and len(found["a"][0]) == 6


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "strnig"}, "strnig"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/x"}}}, "http://127.0.0.1/x"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "#"}, "no answer can satisfy it"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "greater than maximum"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"const": "\ud800"}, "not JSON serializable"),
        ({"enum": []}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused(base: Base, schema: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match="schema cannot be used") as error:
        Schemas(base.tokenizer).rule(schema)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_depth_is_limited_without_a_crash(base: Base) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    with pytest.raises(UsageError, match="recursion limit"):
        Schemas(base.tokenizer).rule(deep)


def test_a_rule_is_made_once_and_old_ones_are_let_go(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.serve.constrain.KEPT", 2)
    schemas = Schemas(base.tokenizer)
    first = schemas.rule({"const": 1})
    assert schemas.rule({"const": 1}) is first
    schemas.rule({"const": 2})
    schemas.rule({"const": 3})
    assert schemas.rule({"const": 1}) is not first


class PlainTokenizer:
    """A tokenizer without a Rust one inside: characters, and a few longer pieces."""

    all_special_ids = (0,)
    eos_token_id = 0

    def __init__(self) -> None:
        self.pieces = ["<end>", '{"', '":', "tru", *(chr(c) for c in range(32, 127)), "\ufffd"]

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        unknown = len(self.pieces) - 1
        return {"input_ids": [self.pieces.index(c) if c in self.pieces else unknown for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids if i or not skip_special_tokens)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Unigram pieces with the word mark, bytes as a way out."""
    pieces = ["<unk>", "</s>", "\u2581", "\u2581{", *'"{}:,[]-.+abcdefghijklmnopqrstuvwxyz0123456789']
    pieces += [f"<0x{b:02X}>" for b in range(256)]
    inner = Tokenizer(models.Unigram([(p, -1.0) for p in pieces], unk_id=0, byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_tokenizer, PlainTokenizer, sentencepiece_like])
def test_any_tokenizer_will_do(make: Any) -> None:
    tokenizer = make()
    schemas, g = Schemas(tokenizer), torch.Generator().manual_seed(0)
    n = len(tokenizer) + 7  # models often have more rows than their tokenizer has tokens
    for schema in (SCHEMAS["object"], SCHEMAS["nested"], SCHEMAS["enum"]):
        for _ in range(5):
            guide, tokens = schemas.rule(schema).start({tokenizer.eos_token_id}), []
            while not guide.over and len(tokens) < 400:
                allowed = guide.allowed(n)
                assert allowed.any() and not allowed[len(tokenizer) :].any()
                token = int(torch.multinomial(allowed.double(), 1, generator=g))
                if token == tokenizer.eos_token_id:
                    break
                guide.take(token)
                tokens.append(token)
            writer = Writer(tokenizer)
            text = "".join(writer.push(t) for t in tokens) + writer.finish()
            jsonschema.validate(json.loads(text), schema)


def test_any_object_is_what_json_object_asks_for(base: Base) -> None:
    guide = Schemas(base.tokenizer).rule(ANY_OBJECT).start(())
    first = [base.tokenizer.decode([int(i)]) for i in guide.allowed(300).nonzero().flatten()]
    assert all(t.lstrip().startswith("{") or not t.strip() for t in first) and any("{" in t for t in first)
