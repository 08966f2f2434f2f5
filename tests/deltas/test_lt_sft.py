# SPDX-License-Identifier: Apache-2.0
"""LT-SFT: how many entries, which ones, what stays frozen, what it equals at full density, and how deltas compose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, Part, bake
from tunesmith.core.errors import BaseMismatch, UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import LTSFT, Full, Head
from tunesmith.deltas.weight.lt_sft import headless
from tunesmith.deltas.weight.trial import best_free
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.sample import sample_of, started
from tunesmith.train.tasks import LoaderTask

WEIGHTS = "everything"  # lt-sft takes no norms


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 12, bias=bias), nn.Tanh(), nn.Linear(12, 8, bias=bias), nn.LayerNorm(8), nn.Linear(8, 3)
    )


def batches(n: int = 8, seed: int = 1) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * n, 6, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, 8 * n, 8)]


def loss(output: Any, batch: Any) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else output["logits"]
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def run(base: Base, *methods: Any, data: list[Any] | None = None, tied: str = "both", **settings: Any) -> Delta:
    """A delta set up and trained as `tune` does it."""
    config = TrainConfig(**{"steps": 12, "lr": 1e-2, "precision": "fp32", "seed": 4, **settings})
    task = LoaderTask(data or batches(), loss, seed=config.seed)
    delta = started(base, list(methods), task, config, "delta", tied)
    fit(base, delta, task, config, progress=False)
    return delta


def base_of(model: nn.Module) -> Base:
    return Base(model.eval(), example=(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),))


def places(delta: Delta) -> dict[str, list[int]]:
    """Flat places by path and parameter."""
    part = delta.parts[0]
    return {f"{p}:{n}": t.tolist() for p, n, t in part.items() if n.endswith("indices")}


def dense(base: Base, delta: Delta) -> dict[str, torch.Tensor]:
    """theta' - theta by parameter name."""
    old, new = (dict(b.model.named_parameters()) for b in (base, base.merged(delta)))
    return {n: new[n] - old[n] for n in old}


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_exactly_k_entries_move_whatever_the_decay(decay: float) -> None:
    base = base_of(net())
    before = base.digest()
    delta = run(base, LTSFT(entries=37, targets=WEIGHTS), weight_decay=decay)
    assert delta.trainable_parameters == 37 == sum(map(len, places(delta).values()))
    moved = {n: d.nonzero().numel() for n, d in dense(base, delta).items()}
    changed = sum(int((d != 0).sum()) for d in dense(base, delta).values())
    assert 0 < changed <= 37 and base.digest() == before
    assert moved["3.weight"] == moved["3.bias"] == 0, "norms stay frozen"
    for key, flat in places(delta).items():
        path, name = key.split(":")
        full = dense(base, delta)[f"{path}.{'bias' if name.startswith('bias') else 'weight'}"].flatten()
        full[flat] = 0
        assert not full.any(), f"{key}: an entry outside the mask moved"


def test_the_places_are_the_largest_moves_of_the_dense_trial() -> None:
    base = base_of(net())
    settings = {"steps": 10, "lr": 1e-2, "precision": "fp32", "seed": 4}
    task = LoaderTask(batches(), loss, seed=4)
    config = TrainConfig(**settings)
    delta = started(base, [LTSFT(entries=25, trial=0.5, targets=WEIGHTS)], task, config, "d", "both")
    full = Delta.create(base, Full(targets="everything,!norms"), seed=4)
    fit(base, full, task, TrainConfig(**{**settings, "steps": 5}), progress=False)
    moves = [(float(v), p, n, i) for p, n, t in full.parts[0].items() for i, v in enumerate(t.abs().flatten().tolist())]
    want = {(p, n, i) for _, p, n, i in sorted(moves, key=lambda m: -m[0])[:25]}
    names = {"indices": "weight", "bias_indices": "bias"}
    got = {(k.split(":")[0], names[k.split(":")[1]], i) for k, flat in places(delta).items() for i in flat}
    assert got == want
    assert all(not t.any() for _, n, t in delta.parts[0].items() if n.endswith("values")), "it rewinds to the base"


