# SPDX-License-Identifier: Apache-2.0
"""Arbitrary parameter sets: exact budgets, whole groups, one set for a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.method import config
from tunesmith.core.toys import toys
from tunesmith.deltas.weight.apet import arbitrary


def pool(base: Base) -> int:
    """Entries of weights that single entries can be drawn from."""
    return sum(s.module.weight.numel() for s in base.sites.select("everything", ("linear", "embedding")))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [1, 7, 64, 500, 2049])
def test_a_budget_is_spent_to_the_last_number(budget: int, tied: bool) -> None:
    base = toys()[1 if tied else 0]
    sets = []
    for seed in range(4):
        delta = Delta.create(base, *arbitrary(base, budget, seed, rank=2))
        assert sum(t.numel() for _, t in delta.items() if t.requires_grad) == budget == delta.trainable_parameters
        sets.append([(p.info.name, sorted(p.kind_of)) for p in delta.parts])
    if budget > 100:
        assert len({str(s) for s in sets}) == 4, "seeds give other sets"


@pytest.mark.parametrize(
    "kinds", [("lowrank",), ("adapter",), ("prompt",), ("tensor",), ("lowrank", "adapter", "prompt", "tensor")]
)
def test_without_single_entries_it_never_overspends_and_groups_are_whole(kinds: tuple[str, ...]) -> None:
    base = toys()[0]
    for seed in range(5):
        for budget in (300, 1111):
            methods = arbitrary(base, budget, seed, kinds, rank=3)
            delta = Delta.create(base, *methods)
            spent = delta.trainable_parameters
            assert 0 < spent <= budget
            expected = 0
            for part in delta.parts:
                for path in part.kind_of:
                    t, site = part.tensors(path), base.sites.of(path, part.kind_of[path])
                    expected += {
                        "lora": lambda s: 3 * sum(s.shape),
                        "hydra": lambda s: 2 * 3 * s.shape[0] + 3 + s.shape[0],
                        "prompt-tuning": lambda s, t=t: t["P"].shape[0] * 16,
                        "full": lambda s: s.module.weight.numel(),
                        "bitfit": lambda s: s.module.bias.numel(),
                    }[part.info.name](site)
                    assert all(v.requires_grad for v in t.values()), "a group is trained as a whole"
                    if part.info.name == "hydra":
                        assert set(t) == {"A_s", "B_s", "c_s", "d_s"}, "all four tensors count"
            assert expected == spent


def test_half_goes_to_added_groups_and_half_to_the_base() -> None:
    base = toys()[0]
    for seed in range(4):
        delta = Delta.create(base, *arbitrary(base, 3000, seed, rank=2))
        by = {p.info.name: sum(t.numel() for _, _, t in p.items() if t.requires_grad) for p in delta.parts}
        added = sum(n for name, n in by.items() if name in ("lora", "hydra", "prompt-tuning"))
        assert 1200 < added <= 1500 and sum(by.get(n, 0) for n in ("full", "bitfit")) <= 1500


def test_the_same_seed_gives_the_same_set_whatever_the_random_state() -> None:
    base = toys()[0]
    torch.manual_seed(0)
    first = [config(m) for m in arbitrary(base, 900, 3)]
    torch.manual_seed(9)
    assert [config(m) for m in arbitrary(base, 900, 3)] == first
    assert ts.arbitrary is arbitrary


def test_single_entries_are_drawn_over_all_weights_alike() -> None:
    base = toys()[0]
    seen: dict[str, int] = {}
    for seed in range(40):
        (method,) = arbitrary(base, 100, seed, ("raw",))
        assert sum(method.count_pattern.values()) == 100
        for path, n in method.count_pattern.items():
            seen[path] = seen.get(path, 0) + n
    total = pool(base)
    for path, n in seen.items():
        share = base.sites[path].module.weight.numel() / total
        assert abs(n / 4000 - share) < 6 * (share / 4000) ** 0.5, path
    (whole,) = arbitrary(base, 10**9, 0, ("raw",))
    assert Delta.create(base, whole).trainable_parameters == total


def test_a_path_that_ends_as_another_does_gets_its_own_count() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(4, 5), nn.ModuleDict({"fc": nn.Linear(5, 40), "end": nn.Linear(40, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["end"](torch.tanh(self.inner["fc"](torch.tanh(self.fc(x)))))

    base = Base(Twins(), example=(torch.randn(2, 4),))
    for seed in range(3):
        delta = Delta.create(base, *arbitrary(base, 50, seed, ("raw",)))
        assert delta.trainable_parameters == 50


def test_it_works_on_models_without_prompts_and_trains() -> None:
    base = toys()[2]
    x = torch.randn(8, 3, 6, 6)
    data = [(x, torch.randint(5, (8,))) for _ in range(4)]
    methods = arbitrary(base, 200, 1, rank=1)
    assert "prompt-tuning" not in [m.info.name for m in methods]

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(output, batch[1])

    run = ts.tune(base, data, method=methods, loss=loss, steps=6, lr=1e-2, precision="fp32", progress=False)
    assert run.delta.trainable_parameters == 200 and run.trained.losses[-1] < run.trained.losses[0]


@pytest.mark.parametrize(
    ("budget", "kinds", "text"),
    [
        (0, None, "1 or more"),
        (10, ("low-rank",), "lowrank"),
        (10, (), "no kind"),
        (3, ("lowrank",), "smallest group has"),
    ],
)
def test_what_cannot_be_is_an_error(budget: int, kinds: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        arbitrary(toys()[0], budget, 0, kinds)


def test_a_kind_the_base_has_no_place_for_is_an_error() -> None:
    with pytest.raises(UsageError, match="no place for kind 'prompt'"):
        arbitrary(toys()[2], 100, 0, ("prompt",))
