# SPDX-License-Identifier: Apache-2.0
"""Generation: batching changes nothing, the cache changes nothing, rows end where they should, and errors are ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import DataError, DeltaError, UsageError
from tunesmith.core.reading import Cached, shared_length
from tunesmith.core.toys import toys
from tunesmith.data import Dataset
from tunesmith.data.dataset import DataReport
from tunesmith.deltas.hidden.ia3 import IA3
from tunesmith.deltas.output.head import Head
from tunesmith.deltas.prompt.prefix_tuning import PrefixTuning
from tunesmith.deltas.prompt.prompt_tuning import PromptTuning
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.evaluate.generate import chat, decode, generate, stream
from tunesmith.evaluate.score import constant, examples, option_logprobs, predict, row_nll

VOCAB = 60
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15], [16], [17, 18, 19, 20, 21]]


def stirred(base: Base, delta: Delta, size: float = 0.3) -> Delta:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(torch.randn(t.shape, generator=g) * size)
    return delta


@pytest.fixture
def llama() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Base(LlamaForCausalLM(config).eval(), name="tiny-llama", family="causal-lm")


@pytest.fixture
def gpt2() -> Base:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=40, initializer_range=0.4, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return Base(GPT2LMHeadModel(config).eval(), name="tiny-gpt2", family="causal-lm")


def byte_tokenizer() -> Any:
    vocab = {c: i for i, c in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Fast(tokenizer_object=inner, eos_token="<end>")


def byte_base() -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Base(LlamaForCausalLM(config).eval(), tokenizer=byte_tokenizer(), name="bytes", family="causal-lm")


def data(kind: str, rows: list[dict[str, Any]], labels: list[str] | None = None) -> Dataset:
    return Dataset(kind, rows, labels, DataReport("test", kind, "test.jsonl", len(rows), len(rows), ""))


def by_hand(base: Base, prompt: list[int], n: int, stop: set[int]) -> list[int]:
    """Greedy decoding with nothing but the model's forward on the whole row."""
    ids, out = list(prompt), []
    with torch.no_grad():
        for _ in range(n):
            token = int(base.model(input_ids=torch.tensor([ids]))["logits"][0, -1].argmax())
            if token in stop:
                break
            out.append(token)
            ids.append(token)
    return out


def methods(name: str) -> Any:
    return {
        "none": None,
        "lora": LoRA(rank=2),
        "ia3": IA3(),
        "prompt": PromptTuning(tokens=3),
        "prefix": PrefixTuning(tokens=3),
    }[name]


@pytest.mark.parametrize("kind", ["none", "lora", "ia3", "prompt", "prefix"])
def test_batched_and_cached_equals_by_hand(llama: Base, kind: str) -> None:
    method = methods(kind)
    delta = stirred(llama, Delta.create(llama, method)) if method else None
    plain = dict(generate(llama, PROMPTS, max_new_tokens=9, stop_ids=(2,)))
    with llama.using(delta):
        want = [by_hand(llama, p, 9, {2, 5}) for p in PROMPTS]
        got = dict(generate(llama, PROMPTS, max_new_tokens=9, stop_ids=(2, 5), batch_size=3))
        one = dict(generate(llama, PROMPTS, max_new_tokens=9, stop_ids=(2, 5), batch_size=1))
    assert [got[i] for i in range(len(PROMPTS))] == want == [one[i] for i in range(len(PROMPTS))]
    if method:
        assert want != [plain[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", ["none", "prompt"])
def test_learned_positions(gpt2: Base, kind: str) -> None:
    method = methods(kind)
    with gpt2.using(stirred(gpt2, Delta.create(gpt2, method)) if method else None):
        got = dict(generate(gpt2, PROMPTS, max_new_tokens=6, stop_ids=()))
        assert [got[i] for i in range(len(PROMPTS))] == [by_hand(gpt2, p, 6, set()) for p in PROMPTS]


@pytest.mark.parametrize("index", [0, 3])
def test_models_without_a_cache(index: int) -> None:
    """The toy language model takes a mask, the toy sequence model none and is not causal."""
    base = toys()[index]
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10], [11]]
    got = dict(generate(base, prompts, max_new_tokens=5, stop_ids=(0,)))
    for i, p in enumerate(prompts):
        ids, out = list(p), []
        for _ in range(5):
            with torch.no_grad():
                found = base.model(torch.tensor([ids]))
            token = int((found["logits"] if isinstance(found, dict) else found)[0, -1].argmax())
            if token == 0:
                break
            out.append(token)
            ids.append(token)
        assert got[i] == out


