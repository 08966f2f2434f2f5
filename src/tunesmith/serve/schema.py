# SPDX-License-Identifier: Apache-2.0
"""Requests of the OpenAI-compatible API. A field that is not known is refused: nothing asked for is skipped silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.serve.constrain import ANY_OBJECT
from tunesmith.serve.sampling import MOST_LOGPROBS, Sampling

Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class NamedSchema(_Strict):
    """A JSON schema as OpenAI's client sends it; answers always follow it, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type 'json_schema' and no other")
        return self

    def schema_wanted(self) -> Mapping[str, Any] | None:
        """The schema an answer must follow, None for plain text."""
        if self.json_schema is not None:
            return self.json_schema.body
        return ANY_OBJECT if self.type == "json_object" else None


class StreamOptions(_Strict):
    include_usage: bool = False


class _Common(_Strict):
    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=8)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def stops(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def sampling(self, seed: int, logprobs: int | None) -> Sampling:
        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return Sampling(
            temperature=given(self.temperature, 1.0), top_p=given(self.top_p, 1.0), top_k=given(self.top_k, 0),
            min_p=given(self.min_p, 0.0), repetition=given(self.repetition_penalty, 1.0),
            presence=given(self.presence_penalty, 0.0), frequency=given(self.frequency_penalty, 0.0),
            seed=given(self.seed, seed), logprobs=logprobs, bias={int(k): v for k, v in (self.logit_bias or {}).items()},
        )  # fmt: skip


class ChatRequest(_Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(_Common):
    prompt: Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = False


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]
MOST_TEXTS = 2048


class EmbeddingRequest(_Strict):
    """`truncate` is an extension: cut texts that are too long instead of refusing them."""

    model: Name
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    truncate: bool = False
    user: Annotated[str, Field(max_length=512)] | None = None


class ClassifyRequest(_Strict):
    """Texts, or pairs of them, for a delta with a head."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
    input_pair: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)] | None = None
    truncate: bool = False
    user: Annotated[str, Field(max_length=512)] | None = None


class LoadRequest(_Strict):
    """Make a saved delta known, below the folder the server was started with."""

    name: Name
    folder: Annotated[str, Field(min_length=1, max_length=4096)]


class PinRequest(_Strict):
    on: bool = True


class Trouble(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problem(BaseModel):
    """The body of every response that is no success."""

    error: Trouble