def test_ties_go_to_the_first_entries() -> None:
    flat = {("a", "weight"): torch.tensor([[1.0, 2.0], [1.0, 1.0]]), ("b", "bias"): torch.tensor([2.0, 1.0])}
    found = best_free(flat, 4, {})
    assert {k: v.tolist() for k, v in found.items()} == {("a", "weight"): [0, 1, 2], ("b", "bias"): [0]}
    more = best_free(flat, 1, found)
    assert {k: v.tolist() for k, v in more.items()} == {("a", "weight"): [0, 1, 2, 3], ("b", "bias"): [0]}


@pytest.mark.parametrize("which", [0, 2, 3], ids=["language model", "convolutions", "sequence"])
def test_all_entries_without_l1_are_full_fine_tuning(which: int) -> None:
    """K = N and l1 = 0 is plain full fine-tuning with the same seed, step for step."""
    base = toys()[which]
    probe = base.probe()
    x = probe["input_ids"] if isinstance(probe, dict) else probe[0]
    y = x if x.dtype == torch.int64 else torch.arange(4) % 5
    data = [{"input_ids": x, "labels": y} if isinstance(probe, dict) else (x, y)]
    losses, deltas = [], []
    for method in (LTSFT(density=1.0, targets="everything"), Full(targets="everything,!norms")):
        config = TrainConfig(steps=6, lr=1e-3, precision="fp32", seed=2)
        task = LoaderTask(data, lambda out, b: loss(out, (None, b["labels"]) if isinstance(b, dict) else b), seed=2)
        deltas.append(started(base, [method], task, config, "d", "both"))
        losses.append(fit(base, deltas[-1], task, config, progress=False).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert deltas[0].trainable_parameters == deltas[1].trainable_parameters
    sparse, full = (dense(base, d) for d in deltas)
    for name, d in full.items():
        if name.endswith("attention.k.bias"):
            continue  # softmax does not see it: its gradient is rounding, which Adam makes a step of full size
        torch.testing.assert_close(sparse[name], d, atol=2e-5, rtol=0, msg=name)


def test_l1_is_the_mean_absolute_change_in_both_phases() -> None:
    base = base_of(net())
    method = LTSFT(entries=20, l1=0.5, targets=WEIGHTS)
    delta = run(base, method)
    N = sum(p.numel() for n, p in base.model.named_parameters() if not n.startswith("3."))
    part = delta.parts[0]
    got = sum(method.penalty(base.sites.of(p, k), part.tensors(p)).item() for p, k in part.kind_of.items())
    want = sum(t.abs().sum().item() for _, n, t in part.items() if n.endswith("values"))
    assert got == pytest.approx(0.5 * want / N, rel=1e-5)
    strong = run(base, LTSFT(entries=20, l1=5e3, targets=WEIGHTS), lr=1e-3)
    free = run(base, LTSFT(entries=20, targets=WEIGHTS), lr=1e-3)
    size = lambda d: sum(t.abs().sum().item() for _, n, t in d.parts[0].items() if n.endswith("values"))  # noqa: E731
    assert size(strong) < 0.5 * size(free)


def test_the_trial_is_pulled_too() -> None:
    """With a strong pull the dense trial moves nothing but by the pull's own sign, so other places are chosen."""
    base = base_of(net())
    task, config = LoaderTask(batches(), loss, seed=4), TrainConfig(steps=20, lr=1e-2, precision="fp32", seed=4)
    found = [places(started(base, [LTSFT(entries=30, trial=1.0, l1=l1, targets=WEIGHTS)], task, config, "d", "both"))
             for l1 in (0.0, 1e3)]  # fmt: skip
    assert found[0] != found[1]


def test_iterations_add_equal_parts_and_keep_what_was_learnt() -> None:
    base = base_of(net())
    task, config = LoaderTask(batches(), loss, seed=4), TrainConfig(steps=12, lr=1e-2, precision="fp32", seed=4)
    one, three = (
        started(base, [LTSFT(entries=k, iterations=n, targets=WEIGHTS)], task, config, "d", "both")
        for k, n in ((11, 1), (33, 3))
    )
    assert three.trainable_parameters == 33
    first, all_ = places(one), places(three)
    assert all(set(first[k]) <= set(all_[k]) for k in first), "the first third is that of one iteration"
    values = torch.cat([t for _, n, t in three.parts[0].items() if n.endswith("values")])
    assert int((values == 0).sum()) == 11, "the last third has not trained yet"
    fit(base, three, task, config, progress=False)
    assert int((torch.cat([t for _, n, t in three.parts[0].items() if n.endswith("values")]) == 0).sum()) == 0


def test_random_control_needs_no_trial_and_depends_on_the_seed() -> None:
    base = base_of(net())

    def of(seed: int) -> dict[str, list[int]]:
        task, config = LoaderTask(batches(), loss, seed=seed), TrainConfig(steps=4, seed=seed, precision="fp32")
        method = LTSFT(entries=30, select="random", targets=WEIGHTS)
        return places(started(base, [method], task, config, "d", "both"))

    assert of(1) == of(1) != of(2)
    assert sum(map(len, of(1).values())) == 30


def test_a_head_starts_anew_after_the_trial() -> None:
    base = toys()[3]
    probe = base.probe()
    assert isinstance(probe, tuple)
    data = [(probe[0], torch.arange(4) % 3)]
    config = TrainConfig(steps=6, lr=1e-2, precision="fp32", seed=4)
    task = LoaderTask(data, loss, seed=4)
    methods = [LTSFT(entries=40, targets="fc,conv,embed"), Head(classes=3, pool="mean")]
    delta = started(base, methods, task, config, "d", "both")
    fresh = Delta.create(base, LTSFT(entries=40, select="random", targets="fc,conv,embed"), methods[1], seed=4,
                         sample=sample_of(task, config))  # fmt: skip
    assert torch.equal(delta.part("head").tensors("")["W"], fresh.part("head").tensors("")["W"])


def test_task_and_language_commute_and_sum() -> None:
    base = base_of(net())
    source, target = (run(base, LTSFT(entries=20, targets=WEIGHTS), data=batches(seed=n)) for n in (6, 7))
    source.name, target.name = "source", "target"
    with base.using(source):
        config = TrainConfig(steps=12, lr=1e-2, precision="fp32", seed=5)
        task_ = LoaderTask(batches(), loss, seed=5)
        task = started(base, [LTSFT(entries=20, targets=WEIGHTS)], task_, config, "task", "both")
        fit(base, task, task_, config, progress=False)
    x = batches()[0][0]
    with torch.no_grad():
        with base.using(target, task):
            one = base.model(x)
        with base.using(task, target):
            other = base.model(x)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        a, b = dense(base, target), dense(base, Delta("task", task.parts))
        merged = dict(base.merged(target, task).model.named_parameters())
        for n, p in base.model.named_parameters():
            torch.testing.assert_close(merged[n], p + a[n] + b[n], atol=1e-6, rtol=0)
        torch.testing.assert_close(base.merged(task, target).model(x), one, atol=1e-5, rtol=0)


def test_a_task_delta_of_one_language_goes_on_another_by_name_only() -> None:
    """`tune` records the language below; another is accepted with check=False and refused without."""
    base = base_of(net())
    kw = {"loss": loss, "steps": 4, "lr": 1e-2, "progress": False, "precision": "fp32"}
    method = LTSFT(entries=10, targets=WEIGHTS)
    source = ts.tune(base, batches(), method=method, name="source", **kw).delta
    with base.using(source):
        task = ts.tune(base, batches(), method=method, name="task", **kw).delta
    target = ts.tune(base, batches(seed=2), method=method, name="target", **kw).delta
    with base.using(source, task):
        pass
    with pytest.raises(BaseMismatch, match="source"), base.using(target, task):
        pass
    with base.using(target, task, check=False):
        assert base.active == ["target", "task"]


def test_a_language_delta_is_applied_without_its_head() -> None:
    base = toys()[3]
    probe = base.probe()
    assert isinstance(probe, tuple)
    delta = run(base, LTSFT(entries=40, targets="fc,conv,embed"), Head(classes=3, pool="mean"),
                data=[(probe[0], torch.arange(4) % 3)])  # fmt: skip
    body = headless(delta)
    assert [p.name for p in body.parts] == ["lt-sft"] and body.provenance["base"] == delta.provenance["base"]
    with torch.no_grad(), base.using(body):
        out = base.model(*probe)
    assert out.shape[-1] == 19, "the base's own head is back"
    want = base.merged(Delta("weights", [delta.part("lt-sft")])).model(*probe)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=0)
    with pytest.raises(UsageError, match="nothing but a head"):
        headless(Delta("h", [delta.part("head")]))


