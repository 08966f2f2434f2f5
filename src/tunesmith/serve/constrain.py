# SPDX-License-Identifier: Apache-2.0
"""Answers that must be JSON of a schema: which tokens may come next, from llguidance.

A schema becomes a `Rule` once (kept, so that the next request with it costs nothing); every request walks a `Guide` of
its own through it, so requests with and without schemas share batches. A keyword that the library cannot hold an answer
to is refused, never ignored. Space between the parts of the JSON is limited, as small models can write it without end.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import ResourceError, UsageError

SPACE = r"[\x20\x0A\x0D\x09]{0,16}"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
KEPT = 64
WHERE = "response_format"


class Guide:
    """The way of one answer through a rule."""

    def __init__(self, matcher: Any, specials: Iterable[int], stop: Iterable[int]) -> None:
        self._matcher, self._specials, self._stop = matcher, list(specials), sorted(stop)

    def allowed(self, n: int) -> Tensor:
        """The tokens [n] bool that may come next; those that end an answer wherever it may end.

        Raises UsageError where the rule became too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.zeros(n, bool)
        mask = np.unpackbits(bits, count=min(n, 8 * len(bits)), bitorder="little")
        found[: len(mask)] = mask
        ends = [i for i in self._stop if i < n]
        found[[i for i in self._specials if i < n] + ends] = False
        if self._matcher.is_accepting():
            found[ends] = True
        return torch.from_numpy(found)

    def take(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def over(self) -> bool:
        """Whether the answer is complete: nothing more can come, or it could end and has no token to say so."""
        return bool(self._matcher.is_stopped() or (not self._stop and self._matcher.is_accepting()))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the schema cannot be followed: {_first(self._matcher.get_error())}", where=WHERE)


class Rule:
    """A schema made ready; `start` gives a guide for one answer."""

    def __init__(self, matcher: Any, specials: Iterable[int]) -> None:
        self._matcher, self._specials = matcher, tuple(specials)

    def start(self, stop: Iterable[int]) -> Guide:
        """A guide at the beginning; `stop` are the tokens that end an answer."""
        return Guide(self._matcher.deep_copy(), self._specials, stop)


class Schemas:
    """Makes rules for one tokenizer. May be used from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._rules: OrderedDict[str, Rule] = OrderedDict()

    def rule(self, schema: Mapping[str, Any]) -> Rule:
        """The rule of a JSON schema.

        Raises UsageError that says what is wrong with it, ResourceError without the package llguidance.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ModuleNotFoundError:
            raise ResourceError(
                "the package llguidance is not installed", hint="pip install 'tunesmith[serve]'"
            ) from None
        try:
            key = json.dumps(schema)
            options: Any = {"whitespace_pattern": SPACE, "lenient": False, "coerce_one_of": False}
            grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=options)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the schema cannot be used: {_first(str(error))}", where=WHERE) from None
        with self._lock:
            if key in self._rules:
                self._rules.move_to_end(key)
                return self._rules[key]
            if self._tokens is None:
                self._tokens = _tokens(self.tokenizer)
            matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
            if matcher.is_error():
                raise UsageError(f"the schema cannot be used: {_first(matcher.get_error())}", where=WHERE)
            rule = Rule(matcher, set(self._tokens.eos_tokens))
            first = matcher.deep_copy()
            if not any(first.compute_bitmask()) or first.is_error():
                raise UsageError("the schema cannot be used: no answer can satisfy it", where=WHERE)
            self._rules[key] = rule
            while len(self._rules) > KEPT:
                self._rules.popitem(last=False)
            return rule


def _first(message: str) -> str:
    """The part of the library's message that a caller can use, in one line."""
    return " ".join(message.partition("\n<state>")[0].split())[:400]


def _tokens(tokenizer: Any) -> Any:
    """The library's view of a tokenizer."""
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        try:
            return from_tokenizer(tokenizer, eos_token=_end(tokenizer))
        except (ValueError, OverflowError):
            pass  # a decoder or a normaliser that it does not know: spell the tokens here
    return LLTokenizer(TokenizerWrapper(_Spelled(tokenizer)))


def _end(tokenizer: Any) -> int:
    """A token that ends texts, or some other special one: the library wants one, and `Guide` sets what ends an answer."""
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "unk_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int):
            return found
    return 0


class _Spelled:
    """Any other tokenizer: the bytes of a token are what it adds to a text.

    A token that adds no whole characters has no bytes here, so it is never allowed: answers are right, spelled with fewer
    tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.eos_token_id, self.bos_token_id = _end(tokenizer), getattr(tokenizer, "bos_token_id", None)
        self.tokenizer, n = tokenizer, len(tokenizer)
        specials = {int(i) for i in (getattr(tokenizer, "all_special_ids", None) or ())} | {self.eos_token_id}
        self.special_token_ids = sorted(i for i in specials if i < n)
        before = _spelling(tokenizer, "a")
        texts = [self._decode([*before, i]) for i in range(n)]
        lead = self._decode(before)
        self.tokens = [
            b"" if i in specials or not t.startswith(lead) or "\ufffd" in t else t[len(lead) :].encode()
            for i, t in enumerate(texts)
        ]
        for i in self.special_token_ids:
            self.tokens[i] = f"<special {i}>".encode()

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def __call__(self, text: str | bytes) -> list[int]:
        return _spelling(self.tokenizer, text if isinstance(text, str) else text.decode(errors="replace"))


def _spelling(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
