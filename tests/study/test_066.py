# SPDX-License-Identifier: Apache-2.0
"""Study 066 at toy size: patches and concepts, the denoiser and its sampler, arms, measures, and the verdict rule."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.core.delta import Delta
from tunesmith.study import load_study
from tunesmith.study.cells import Cells
from tunesmith.study.spec import Context

FOLDER = Path(__file__).parents[2] / "studies" / "066-ppt"


@pytest.fixture(scope="module")
def study() -> Any:
    torch.set_num_threads(1)
    return load_study(FOLDER)


def part(study: Any, name: str) -> Any:
    return import_module(study.run.__module__.rpartition(".")[0] + "." + name)


@pytest.fixture(scope="module")
def world(study: Any) -> Any:
    return part(study, "personal").build(None, part(study, "study").SMOKE)


def test_a_smoke_run_gives_every_kind_of_arm(study: Any, tmp_path: Path, monkeypatch: Any) -> None:
    module = part(study, "study")
    for name, value in (("SINGLE", ("full", "random 10 %", "ppt 10 %")), ("CURVE", ()), ("JOINT", module.JOINT)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "ARMS", ("full", "random 10 %", "ppt 10 %", *module.JOINT))
    raw = module.run(Context(True, [0, 1], tmp_path, Cells(tmp_path / "cells.jsonl", {})))
    assert list(raw["arms"]) == list(module.ARMS)
    assert all([row["seed"] for row in rows] == [0, 1] for rows in raw["arms"].values())
    assert all(len(choice["trials"]) == 2 for choice in raw["tuning"].values())
    assert module.verdict(raw).label in ("reproduced", "not reproduced", "inconclusive")


def test_concepts_are_what_they_say(study: Any) -> None:
    music = part(study, "music")
    arp = music.concept("arpeggio", 40, np.random.default_rng(0))
    assert arp.shape == (40, 1, 16, 36) and set(arp.unique().tolist()) == {-1.0, 1.0}
    assert ((arp[:, 0] > 0).sum(2) == 1).all(), "one note at a time"
    syn = music.concept("syncopation", 40, np.random.default_rng(0))[:, 0] > 0
    assert not syn[:, ::4].any(), "nothing on the beats"
    assert syn.any((1, 2)).all() and set(syn.sum(2).unique().tolist()) <= {0, 3, 4}


def test_prompts_name_key_and_density(study: Any) -> None:
    music = part(study, "music")
    roll = torch.full((2, 1, 16, 36), -1.0)
    roll[0, 0, :, 3] = 1.0  # MIDI 48, a held C
    roll[1, 0, ::2, 9] = 1.0  # MIDI 54, struck eight times
    assert music.onsets(roll).tolist() == [1, 8]
    found = music.described(roll, median=4.0)
    assert found.prompts.tolist() == [[0, music.SPARSE], [6, music.DENSE]]


def test_the_classifier_hears_both_concepts(study: Any) -> None:
    music = part(study, "music")
    model = music.listener(music.toy_chorales(40), 60, seed=0)
    rng = np.random.default_rng(5)
    scores = {n: music.heard(model, music.concept(n, 40, rng)).mean(0) for n in music.CONCEPTS}
    assert scores["arpeggio"][0] > 0.7 > 0.35 > scores["arpeggio"][1]
    assert scores["syncopation"][1] > 0.7 > 0.35 > scores["syncopation"][0]


def test_the_sampler_undoes_noise_that_is_known(study: Any) -> None:
    """With a model that knows the patch, DDIM gives it back."""
    diffusion = part(study, "diffusion")
    x = torch.where(torch.rand(3, 1, 16, 36, generator=torch.Generator().manual_seed(0)) < 0.2, 1.0, -1.0)

    class Knowing(torch.nn.Module):
        def forward(self, z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            a = diffusion.signal(t)
            return (z - a.sqrt() * x) / (1 - a).sqrt()

    base = type("B", (), {"model": Knowing(), "evaluating": lambda self: torch.no_grad()})()
    assert torch.equal(diffusion.sampled(base, torch.zeros(3, 2, dtype=torch.int64), 6, seed=0), x)


def test_draws_repeat(study: Any, world: Any) -> None:
    diffusion, personal = part(study, "diffusion"), part(study, "personal")
    assert diffusion.denoising_loss(world.base, world.prior, 2, 1) == diffusion.denoising_loss(
        world.base, world.prior, 2, 1
    )
    prompts = personal.asked(4, [15], 0)
    one, two = (diffusion.sampled(world.base, prompts, 3, s) for s in (0, 0))
    assert torch.equal(one, two) and not torch.equal(one, diffusion.sampled(world.base, prompts, 3, 1))


def test_attention_has_three_blocks_and_arms_train_what_they_say(study: Any, world: Any) -> None:
    personal = part(study, "personal")
    sites = world.base.sites.select("attention", ("linear",))
    assert len(sites) == 12 and {s.role for s in sites} == {"q", "k", "v", "o"}
    inside = sum(s.module.weight.numel() for s in sites)
    tokens = personal.identifiers("syncopation", 1)
    row = world.base.model.tokens.weight.shape[1]
    refs, _ = personal.references(world, "syncopation", 0)
    task = personal.DenoisingTask(personal.called(refs, tokens), 0, personal.Denoising())
    counts = {}
    for arm in ("full", "attention-only", "token-only", "lora", "random 10 %", "ppt 10 %"):
        delta = personal.trained(world, personal.methods_of(arm, 0.1, 1e-2, tokens), task, 2, 1e-2, 0)
        counts[arm] = delta.trainable_parameters - row
    biases = sum(s.module.bias.numel() for s in sites)
    everything = sum(p.numel() for p in world.base.model.parameters()) - world.base.model.tokens.weight.numel()
    assert counts["token-only"] == 0 and counts["full"] == everything
    assert counts["attention-only"] == inside + biases
    assert counts["random 10 %"] == counts["ppt 10 %"] == round(0.1 * inside)


def test_two_concepts_train_the_union_of_what_each_finds(study: Any, world: Any) -> None:
    import tunesmith as ts
    from tunesmith.train.config import TrainConfig
    from tunesmith.train.sample import started

    personal = part(study, "personal")
    config = TrainConfig(steps=4, batch_size=4, lr=1e-2, precision="fp32")
    tasks = [
        personal.DenoisingTask(personal.references(world, n, 0)[0], 0, personal.Denoising()) for n in personal.CONCEPTS
    ]
    options = {"density": 0.1, "targets": "attention"}

    def places(delta: Delta) -> set[tuple[str, int]]:
        p = delta.part("ppt")
        return {(path, i) for path in p.kind_of for i in p.tensors(path)["indices"].tolist()}

    alone = [places(started(world.base, [ts.PivotalTuning(**options)], t, config, "d", "both")) for t in tasks]
    joint = started(world.base, [personal.Joint.of(tasks, config, **options)], tasks[0], config, "d", "both")
    assert places(joint) == alone[0] | alone[1] and alone[0] != alone[1]


def test_distances(study: Any) -> None:
    personal = part(study, "personal")
    a = torch.full((2, 1, 16, 36), -1.0)
    a[1, 0, 0, :18] = 1.0
    torch.testing.assert_close(personal.differing(a, a), torch.tensor([[0.0, 18 / 576], [18 / 576, 0.0]]))


def _raw(fidelity: float = 0.8, distance: float = 0.06, prior: float = 0.01, random: float = 0.7, both: float = 0.4,
         wobble: float = 0.0) -> dict[str, Any]:  # fmt: skip
    def rows(wobbling: bool = False, **values: float) -> list[dict[str, Any]]:
        base = {"fidelity": 0.8, "distance": 0.04, "prior": 0.02, "diversity": 0.1, "obeyed": 0.6, **values}
        return [
            {"seed": s, "lr": 1e-3, **base, "distance": base["distance"] + wobbling * wobble * (s - 1)}
            for s in range(3)
        ]

    return {"arms": {
        "full": rows(), "random 10 %": rows(fidelity=random), "ppt 10 %": rows(True, fidelity=fidelity, distance=distance, prior=prior),
        "ppt, 1 token": [{"seed": s, "both": 0.2} for s in range(3)], "ppt, 4 tokens": [{"seed": s, "both": both} for s in range(3)],
    }, "tuning": {}} | {}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "reproduced"),
        ({"fidelity": 0.76}, "reproduced"),
        ({"fidelity": 0.74}, "inconclusive"),
        ({"distance": 0.03}, "not reproduced"),
        ({"prior": 0.03}, "not reproduced"),
        ({"random": 0.85}, "not reproduced"),
        ({"both": 0.1}, "not reproduced"),
        ({"both": 0.2}, "inconclusive"),
        ({"distance": 0.045, "wobble": 0.02}, "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(study: Any, monkeypatch: Any, options: dict[str, float], label: str) -> None:
    module = part(study, "study")
    monkeypatch.setattr(module, "SINGLE", ("full", "random 10 %", "ppt 10 %"))
    assert module.verdict(_raw(**options)).label == label
