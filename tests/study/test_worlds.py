# SPDX-License-Identifier: Apache-2.0
"""The shared set-ups of studies: cached upper blocks equal the whole model, splits are disjoint, trials are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import TrainingError, UsageError
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds import language, text
from tunesmith.study.worlds.arms import choose_lr, sweep, train
from tunesmith.study.worlds.language import LanguageWorld, TopModel, gsm8k_top
from tunesmith.study.worlds.text import TextWorld, few_shot


def context(folder: Path, seeds: list[int]) -> Context:
    return Context(True, seeds, folder, Cells(folder / "cells.jsonl", {"test": "worlds"}))


def noisy(base: Base, targets: str = "all-linear", std: float = 0.3) -> Delta:
    """A LoRA whose tensors are all random, so that it changes what the model says."""
    delta = Delta.create(base, ts.LoRA(rank=2, targets=targets))
    generator = torch.Generator().manual_seed(3)
    for _, t in delta.items():
        t.data.normal_(std=std, generator=generator)
    return delta


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return context(tmp_path, [0, 1])


@pytest.fixture
def world(ctx: Context) -> LanguageWorld:
    return gsm8k_top(ctx, blocks=2)


@pytest.fixture
def words(ctx: Context) -> TextWorld:
    return few_shot(ctx, "banking77", 4, 0)


def test_the_top_on_cached_states_gives_the_logits_of_the_whole_model() -> None:
    base = language.toy_base()
    rows = [{"input_ids": [5, 9, 33, 2, 8]}, {"input_ids": [7, 7, 12]}]
    for blocks in (1, 2, 4):
        cached = language.below(base, rows, blocks, precision="fp32")
        top = TopModel(base.model, blocks).eval()
        batch = language.StateTask(cached, [[0] * 5, [0] * 3]).batch([0, 1], 0)
        batch.pop("labels")
        with torch.no_grad():
            got = top(**batch)["logits"]
            for i, row in enumerate(rows):
                want = base.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
                torch.testing.assert_close(got[i, : len(row["input_ids"])], want, atol=1e-5, rtol=0)
    assert top.lm_head.weight is base.model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_delta_on_the_top_is_the_same_delta_on_the_whole_model(world: LanguageWorld) -> None:
    delta = noisy(world.base)
    assert set(delta.parts[0].paths) >= {"layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"}
    assert "lm_head" not in delta.parts[0].paths
    whole = language.toy_base()
    twin = Delta.create(whole, ts.LoRA(rank=2, targets=r"re:^model\.layers\.[23]\."))
    for path in delta.parts[0].kind_of:
        block, rest = path.removeprefix("layers.").split(".", 1)
        for name, value in delta.parts[0].tensors(path).items():
            twin.parts[0].put(f"model.layers.{int(block) + 2}.{rest}", name, value.detach(), trainable=True)
    row = world.texts["test"][0]
    batch = world.held["test"].batch([0], 0)
    batch.pop("labels")
    with torch.no_grad(), world.base.using(delta), whole.using(twin):
        want = whole.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        got = world.base.model(**batch)["logits"][0, : len(want)]
    with torch.no_grad():
        plain = world.base.model(**batch)["logits"][0, : len(want)]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert float((got - plain).abs().max()) > 0.1


def test_measured_loss_is_cross_entropy_of_the_answers_only(world: LanguageWorld) -> None:
    score = world.score("dev")
    total, n = 0.0, 0
    for i, row in enumerate(world.texts["dev"]):
        batch = world.held["dev"].batch([i], 0)
        batch.pop("labels")
        with torch.no_grad():
            logits = world.base.model(**batch)["logits"][0]
        want = torch.tensor(row["labels"])[1:]
        keep = want != -100
        losses = torch.nn.functional.cross_entropy(logits[: len(want)][keep], want[keep], reduction="none")
        assert score.rows[i] == pytest.approx(float(losses.mean()), abs=1e-5)
        total, n = total + float(losses.sum()), n + int(keep.sum())
    assert score.metric == pytest.approx(total / n, abs=1e-5) and sum(score.units) == n
    assert n == sum(len(r["input_ids"]) // 2 for r in world.texts["dev"])


def test_retention_of_language_is_whole_without_a_delta_and_less_with_one(world: LanguageWorld) -> None:
    kept = world.retention()
    assert kept["kl"] == pytest.approx(0, abs=1e-6) and kept["agreement"] == 1
    assert kept["loss"] == pytest.approx(world.score("general").metric, abs=1e-5)
    everywhere = noisy(world.base, "all-linear,lm_head")
    with world.base.using(everywhere):
        lost = world.retention()
        assert lost["loss"] == pytest.approx(world.score("general").metric, abs=1e-5)
    assert lost["kl"] > 0.01 and lost["agreement"] < 1


def test_training_lowers_the_loss_and_leaves_the_base(world: LanguageWorld) -> None:
    before, digest = world.score("test").metric, world.base.digest()
    out = train(world, [ts.LoRA(rank=4)], lr=1e-2, steps=25, seed=0, evaluate_at=(0, 10, 25))
    assert [s for s, _ in out.curve] == [0, 10, 25] and out.curve[0][1].metric > out.curve[2][1].metric
    assert out.curve[2][1].metric == pytest.approx(out.dev().metric)
    assert out.test().metric < before and world.score("test").metric == before
    assert world.base.digest() == digest and out.trainable == out.delta.trainable_parameters
    plain = train(world, [ts.LoRA(rank=4)], lr=1e-2, steps=25, seed=0)
    assert plain.delta.digest == out.delta.digest, "looking at dev must not change the run"
    with pytest.raises(UsageError, match="evaluate_at"):
        train(world, [ts.LoRA()], lr=1e-3, steps=3, seed=0, evaluate_at=(4,))


def test_the_text_world_scores_a_head_and_keeps_the_encoder_apart(words: TextWorld) -> None:
    assert len(words.task) == 16 and [m.info.name for m in words.companions] == ["head"]
    probe = train(words, [], lr=1e-2, steps=12, seed=0)
    assert probe.retention()["cosine"] == pytest.approx(1, abs=1e-6)
    assert probe.trainable == 4 * 33
    out = train(words, [ts.LoRA(rank=4)], lr=1e-2, steps=40, seed=0)
    score = out.test()
    assert score.metric == sum(score.rows) / len(score.rows) > 0.5
    assert out.retention()["cosine"] < 0.999
    with words.base.using(out.delta):
        again = [int(words.logits([r]).argmax()) == r["labels"] for r in words.held["test"]]
    assert score.rows == [float(a) for a in again], "rows are in the order of the split"


def test_retention_of_text_is_the_cosine_of_mean_states(words: TextWorld) -> None:
    delta = noisy(words.base)
    found = []
    for r in words.held["general"]:
        batch = {"input_ids": torch.tensor([r["input_ids"]])}
        with torch.no_grad():
            plain = words.base.model(**batch).last_hidden_state.mean(1)
            with words.base.using(delta):
                moved = words.base.model(**batch).last_hidden_state.mean(1)
        found.append(float(torch.nn.functional.cosine_similarity(plain, moved)))
    with words.base.using(delta):
        assert words.retention()["cosine"] == pytest.approx(sum(found) / len(found), abs=1e-5)


def test_a_rate_is_chosen_on_dev_and_a_diverging_one_cannot_win(world: LanguageWorld) -> None:
    choice = choose_lr(world, [ts.LoRA(rank=2)], [1e-4, 1e-2], 12, 0)
    assert choice.lr == 1e-2 and len(choice.trials) == 2
    tested: list[str] = []
    plain = world.score

    def watched(split: str) -> Any:
        tested.append(split)
        return plain(split)

    world.score = watched  # type: ignore[method-assign]
    choose_lr(world, [ts.LoRA(rank=2)], [1e-3], 2, 0)
    assert set(tested) == {"dev"}


def test_a_sweep_resumes_and_reports_each_seed_at_the_chosen_rate(ctx: Context, tmp_path: Path) -> None:
    def world_of(seed: int) -> TextWorld:
        return few_shot(ctx, "banking77", 4, seed)

    arms = {"probe": [], "lora": lambda seed: [ts.LoRA(rank=2)]}
    kw: dict[str, Any] = {"lrs": {"probe": [1e-5, 1e-2], "lora": [1e-5, 1e-2]}, "steps": 30}
    first = sweep(ctx, world_of, arms, **kw)
    assert {a: [r["seed"] for r in rows] for a, rows in first["arms"].items()} == {"probe": [0, 1], "lora": [0, 1]}
    assert all(r["lr"] == 1e-2 for rows in first["arms"].values() for r in rows)
    assert [t["lr"] for t in first["tuning"]["lora"]["trials"]] == [1e-5, 1e-2]
    assert ctx.cells.computed == 6  # two arms: two rates on the first seed, the better one on the second
    again = context(tmp_path, [0, 1])
    assert sweep(again, world_of, arms, **kw) == first and again.cells.computed == 0
    with pytest.raises(UsageError, match="different numbers of rates"):
        sweep(ctx, world_of, arms, lrs={"probe": [1e-3], "lora": [1e-3, 1e-2]}, steps=2)


def test_an_arm_that_always_diverges_is_an_error(ctx: Context, world: LanguageWorld) -> None:
    with pytest.raises(TrainingError, match="every learning rate diverged"):
        sweep(ctx, world, {"lora": [ts.LoRA(rank=2)]}, lrs=[1e30], steps=6)


def test_real_sets_are_read_with_disjoint_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full path on made-up files: names, domains, repeats, and rows that no two splits share."""
    folder = tmp_path / "clinc150"
    folder.mkdir()
    intents = [f"intent_{i}" for i in range(6)]

    def lines(tag: str, n: int) -> str:
        return "".join(
            f'{{"text": "{tag} {i} {j}", "label": "{name}"}}\n' for i, name in enumerate(intents) for j in range(n)
        )

    (folder / "train.jsonl").write_text(lines("say", 9) + '{"text": "Say 0  0", "label": "intent_0"}\n')
    (folder / "test.jsonl").write_text(lines("ask", 5))
    (folder / "domains.json").write_text(
        '{"a": ["intent 0", "intent_1"], "b": ["intent_2", "intent_3", "intent_4", "intent_5"]}'
    )
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "validation.jsonl").write_text(lines("news", 3))
    monkeypatch.setenv("TUNESMITH_DATA", str(tmp_path))
    ctx = Context(False, [0], tmp_path, Cells(tmp_path / "cells.jsonl", {}))
    base = Base(text.toy_base().model, tokenizer=_Words(), name="toy", family="encoder")
    made = few_shot(ctx, "clinc150", 3, 0, dev=12, test=20, general=5, base=base)
    sizes = {k: len(v) for k, v in made.texts.items()}
    assert sizes == {"train": 18, "dev": 12, "test": 20, "general": 5} and made.labels == intents
    assert not set(made.texts["train"]) & set(made.texts["dev"])
    wide = few_shot(ctx, "clinc150-domains", 3, 0, dev=4, base=base)
    assert wide.labels == ["a", "b"] and len(wide.task) == 6
    more = few_shot(ctx, "clinc150", 4, 0, dev=12, base=base)
    assert set(made.texts["train"]) < set(more.texts["train"]) and more.texts["dev"] == made.texts["dev"]
    assert more.texts["test"][:20] != [] and set(made.texts["test"]) <= set(more.texts["test"])
    with pytest.raises(UsageError, match="no few-shot set"):
        few_shot(ctx, "banking", 3, 0)


class _Words:
    """Hashed words as ids."""

    pad_token_id = 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1 + sum(map(ord, w)) % 63 for w in t.split()][:max_length] for t in texts]}
