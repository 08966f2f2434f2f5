# SPDX-License-Identifier: Apache-2.0
"""The small vision transformer that studies share: shapes, roles, and that every part reaches the output."""

from __future__ import annotations

import torch

from tunesmith.core.base import Base
from tunesmith.study.worlds.vit import TinyViT


def test_shapes_roles_and_size() -> None:
    torch.manual_seed(0)
    model = TinyViT(image=16, patch=4, dim=24, depth=2, heads=3, channels=1, out=5)
    x = torch.randn(3, 1, 16, 16)
    assert model(x).shape == (3, 5)
    assert TinyViT(16, 4, 24, 2, 3, 1)(x).shape == (3, 24)
    base = Base(model.eval(), example=(x,))
    for role, n in (("q", 2), ("k", 2), ("v", 2), ("o", 2), ("up", 2), ("down", 2), ("head", 1)):
        assert len(base.sites.role(role)) == n, role
    assert [s.heads for s in base.sites.all() if s.kind == "attention"] == [(3, 3, 8, 8)] * 2
    d = 24
    block = 2 * 2 * d + 4 * (d * d + d) + 2 * 4 * d * d + 5 * d
    want = d * 16 + d + d + 17 * d + 2 * block + 2 * d + 5 * d + 5
    assert sum(p.numel() for p in model.parameters()) == want


def test_every_parameter_takes_part_and_patches_have_places() -> None:
    torch.manual_seed(0)
    model = TinyViT(16, 4, 24, 2, 3, 1, out=5)
    x = torch.randn(2, 1, 16, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    moved = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert not torch.allclose(model(x), model(moved), atol=1e-5)


def test_the_mean_over_patches_in_place_of_a_class_token() -> None:
    torch.manual_seed(0)
    model = TinyViT(16, 4, 24, 2, 3, 1, out=5, mean=True)
    x = torch.randn(2, 1, 16, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    assert "token" not in dict(model.named_parameters()) and model.position.shape == (1, 16, 24)
    h = model.patch(x).flatten(2).transpose(1, 2) + model.position
    for block in model.blocks:
        h = block(h)
    torch.testing.assert_close(model(x), model.head(model.norm(h).mean(1)))
    assert abs(float(model.blocks[0].up.weight.detach().std()) - 24**-0.5) < 0.02
