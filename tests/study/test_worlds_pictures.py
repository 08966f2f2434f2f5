# SPDX-License-Identifier: Apache-2.0
"""Small pictures and probe heads: variants, disjoint rows, fitted heads, and changes of one backbone without its heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunesmith.core.errors import UsageError
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context
from tunesmith.study.worlds import pictures as world_of
from tunesmith.study.worlds.pictures import TASKS, VARIANTS, Pictures, glyphs, pictures
from tunesmith.study.worlds.probed import fit_probe, shares


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ctx")
    return pictures(Context(True, [0], folder, Cells(folder / "cells.jsonl", {"test": "pictures"})), TASKS)


def test_a_probe_is_the_softmax_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3
    y = torch.randint(0, 3, (60,), generator=g)
    probe = fit_probe(x, y, 3, decay=1e-2, steps=300)
    z = (x - x.mean(0)) / x.std(0)
    W = (probe.W * x.std(0)).requires_grad_()  # the decay is on weights of standardised features
    b = (probe.b + probe.W @ x.mean(0)).requires_grad_()
    (F.cross_entropy(F.linear(z, W, b), y) + 0.005 * W.square().sum()).backward()
    assert float(W.grad.abs().max()) < 1e-3 and float(b.grad.abs().max()) < 1e-3
    torch.testing.assert_close(probe(x), F.linear(z, W, b), atol=1e-4, rtol=1e-4)


def test_variants_change_pictures_and_keep_their_shape() -> None:
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for change in VARIANTS.values():
        assert change(x).shape == x.shape and not torch.equal(change(x), x) and torch.equal(change(x), change(x))
        assert float(change(x).min()) >= 0 and float(change(x).max()) <= 1
    torch.testing.assert_close(VARIANTS["inverted"](VARIANTS["inverted"](x)), x)
    moved = VARIANTS["permuted"](x)
    assert torch.equal(moved.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert torch.equal(VARIANTS["blurred"](torch.full_like(x, 0.5)), torch.full_like(x, 0.5))


def test_glyphs_are_of_eight_kinds_and_fixed_by_their_seed() -> None:
    x, y = glyphs(64, 1)
    assert x.shape == (64, 1, 28, 28) and y.bincount().tolist() == [8] * 8
    assert torch.equal(x, glyphs(64, 1)[0]) and not torch.equal(x, glyphs(64, 2)[0])
    assert float(x.min()) >= 0 and float(x.max()) <= 1 and len({float(p.sum()) for p in x}) == 64


def test_rows_are_drawn_by_the_seed_and_test_rows_are_not(made: Pictures) -> None:
    one, two = made.world("digits-rotated", 0), made.world("digits-rotated", 1)
    assert torch.equal(one.held["test"][0], two.held["test"][0])
    assert not torch.equal(one.held["dev"][0], two.held["dev"][0])
    seen = {tuple(p.flatten().tolist()) for p in one.task.x}
    assert not seen & {tuple(p.flatten().tolist()) for p in one.held["dev"][0]}
    assert len(one.task) == made.size.train and len(one.held["dev"][1]) == made.size.dev
    with pytest.raises(UsageError, match="no picture task 'digits-turned'"):
        made.world("digits-turned", 0)


def test_every_task_has_a_head_that_stays_fixed_while_the_backbone_moves(made: Pictures) -> None:
    digest = made.base.digest()
    worlds = [made.world(name, 0) for name in ("digits-rotated", "glyphs")]
    deltas = [w.tuned(1e-3, 3, 0) for w in worlds]
    for w, delta in zip(worlds, deltas, strict=True):
        assert [p.info.name for p in delta.parts] == ["full"]
        assert any(bool(t.any()) for _, t in delta.items()) and w.probe.W.shape == (len(w.probe.b), 16)
        with made.base.using(delta):
            moved = w.logits("dev")
        assert not torch.equal(moved, w.logits("dev"))
        fresh = w.fresh(0)
        assert not fresh.part("head").parameter("", "W").requires_grad
        with made.base.using(fresh):
            beside = made.base.model(w.held["dev"][0])
        torch.testing.assert_close(beside, w.logits("dev"), atol=1e-5, rtol=1e-4)
    assert made.base.digest() == digest
    base = [w.score("test").metric for w in worlds]
    assert shares(worlds, None, base, "test") == pytest.approx([1.0, 1.0])
    assert world_of.VARIANTS is VARIANTS
