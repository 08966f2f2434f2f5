# SPDX-License-Identifier: Apache-2.0
"""Kept features of a frozen prefix: the same losses and the same delta, or a reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import Interrupted, UsageError
from tunesmith.core.toys import toys
from tunesmith.data import PackedRow
from tunesmith.deltas import SSF, Full, Head, LoRA, PromptTuning
from tunesmith.objectives import SFT, Classification
from tunesmith.train import cached
from tunesmith.train.cached import Refused, find_cut
from tunesmith.train.tasks import LoaderTask, PackedTask, RowTask

DOUBLE = torch.float64


def llama(dropout: float = 0.0) -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_dropout=dropout, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Base(LlamaForCausalLM(config).to(DOUBLE), family="causal-lm")


def bert(dropout: float = 0.0) -> Base:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return Base(BertModel(config).to(DOUBLE), family="encoder")


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"input_ids": r["input_ids"], "labels": i % 2} for i, r in enumerate(rows)]


def pictures(n: int = 12) -> RowTask:
    rng = np.random.default_rng(0)
    rows = [{"array": rng.integers(0, 255, (6, 6, 3), dtype=np.uint8), "label": i % 3} for i in range(n)]
    return RowTask(rows, Classification(), prepare=lambda b: {**b, "pixel_values": b["pixel_values"].to(DOUBLE)})


def vision() -> Base:
    base = toys()[2]
    base.model.to(DOUBLE)
    return Base(base.model, example=(torch.randn(2, 3, 6, 6, dtype=DOUBLE),), family="vision")


def both(trained: Any, make: Any, *methods: Any, kept: bool = True, **kw: Any) -> tuple[Any, Any]:
    """The same run with kept features and without; whether they were kept is part of the test."""
    plain = trained(*methods, base=make(), cache_features="off", **kw)
    quick = trained(*methods, base=make(), **kw)
    assert plain[0].cached.startswith("no features")
    assert quick[0].cached.startswith("no features") != kept, quick[0].cached
    return plain, quick


def same(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    (done_a, delta_a), (done_b, delta_b) = a, b
    assert done_a.losses == pytest.approx(done_b.losses, rel=tolerance, abs=tolerance)
    for (key, x), (_, y) in zip(delta_a.items(), delta_b.items(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("micro", [None, 3])
def test_late_blocks_of_a_decoder(trained: Any, token_rows: Any, micro: int | None) -> None:
    """Rows of unlike lengths meet in other batches in every epoch."""
    late = LoRA(rank=2, targets="model.layers.2.*,model.layers.3.*")
    plain, quick = both(trained, llama, late, rows=token_rows(20), steps=9, micro_batch=micro)
    same(plain, quick)
    assert plain[0].losses[:3] == quick[0].losses[:3], "epoch 0 is the same bit for bit"


def test_packed_rows(trained: Any, token_rows: Any) -> None:
    rows = token_rows(12)
    groups = [PackedRow((i, i + 1), tuple(rows[i : i + 2])) for i in range(0, 12, 2)]
    task = PackedTask(groups, SFT(), dtype=DOUBLE)
    late = LoRA(rank=2, targets="model.layers.3.*")
    plain = trained(late, base=llama(), task=task, batch_size=2, steps=9, cache_features="off")
    quick = trained(late, base=llama(), task=task, batch_size=2, steps=9)
    assert "model.layers.2" in quick[0].cached
    same(plain, quick)


def test_a_head_on_a_decoder_an_encoder_and_a_picture_net(trained: Any, token_rows: Any) -> None:
    rows = labelled(token_rows(12))
    for make, task in (
        (llama, RowTask(rows, Classification())),
        (bert, RowTask(rows, Classification())),
        (vision, pictures()),
    ):
        same(*both(trained, make, Head(classes=3), task=task, steps=8, batch_size=5))


def test_late_layers_of_an_encoder_and_of_a_picture_net(trained: Any, token_rows: Any) -> None:
    task = RowTask(labelled(token_rows(12)), Classification())
    same(*both(trained, bert, LoRA(rank=2, targets="encoder.layer.2.*"), Head(), task=task, steps=8, batch_size=5))
    same(*both(trained, vision, SSF(targets="fc"), Head(classes=3), task=pictures(), steps=8, batch_size=5))


def test_the_prefix_does_not_run_again(trained: Any, token_rows: Any) -> None:
    base, calls = llama(), []
    base.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    trained(LoRA(rank=2, targets="model.layers.3.*"), base=base, rows=token_rows(16), steps=20)
    traced, epoch, checked = 1, 2, 2
    assert len(calls) == traced + epoch + checked


def test_a_stopped_run_goes_on_bit_for_bit(trained: Any, token_rows: Any, tmp_path: Path) -> None:
    late, rows = LoRA(rank=2, targets="model.layers.3.*"), token_rows(20)
    whole, delta = trained(late, base=llama(), rows=rows, steps=12, batch_size=4)
    for at in (2, 7):

        def stop(step: int, loss: float, at: int = at) -> None:
            if step == at:
                raise KeyboardInterrupt

        with pytest.raises((KeyboardInterrupt, Interrupted)):
            trained(
                late,
                base=llama(),
                rows=rows,
                steps=12,
                batch_size=4,
                out=tmp_path / str(at),
                checkpoint_every=1,
                on_step=stop,
            )
        done, again = trained(
            late, base=llama(), rows=rows, steps=12, batch_size=4, out=tmp_path / str(at), resume=True
        )
        assert done.resumed_at in (at - 1, at) and "model.layers.2" in done.cached
        assert done.losses == whole.losses
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(delta.items(), again.items(), strict=True))


def test_what_does_not_fit_in_memory_goes_to_a_file(
    trained: Any, token_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = LoRA(rank=2, targets="model.layers.3.*")
    plain = trained(late, base=llama(), rows=token_rows(20), steps=9)
    monkeypatch.setattr(cached, "available_memory", lambda: 1000)
    seen: list[bool] = []
    watch = lambda *_: seen.append((tmp_path / "features-0.bin").exists())  # noqa: E731
    filed = trained(late, base=llama(), rows=token_rows(20), steps=9, out=tmp_path, on_step=watch)
    assert "in a file" in filed[0].cached and all(seen) and not list(tmp_path.glob("features-*"))
    same(plain, filed, 0.0)
    loose, _ = trained(late, base=llama(), rows=token_rows(20), steps=9)
    assert "out=" in loose.cached


def test_dropout_in_the_prefix_refuses_and_on_leaves_it_out(trained: Any, token_rows: Any) -> None:
    task = RowTask(labelled(token_rows(12)), Classification())
    done, _ = trained(Head(), base=bert(0.2), task=task, steps=8, batch_size=5)
    assert "at random" in done.cached and "embeddings.dropout" in done.cached
    forced = trained(Head(), base=bert(0.2), task=task, steps=8, batch_size=5, cache_features="on")
    same(trained(Head(), base=bert(0.0), task=task, steps=8, batch_size=5), forced)


def test_hidden_dropout_is_noticed_by_its_draws(trained: Any, token_rows: Any) -> None:
    """Attention drops by a number in the configuration: no module says so."""
    late = LoRA(rank=2, targets="model.layers.3.*")
    plain, quick = both(trained, lambda: llama(0.3), late, kept=False, rows=token_rows(16), steps=6)
    assert "random numbers" in quick[0].cached
    same(plain, quick, 0.0)


def test_no_prefix_no_cache(trained: Any, token_rows: Any) -> None:
    rows = token_rows(16)
    reasons = [("almost everything", LoRA(rank=2)), ("inputs", PromptTuning()), ("first layers", Full())]
    for word, method in reasons:
        with pytest.raises(Refused, match=word):
            find_cut(llama(), Delta.create(llama(), method))
    late = LoRA(rank=2, targets="model.layers.3.*")
    once, _ = trained(late, base=llama(), rows=rows, steps=2)
    assert "twice" in once.cached
    with pytest.raises(UsageError, match="cache_features"):
        trained(LoRA(rank=2), base=llama(), rows=rows, steps=6, cache_features="on")
    x = torch.randn(8, 3, 6, 6, dtype=DOUBLE)
    loader = LoaderTask([(x, torch.zeros(8, dtype=torch.long))], lambda out, b: nn.functional.cross_entropy(out, b[1]))
    done, _ = trained(LoRA(rank=2, targets="fc"), base=vision(), task=loader, steps=4)
    assert "loader" in done.cached


class Skipping(nn.Module):
    """The output layer also reads the first one, past the cut; or all rows are mixed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.first, self.second, self.last = how, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        early = self.first(x)
        h = torch.tanh(self.second(torch.tanh(early - early.mean(0) if self.how == "mixed" else early)))
        return self.last(h + early if self.how == "skip" else h)


@pytest.mark.parametrize(("how", "word"), [("skip", "before it"), ("mixed", "depend on its batch"), ("chain", "")])
def test_a_prefix_that_is_none_is_found_out(trained: Any, how: str, word: str) -> None:
    g = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(8, generator=g, dtype=DOUBLE), "labels": i % 3} for i in range(12)]

    class Plain(RowTask):
        def batch(self, indices: Any, epoch: int) -> dict[str, Any]:
            chosen = [self.rows[i] for i in indices]
            return {"x": torch.stack([r["x"] for r in chosen]), "labels": torch.tensor([r["labels"] for r in chosen])}

    def make() -> Base:
        return Base(Skipping(how).to(DOUBLE), example=(torch.randn(2, 8, dtype=DOUBLE),))

    kw: dict[str, Any] = {"task": Plain(rows, Classification()), "steps": 9, "batch_size": 4}
    plain, quick = both(trained, make, LoRA(rank=2, targets="last"), kept=how == "chain", **kw)
    assert word in quick[0].cached
    same(plain, quick, 1e-9 if how == "chain" else 0.0)
