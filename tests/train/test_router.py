# SPDX-License-Identifier: Apache-2.0
"""Gates that learn whose token it is: the loss written out, splits that change nothing, and only gates that move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import byte_tokenizer
from serve_cases import moved, tiny_llama

from tunesmith.compose import route, trace
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import DataError, UsageError
from tunesmith.core.gates import watched
from tunesmith.core.objective import get_objective
from tunesmith.deltas import LoRA
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.router import Nearest, RoutedTask, fit_router

DATA = {
    "digits": [{"text": t} for t in ("123 456", "905 217", "88 3141", "7 0 66 5")],
    "letters": [{"text": t} for t in ("abc cab", "xylem qv", "bi zzx of", "g mnk")],
}


@pytest.fixture
def base() -> Base:
    made = tiny_llama(vocab_size=300, max_position_embeddings=256)
    made.tokenizer = byte_tokenizer()
    with torch.no_grad():
        for p in made.model.parameters():
            p.div_(4)
    return made


@pytest.fixture
def both(base: Base) -> Delta:
    return route(base, [moved(base, LoRA(rank=2), seed=i, name=n) for i, n in enumerate(DATA)], name="both")


def rows(*lengths: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    made = []
    for k, n in enumerate(lengths):
        ids = torch.randint(0, 300, (n,), generator=g).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (n - 2 - k) + ids[n - 2 - k :], "expert": k % 2})
    return made


def test_the_loss_is_the_mean_over_layers_and_tokens_shifted_by_one(base: Base, both: Delta) -> None:
    task = RoutedTask(rows(9), get_objective("routed")(c=3.0))
    batch = task.batch([0], 0)
    assert batch["experts"][0].tolist() == [0] * 9 + [-100] * 7, "padding to a multiple of 8 belongs to nobody"
    with torch.no_grad(), base.using(both), watched() as seen:
        logits = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        got = task.objective.loss(base, batch)
    labels = batch["labels"][0]
    lm = F.cross_entropy(logits[6:8], labels[7:9])
    gates = torch.stack([-F.log_softmax(g[0, t], -1)[0] for g in seen.values() for t in range(8)]).mean()
    torch.testing.assert_close(got, 2 * (lm + 3.0 * gates), atol=1e-4, rtol=1e-5)
    assert task.objective.count(batch) == 2


def test_a_batch_split_in_any_way_gives_one_loss(base: Base, both: Delta) -> None:
    task = RoutedTask(rows(9, 14, 11), get_objective("routed")(c=50.0))
    with torch.no_grad(), base.using(both):
        whole = task.objective.loss(base, task.batch([0, 1, 2], 0))
        parts = sum(task.objective.loss(base, task.batch([i], 0)) for i in range(3))
    torch.testing.assert_close(whole, parts, atol=1e-3, rtol=1e-5)


def hits(base: Base, both: Delta) -> float:
    """How often the gates of the second block choose the token's own delta."""
    right: list[float] = []
    for i, rows in enumerate(DATA.values()):
        for row in rows:
            ids = torch.tensor([base.tokenizer(row["text"])["input_ids"]])
            found = {p: w for p, w in trace(base, both, ids).items() if "layers.1." in p}
            right += [float(w[0].argmax(-1).eq(i).float().mean()) for w in found.values()]
    return sum(right) / len(right)


def test_gates_learn_and_nothing_else_moves(base: Base, both: Delta) -> None:
    digest, before, first = base.digest(), {k: t.detach().clone() for k, t in both.items()}, hits(base, both)
    trained = fit_router(base, both, DATA, steps=40, batch_size=8, lr=3e-2, progress=False)
    assert trained.losses[-1] < 0.5 * trained.losses[0] and base.digest() == digest
    for key, t in both.items():
        assert torch.equal(t, before[key]) == (not key.endswith("/G")), key
    assert set(both.provenance["data"]["sources"]) == set(DATA) and "untrained" not in both.provenance
    assert first < 0.7 and hits(base, both) > 0.8, (first, hits(base, both))


def test_without_the_gate_loss_gates_learn_from_the_text_alone(base: Base, both: Delta) -> None:
    task = RoutedTask(rows(9, 14), get_objective("routed")(c=0.0))
    trained = fit(base, both, task, TrainConfig(steps=3, lr=1e-2, precision="fp32"), progress=False)
    with base.using(both):
        plain = get_objective("sft")().loss(base, {k: v for k, v in task.batch([0, 1], 0).items() if k != "experts"})
    assert len(trained.losses) == 3 and float(plain.detach()) > 0


def test_what_is_refused(base: Base, both: Delta) -> None:
    with pytest.raises(UsageError, match="'digit' is no source"):
        fit_router(base, both, {"digit": DATA["digits"], **DATA}, steps=1)
    with pytest.raises(UsageError, match="no data for letters"):
        fit_router(base, both, {"digits": DATA["digits"]}, steps=1)
    with pytest.raises(UsageError, match="has no gates"):
        fit_router(base, moved(base, LoRA(rank=1)), DATA, steps=1)
    with pytest.raises(UsageError, match="no gate ran"):
        get_objective("routed")().loss(base, RoutedTask(rows(9), get_objective("routed")()).batch([0], 0))
    with pytest.raises(DataError, match="9 tokens but 2 experts"):
        RoutedTask([{**rows(9)[0], "expert": [0, 1]}], get_objective("routed")()).batch([0], 0)


def test_a_token_may_have_a_delta_of_its_own() -> None:
    row = {**rows(9)[0], "expert": [0, 0, 0, 1, 1, 1, 1, -100, -100]}
    assert RoutedTask([row], get_objective("routed")()).batch([0], 0)["experts"][0, :9].tolist() == row["expert"]


def test_the_nearest_task_of_a_text(base: Base) -> None:
    texts = {"digits": ["123 456", "998 121"], "letters": ["abc cab", "xyz qrs"]}
    near = Nearest.fit(base, texts)
    assert near.choose(["555 131", "bca zzx", "123 456"]) == ["digits", "letters", "digits"]
    with pytest.raises(UsageError, match="two tasks or more"):
        Nearest.fit(base, {"one": ["a"]})