def test_untied_training_leaves_the_output_embedding_alone() -> None:
    base = toys()[1]
    probe = base.probe()
    assert isinstance(probe, dict)
    x = probe["input_ids"]
    data = [{"input_ids": x, "labels": x}]
    config = TrainConfig(steps=6, lr=1e-2, precision="fp32")
    task = LoaderTask(data, lambda out, b: loss(out, (None, b["labels"])), seed=0)
    for tied in ("both", "untie"):
        delta = started(base, [LTSFT(entries=60, targets="embed", trial=1.0)], task, config, "d", tied)
        fit(base, delta, task, config, progress=False)
        merged = base.merged(delta).model
        assert torch.equal(merged.head.weight, merged.embed.weight) == (tied == "both")
        assert torch.equal(merged.head.weight, base.model.head.weight) == (tied == "untie")


def test_tiny_changes_are_dropped_and_the_way_through_a_file_is_exact(tmp_path: Any) -> None:
    base = base_of(net())
    delta = run(base, LTSFT(entries=30, targets=WEIGHTS))
    part = delta.parts[0]
    path, values = next((p, t) for p, n, t in part.items() if n == "values" and len(t) > 2)
    with torch.no_grad():
        values[0] = 5e-8
    before = {p: {n: t.clone() for n, t in part.tensors(p).items()} for p in part.kind_of}
    bake(base, delta)
    assert delta.trainable_parameters == 29
    assert torch.equal(delta.parts[0].tensors(path)["values"], before[path]["values"][1:])
    delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", base)
    assert again.digest == delta.digest and places(again) == places(delta)


