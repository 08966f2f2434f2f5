# SPDX-License-Identifier: Apache-2.0
"""`response_format` through the API, as OpenAI's own client sends it."""

from __future__ import annotations

import json
import threading
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from serve_http import Served, asked

Word = Field(max_length=8)


class Item(BaseModel):
    kind: Literal["book", "pen"]
    count: int = Field(ge=0, le=99)


class Order(BaseModel):
    """What a customer wants."""

    name: str = Word
    express: bool
    items: list[Item] = Field(min_length=1, max_length=2)
    note: str | None = Word


def ticket(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "ticket", "strict": True, "schema": schema}}


def test_the_clients_own_parser_gets_its_model(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "order"}]
    for seed, model in enumerate(("tiny", "d0", "d3")):
        answer = served.client().chat.completions.parse(
            model=model, messages=messages, response_format=Order, max_tokens=400, seed=seed, temperature=1.2
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Order)


def test_schemas_and_free_answers_share_batches(served: Served) -> None:
    schemas: list[dict[str, Any] | None] = [
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
        {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x"],
         "additionalProperties": False},
        None,
    ]  # fmt: skip
    alone = asked(served.client(), "d1", "free", max_tokens=30).choices[0].message.content
    got: dict[int, str] = {}

    def run(i: int) -> None:
        schema, stream = schemas[i % 3], bool(i % 2)
        more: dict[str, Any] = {"stream": stream, "max_tokens": 30}
        if schema is not None:
            more |= {"response_format": ticket(schema), "temperature": 1.3, "seed": i, "max_tokens": 200}
        answer = asked(served.client(), "d1", "free", **more)
        if stream:
            got[i] = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
        else:
            got[i] = answer.choices[0].message.content

    threads = [threading.Thread(target=run, args=(i,)) for i in range(18)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert len(got) == 18
    for i, text in got.items():
        schema = schemas[i % 3]
        if schema is None:
            assert text == alone
        else:
            jsonschema.validate(json.loads(text), schema)
    assert served.settled()


def test_log_probabilities_are_the_models_own(served: Served) -> None:
    answer = asked(served.client(), response_format=ticket({"const": "fixed"}), logprobs=True, max_tokens=60)
    assert json.loads(answer.choices[0].message.content) == "fixed"
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def test_text_is_no_constraint(served: Served) -> None:
    plain = asked(served.client(), max_tokens=8).choices[0].message.content
    assert asked(served.client(), max_tokens=8, response_format={"type": "text"}).choices[0].message.content == plain


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "strnig"}, "strnig"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ],
)
def test_a_schema_that_cannot_be_used_is_told(served: Served, schema: dict[str, Any], text: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            asked(served.client(), response_format=ticket(schema), stream=stream)
        assert text in error.value.message and error.value.param == "response_format"
    assert served.settled()