def test_finished_rows_leave_the_batch_and_come_at_once(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(generate(llama, PROMPTS, max_new_tokens=12, stop_ids=()))
    stop = whole[3][1]
    ends = {i: (ids.index(stop) if stop in ids else 12) for i, ids in whole.items()}
    assert len(set(ends.values())) > 1
    sizes: list[int] = []
    feed = Cached.feed
    monkeypatch.setattr(
        Cached, "feed", lambda self, ids, mask, *, last: sizes.append(len(ids)) or feed(self, ids, mask, last=last)
    )
    seen = list(generate(llama, PROMPTS, max_new_tokens=12, stop_ids=(stop,)))
    assert [ends[i] for i, _ in seen] == sorted(ends.values())
    assert {i: ids for i, ids in seen} == {i: ids[: ends[i]] for i, ids in whole.items()}
    assert sizes == [sum(e >= step for e in ends.values()) for step in range(len(sizes))]
    early = generate(llama, PROMPTS, max_new_tokens=12, stop_ids=(stop,))
    sizes.clear()
    next(early)
    assert len(sizes) == min(ends.values()) + 1


def test_sampling_does_not_depend_on_the_batch(llama: Base) -> None:
    args: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": (2,), "temperature": 1.5}
    one = dict(generate(llama, PROMPTS, batch_size=1, seed=3, **args))
    assert one == dict(generate(llama, PROMPTS, batch_size=5, seed=3, **args))
    assert one != dict(generate(llama, PROMPTS, batch_size=5, seed=4, **args))
    assert one != dict(generate(llama, PROMPTS, max_new_tokens=8, stop_ids=(2,)))


def test_stream_gives_the_same_tokens_and_respects_positions(llama: Base) -> None:
    got = list(stream(llama, PROMPTS[0], max_new_tokens=7, stop_ids=(2,)))
    assert got == dict(generate(llama, [PROMPTS[0]], max_new_tokens=7, stop_ids=(2,)))[0]
    long = list(range(3, 3 + 50)) + [3] * 10
    assert len(list(stream(llama, long, max_new_tokens=20, stop_ids=()))) == 4
    with pytest.raises(UsageError, match="64 positions"):
        stream(llama, [3] * 64, max_new_tokens=1, stop_ids=())


def test_leaves_flags_and_grad_mode_alone(llama: Base) -> None:
    llama.model.train()
    rows = generate(llama, PROMPTS, max_new_tokens=3, stop_ids=())
    next(rows)
    assert llama.model.training and torch.is_grad_enabled()
    assert all(m.training for m in llama.model.modules())


def test_refuses_what_would_be_silently_wrong(llama: Base) -> None:
    delta = stirred(llama, Delta.create(llama, LoRA(rank=2)))
    with llama.using(delta):
        rows = generate(llama, PROMPTS, max_new_tokens=3, stop_ids=())
    with pytest.raises(UsageError, match="other deltas are in use"):
        next(rows)
    with llama.using(Delta.create(llama, Head(classes=3))), pytest.raises(UsageError, match="vocabulary"):
        list(generate(llama, PROMPTS, max_new_tokens=3, stop_ids=()))
    with torch.no_grad():
        for _, t in delta.items():
            t.fill_(float("nan"))
    with llama.using(delta), pytest.raises(DeltaError, match="NaN"):
        list(generate(llama, PROMPTS, max_new_tokens=3, stop_ids=()))


@pytest.mark.parametrize(
    ("prompts", "args", "match"),
    [
        ([[]], {}, "empty"),
        ([[1, 99]], {}, "vocabulary"),
        ([[1, -1]], {}, "vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"batch_size": 0}, "batch size"),
    ],
)
def test_bad_arguments(llama: Base, prompts: Any, args: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        generate(llama, prompts, **{"max_new_tokens": 3, "stop_ids": (), **args})


def test_encoders_are_refused() -> None:
    config = BertConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UsageError, match="encoder"):
        generate(Base(BertModel(config), family="encoder"), [[1]], max_new_tokens=2, stop_ids=())


def test_chat_speaks_the_layout_of_the_delta() -> None:
    base = byte_base()
    messages = [{"role": "user", "content": "hi"}]
    plain = chat(base, messages, max_new_tokens=6)
    text = "User: hi\nAssistant:"
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    want = list(stream(base, ids, max_new_tokens=6, stop_ids=(0,)))
    assert plain == decode(base.tokenizer, want).strip()
    delta = stirred(base, Delta.create(base, LoRA(rank=2)), 1e-6)
    made = predict(base, data("chat", [{"messages": [*messages, {"role": "assistant", "content": "yo"}]}]), delta=delta)
    assert made.references == ["yo"] and made.prompts == ["hi"] and len(made.outputs) == 1
    from tunesmith.data import template_info

    delta.layout["template"] = template_info(base.tokenizer, system="Be brief.").to_dict()
    longer = base.tokenizer("System: Be brief.\n" + text, add_special_tokens=False)["input_ids"]
    want = list(stream(base, longer, max_new_tokens=6, stop_ids=(0,)))
    assert chat(base, messages, delta, max_new_tokens=6) == decode(base.tokenizer, want).strip()


# Likelihoods


def full_nll(base: Base, ids: list[int], labels: list[int]) -> float:
    with torch.no_grad():
        logp = torch.log_softmax(base.model(input_ids=torch.tensor([ids]))["logits"][0].double(), -1)
    return -sum(float(logp[t - 1, labels[t]]) for t in range(1, len(ids)) if labels[t] != -100)


@pytest.mark.parametrize("kind", ["none", "lora", "prompt", "prefix"])
def test_row_nll_equals_full_logits(llama: Base, kind: str) -> None:
    method = methods(kind)
    rows = [{"input_ids": p, "labels": [-100, *p[1:]]} for p in PROMPTS if len(p) > 1]
    rows.append({"input_ids": [3, 4, 5, 6], "labels": [-100, -100, -100, 6]})
    with llama.using(stirred(llama, Delta.create(llama, method)) if method else None):
        for (got, n), row in zip(row_nll(llama, rows, batch_tokens=9), rows, strict=True):
            assert got == pytest.approx(full_nll(llama, row["input_ids"], row["labels"]), abs=1e-4)
            assert n == sum(x != -100 for x in row["labels"][1:])


def test_row_nll_sees_what_happens_after_the_output_layer(llama: Base) -> None:
    """A model that caps its logits: the features times the output layer are not its logits."""

    class Capped(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2.0 * torch.tanh(out.logits / 2.0)
            return out

    torch.manual_seed(0)
    base = Base(Capped(llama.model.config).eval(), family="causal-lm")
    row = {"input_ids": PROMPTS[0], "labels": PROMPTS[0]}
    assert row_nll(base, [row])[0][0] == pytest.approx(full_nll(base, PROMPTS[0], PROMPTS[0]), abs=1e-4)


@pytest.mark.parametrize("kind", ["none", "lora", "prompt", "prefix"])
def test_option_logprobs_equal_whole_rows(llama: Base, kind: str) -> None:
    method = methods(kind)
    options = [[[5], [6, 7, 8], [9, 10]] for _ in PROMPTS]
    options[1] = [[11], [12]]
    with llama.using(stirred(llama, Delta.create(llama, method)) if method else None):
        got = option_logprobs(llama, PROMPTS, options, batch_size=2)
        for p, many, found in zip(PROMPTS, options, got, strict=True):
            want = [-full_nll(llama, [*p, *o], [-100] * len(p) + o) for o in many]
            assert found == pytest.approx(want, abs=1e-4)
    with pytest.raises(UsageError, match="empty"):
        option_logprobs(llama, [[1]], [[[]]])


def test_option_logprobs_without_a_cache() -> None:
    base = toys()[0]
    got = option_logprobs(base, [[1, 2, 3]], [[[4], [5, 6]]])
    want = [-full_nll(base, [1, 2, 3, *o], [-100] * 3 + o) for o in ([4], [5, 6])]
    assert got[0] == pytest.approx(want, abs=1e-4)


def test_predict_text_and_preference() -> None:
    base = byte_base()
    text = predict(base, data("text", [{"text": "abc"}, {"text": "hello there"}]))
    ids = [*base.tokenizer("hello there")["input_ids"], 0]
    assert text.outputs[1][1] == len(ids) - 1
    assert text.outputs[1][0] == pytest.approx(full_nll(base, ids, ids), abs=1e-3)
    row = {"prompt": [{"role": "user", "content": "q"}]}
    sides = [{"role": "assistant", "content": c} for c in ("aaaa", "b")]
    one = predict(base, data("preference", [{**row, "chosen": [sides[0]], "rejected": [sides[1]]}]))
    two = predict(base, data("preference", [{**row, "chosen": [sides[1]], "rejected": [sides[0]]}]))
    assert {one.outputs[0], two.outputs[0]} == {"chosen", "rejected"}


def test_predict_labels_with_a_head() -> None:
    base = byte_base()
    rows = [{"text": t, "label": i % 3} for i, t in enumerate(["aa", "b", "cccc", "dd", "e"])]
    dataset = data("classification", rows, ["x", "y", "z"])
    delta = stirred(base, Delta.create(base, Head(classes=3)))
    got = predict(base, dataset, delta=delta, batch_size=2)
    with base.using(delta), torch.no_grad():
        for i, row in enumerate(rows):
            p = base.model(input_ids=torch.tensor([base.tokenizer(row["text"])["input_ids"]]))["logits"][0].softmax(-1)
            assert got.outputs[i] == "xyz"[int(p.argmax())]
            assert got.confidence is not None and got.confidence[i] == pytest.approx(float(p.max()), abs=1e-5)
    assert got.references == ["x", "y", "z", "x", "y"]
    assert constant(examples(base, dataset)).outputs == ["x"] * 5
    with pytest.raises(UsageError, match="one number per label"):
        predict(base, dataset)


@pytest.mark.parametrize("kind", ["none", "lora", "prompt", "prefix"])
def test_a_common_beginning_is_read_once(llama: Base, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = methods(kind)
    head = list(range(20, 32))
    prompts = [head + p for p in PROMPTS] + [head, head]
    sizes: list[tuple[int, ...]] = []
    feed = Cached.feed

    def counted(self: Cached, ids: torch.Tensor, mask: torch.Tensor, *, last: bool) -> torch.Tensor:
        sizes.append(tuple(ids.shape))
        return feed(self, ids, mask, last=last)

    with llama.using(stirred(llama, Delta.create(llama, method)) if method else None):
        want = [by_hand(llama, p, 6, set()) for p in prompts]
        monkeypatch.setattr(Cached, "feed", counted)
        got = dict(generate(llama, prompts, max_new_tokens=6, stop_ids=()))
    assert [got[i] for i in range(len(prompts))] == want
    assert sizes[:2] == [(1, 11), (7, 8)]


def test_rows_longer_than_the_positions_are_cut_or_left_out() -> None:
    base = byte_base()
    base.model.config.max_position_embeddings = 20
    assert predict(base, data("text", [{"text": "x" * 50}])).outputs[0][1] == 19
    turns = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="1 prompts are longer than 20"):
        predict(base, data("chat", [{"messages": turns}]))


def test_shared_length() -> None:
    assert shared_length([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 9]]) == 2
    assert shared_length([[1, 2], [1, 2]]) == 1
    assert shared_length([[1], [1, 2]]) == 0
    assert shared_length([[2, 1], [1, 2]]) == 0