def test_places_beyond_32_bits_survive_the_file(tmp_path: Any) -> None:
    part = Part(LTSFT(), [("embed", "embedding")])
    far = torch.tensor([3, 2**31 - 1, 2**31, 2**33 + 5])
    part.put("embed", "indices", far, trainable=False)
    part.put("embed", "values", torch.arange(4.0) + 1, trainable=True)
    part.put("embed", "total", torch.tensor(2**34), trainable=False)
    delta = Delta("far", [part], provenance={"untrained": False})
    delta.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d").parts[0].tensors("embed")
    assert torch.equal(again["indices"], far) and int(again["total"]) == 2**34


def test_too_many_entries_are_an_error() -> None:
    with pytest.raises(UsageError, match="only"):
        run(base_of(net()), LTSFT(entries=10**6, targets=WEIGHTS))
    with pytest.raises(UsageError, match="learns its start from data"):
        Delta.create(base_of(net()), LTSFT())


def test_counts_follow_density(llama, ids) -> None:
    base = Base(llama)
    data = [{"input_ids": ids, "labels": ids}]
    config = TrainConfig(steps=2, lr=1e-3, precision="fp32")
    task = LoaderTask(data, lambda out, b: loss(out.logits, (None, b["labels"])), seed=0)
    delta = started(base, [LTSFT(density=0.05)], task, config, "d", "both")
    N = sum(p.numel() for n, p in llama.named_parameters() if "norm" not in n and "lm_head" not in n)
    assert delta.trainable_parameters == int(0.05 * N + 0.5)
    assert all(int(t) == N for _, n, t in delta.parts[0].items() if n == "total")
