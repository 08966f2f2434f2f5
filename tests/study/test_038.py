# SPDX-License-Identifier: Apache-2.0
"""Study 038 at toy size: the diffusion world, the threshold, zeroed weights, and the verdict rule."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study, run_study

FOLDER = Path(__file__).parents[2] / "studies" / "038-sara"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


@pytest.fixture(scope="module")
def code(study: Any) -> Any:
    return sys.modules[study.run.__module__]


@pytest.fixture(scope="module")
def world(study: Any) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + ".world")


@pytest.fixture(scope="module")
def pictures(world: Any) -> Any:
    return world.load(None, None)


@pytest.fixture(scope="module")
def base(world: Any, pictures: Any) -> Any:
    return world.pretrained(pictures, world.SMOKE)


def test_a_smoke_run_has_every_arm_and_seed(study: Any, tmp_path: Path) -> None:
    raw = run_study(study, smoke=True, out=tmp_path)["raw"]
    assert {arm: len(rows) for arm, rows in raw["arms"].items()} == dict.fromkeys(study.arms, 2)
    assert {len(choice["trials"]) for choice in raw["tuning"].values()} == {3}
    assert [row["seed"] for row in raw["dead"]] == [0, 1]
    assert all(set(row["smallest"]) == set(row["random"]) == {"0.05", "0.1", "0.2", "0.4"} for row in raw["dead"])


def test_the_threshold_lets_five_percent_train_and_lora_is_as_large(code: Any, world: Any, base: Any) -> None:
    arms = code.methods(base, True)
    count = {arm: Delta.create(base, *methods).trainable_parameters for arm, methods in arms.items()}
    everything = sum(p.numel() for n, p in base.model.named_parameters() if n != "classes.weight")
    assert abs(count["sara"] / everything - 0.05) < 0.002
    assert count["sara"] == count["sara, one phase"] == count["sara, no nuclear norm"]
    assert count["full"] == everything
    smaller = arms["lora"][0].rank == 1
    assert smaller or abs(count["lora"] / count["sara"] - 1) < 0.6


def test_zeroed_weights_are_the_smallest_over_all_layers(code: Any, world: Any, base: Any, pictures: Any) -> None:
    from tunesmith.deltas.weight.prune import prune

    merged = base.merged(prune(base, None, "weight", 0.2, targets="all-linear,convs"))
    before = dict(base.model.named_parameters())
    kept, lost = [], []
    for name, p in merged.model.named_parameters():
        if name.endswith("weight") and p.dim() > 1 and name != "classes.weight":
            off = (p == 0) & (before[name] != 0)
            kept.append(before[name][~off].abs())
            lost.append(before[name][off].abs())
    kept_, lost_ = torch.cat(kept), torch.cat(lost)
    assert float(lost_.max()) <= float(kept_.min())
    assert abs(len(lost_) / (len(lost_) + len(kept_)) - 0.2) < 0.01
    again = code.zeroed(base, pictures, world.SMOKE, 0)
    assert again == code.zeroed(base, pictures, world.SMOKE, 0)


def test_the_forward_process_keeps_the_variance_and_ends_in_noise(world: Any) -> None:
    unet = import_module(world.__name__.rpartition(".")[0] + ".unet")
    keep = unet.kept_signal()
    assert keep.shape == (unet.STEPS,) and (keep[1:] <= keep[:-1]).all()
    assert float(keep[0]) > 0.999 and float(keep[-1]) < 1e-3
    x, noise = torch.randn(4000, 1, 1, 1), torch.randn(4000, 1, 1, 1)
    for t in (10, 500, 990):
        assert float(unet.noised(x, torch.full((4000,), t), noise).var()) == pytest.approx(1, abs=0.08)


def test_a_perfect_predictor_draws_the_picture_it_believes_in(world: Any) -> None:
    unet = import_module(world.__name__.rpartition(".")[0] + ".unet")
    keep, picture = unet.kept_signal(), torch.rand(1, 1, 28, 28) * 2 - 1

    class Knows(torch.nn.Module):
        def forward(self, x: Any, t: Any, y: Any) -> Any:
            a = keep[t].view(-1, 1, 1, 1)
            return (x - a.sqrt() * picture) / (1 - a).sqrt()

    drawn = unet.sample(Knows(), torch.zeros(3, dtype=torch.int64), 8, torch.Generator().manual_seed(0))
    left = 5 * float((1 - keep[0]).sqrt())  # the last time still has a trace of noise, here up to 5 of its deviations
    assert left < 0.06
    torch.testing.assert_close(drawn, picture.expand(3, -1, -1, -1), atol=left, rtol=0)


def test_the_frechet_distance_by_its_closed_form(world: Any) -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(4000, 3, generator=g) * torch.tensor([2.0, 2.0, 0.5]) + torch.tensor([1.0, 0, 0])
    assert world.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert world.frechet(a, b) == pytest.approx(1 + (2 - 1) ** 2, abs=0.2)


def test_splits_share_no_letter_and_only_the_new_row_trains_beside_an_arm(world: Any, base: Any, pictures: Any) -> None:
    judge = world.critic(pictures, pictures.letters[:20], 1)
    made = [world.world(base, pictures, judge, world.SMOKE, seed) for seed in (0, 1)]
    assert torch.equal(made[0].held["test"], made[1].held["test"])
    assert not torch.equal(made[0].task.x, made[1].task.x)
    delta = Delta.create(base, *made[0].companions)
    assert delta.trainable_parameters == world.SMOKE.emb
    assert made[0].score("dev").metric == made[0].score("dev").metric


def _raw(
    sara: float = 0.10, lora: float = 0.11, *, rise: float = 0.01, lora_rise: float = 0.02, dead: float = 0.001,
    random: float = 0.1, wobble: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    means = {"sara": (sara, rise), "lora": (lora, lora_rise), "full": (0.09, 0.05)}
    arms = {
        arm: [
            {"seed": s, "metric": m + (wobble * (s - 1) if arm == "sara" else 0),
             "retention": {"loss": 0.05 + r, "frechet": 1.0}}
            for s in range(3)
        ]
        for arm, (m, r) in means.items()
    }  # fmt: skip
    shares = ("0.05", "0.1", "0.2", "0.4")
    cost = [
        {"seed": s, "base": 0.05, "smallest": {q: 0.05 * (1 + dead) for q in shares},
         "random": {q: 0.05 * (1 + random) for q in shares}}
        for s in range(3)
    ]  # fmt: skip
    return {"arms": arms, "base": {"target": 0.5, "loss": 0.05}, "dead": cost}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (_raw(), "reproduced"),
        (_raw(sara=0.111, lora=0.11), "reproduced"),  # within 1 %
        (_raw(sara=0.12, lora=0.11), "inconclusive"),
        (_raw(sara=0.12, lora=0.11, rise=0.03), "not reproduced"),
        (_raw(rise=0.03), "inconclusive"),
        (_raw(dead=0.02, random=1.0), "inconclusive"),
        (_raw(dead=0.005, random=0.01), "inconclusive"),
        (_raw(dead=0.02, random=0.05), "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, raw: dict[str, Any], label: str) -> None:
    assert study.verdict(raw).label == label
