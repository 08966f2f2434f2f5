# SPDX-License-Identifier: Apache-2.0
"""Half fine-tuning: how many matrices of each kind, which ones, what stays frozen, and undoing half of a delta."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.toys import toys
from tunesmith.deltas import HFT, Full, Head, LoRA
from tunesmith.deltas.weight.hft import reset
from tunesmith.train.config import TrainConfig
from tunesmith.train.loop import fit
from tunesmith.train.tasks import LoaderTask

PARTS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def llama_of(layers: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def paths(base: Base, **options: Any) -> set[str]:
    return set(Delta.create(base, HFT(**options)).parts[0].kind_of)


def counted(found: set[str], layers: int) -> list[tuple[int, int, int]]:
    """(attention, MLP, norm) sites by layer."""
    out = []
    for i in range(layers):
        mine = [p for p in found if f".layers.{i}." in p]
        kinds = Counter(next((k for k, names in PARTS.items() if p.endswith(names)), "norm") for p in mine)
        out.append((kinds["attention"], kinds["mlp"], kinds["norm"]))
    return out


@pytest.mark.parametrize("layers", [4, 5])
def test_exact_counts_in_every_layer(layers: int) -> None:
    base = Base(llama_of(layers))
    for stage in range(6):
        rows = counted(paths(base, round=stage), layers)
        assert all((a, n) == (2, 1) for a, _, n in rows)
        assert Counter(m for _, m, _ in rows) == {2: (layers + 1) // 2, 1: layers // 2}
    outside = {"model.embed_tokens", "lm_head", "model.norm"}
    assert outside <= paths(base) and not outside & paths(base, outside=False)


def test_another_round_draws_another_half_and_every_matrix_gets_its_turn() -> None:
    base = Base(llama_of(4))
    seen = [paths(base, round=r, outside=False) for r in range(12)]
    assert len({frozenset(s) for s in seen}) == 12
    every = {p for p in base.modules if ".layers." in p and p.endswith(("_proj", "layernorm"))}
    assert set().union(*seen) == every


def test_the_choice_is_the_same_on_any_machine() -> None:
    """It is a function of round and paths, of no random generator, so it can be written down."""
    found = paths(Base(llama_of(2)), round=3, outside=False)
    assert sorted(p.removeprefix("model.layers.") for p in found) == [
        "0.input_layernorm",
        "0.mlp.gate_proj",
        "0.mlp.up_proj",
        "0.self_attn.k_proj",
        "0.self_attn.v_proj",
        "1.input_layernorm",
        "1.mlp.down_proj",
        "1.self_attn.k_proj",
        "1.self_attn.v_proj",
    ]


def test_half_of_the_numbers_train() -> None:
    base = Base(llama_of(6))
    inside = sum(p.numel() for n, p in base.model.named_parameters() if ".layers." in n)
    for stage in range(5):
        share = Delta.create(base, HFT(round=stage, outside=False)).trainable_parameters / inside
        assert 0.45 <= share <= 0.55


@pytest.mark.parametrize(("rule", "ratio"), [("model", 0.5), ("layer", 0.5), ("model", 0.25), ("category", 0.25)])
def test_other_rules_and_ratios(rule: str, ratio: float) -> None:
    base = Base(llama_of(4))
    found = paths(base, rule=rule, ratio=ratio, outside=False)
    rows = counted(found, 4)
    if rule == "layer":
        assert Counter(rows) == {(4, 3, 2): 2, (0, 0, 0): 2}
    elif rule == "model":
        assert len(found) == round(ratio * 36)
    else:
        assert all(a == 1 and m in (0, 1) and n in (0, 1) for a, m, n in rows)
        assert sum(m for _, m, _ in rows) == 3 and sum(n for _, _, n in rows) == 2


def test_encoders_with_two_mlp_matrices(bert) -> None:
    found = {p for p in paths(Base(bert), outside=False)}
    for i in range(2):
        mine = [p for p in found if f"layer.{i}." in p]
        assert sum(".attention.self" in p or p.endswith("attention.output.dense") for p in mine) == 2
        assert sum(p.endswith(("intermediate.dense", f"layer.{i}.output.dense")) for p in mine) == 1
        assert sum("LayerNorm" in p for p in mine) == 1


def test_fused_attention_is_refused_or_taken_whole(gpt2) -> None:
    base = Base(gpt2)
    with pytest.raises(UsageError, match="one matrix") as e:
        paths(base)
    assert "rule='layer'" in str(e.value)
    assert paths(base, rule="layer") and paths(base, targets="everything,!qkv")


def test_unknown_roles_and_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="example"):
        paths(Base(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
    plain = Base(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), example=(torch.ones(1, 4),))
    with pytest.raises(UsageError, match="no repeated blocks"):
        paths(plain, rule="layer")
    with pytest.raises(UsageError, match="chose none"):
        paths(Base(llama_of(2)), ratio=0.0, outside=False)


def lm_task(base: Base) -> LoaderTask:
    ids = torch.randint(3, 37, (32, 7), generator=torch.Generator().manual_seed(1))

    def loss(out: Any, batch: Any) -> Tensor:
        logits = out["logits"] if isinstance(out, dict) else out.logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return LoaderTask([{"input_ids": x, "labels": x} for x in ids.split(4)], loss, seed=0)


CONFIG = TrainConfig(steps=8, lr=1e-2, precision="fp32", seed=0, weight_decay=0.3)


def test_frozen_tensors_stay_and_biases_go_with_their_matrix() -> None:
    base = toys()[0]
    delta = Delta.create(base, HFT(outside=False))
    fit(base, delta, lm_task(base), CONFIG, progress=False)
    after = dict(base.merged(delta).model.named_parameters())
    chosen = set(delta.parts[0].kind_of)
    for name, w in base.model.named_parameters():
        same = torch.equal(after[name], w)
        assert same != (name.rpartition(".")[0] in chosen), name
    names = {p: {n for q, n, _ in delta.parts[0].items() if q == p} for p in chosen}
    assert all(n == {"weight", "bias"} for n in names.values())


def test_ratio_one_is_full_fine_tuning_bit_for_bit() -> None:
    base = toys()[1]
    states = []
    for method in (HFT(ratio=1.0), Full()):
        delta = Delta.create(base, method, seed=0)
        losses = fit(base, delta, lm_task(base), CONFIG, progress=False).losses
        states.append((losses, {k.split("/", 1)[1]: t for k, t in delta.items()}))
    assert states[0][0] == states[1][0]
    assert states[0][1].keys() == states[1][1].keys()
    assert all(torch.equal(t, states[1][1][k]) for k, t in states[0][1].items())


def test_tied_embeddings_count_once_and_move_together() -> None:
    base = toys()[1]
    delta = Delta.create(base, HFT())
    assert list(delta.parts[0].alias.items()) == [("head", "embed")]
    fit(base, delta, lm_task(base), CONFIG, progress=False)
    merged = base.merged(delta).model
    assert merged.head.weight is merged.embed.weight


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def test_frozen_matrices_take_no_gradient_product() -> None:
    """Backward makes one product fewer for every matrix that does not train."""
    base = Base(llama_of(4))
    ids = torch.randint(3, 50, (2, 6))
    matrices = {p for p, m in base.modules.items() if isinstance(m, nn.Linear) and ".layers." in p}
    products = {}
    for name, method in (("full", Full()), ("half", HFT())):
        delta = Delta.create(base, method)
        with base.frozen(), base.using(delta):
            loss = base.model(input_ids=ids).logits.square().mean()
            with Products() as seen:
                loss.backward()
        products[name] = seen.n
        trained = matrices & set(delta.parts[0].kind_of)
    assert products["full"] - products["half"] == len(matrices) - len(trained) == 14


def test_rounds_add_up_and_each_starts_with_fresh_moments() -> None:
    """A chain of two rounds is their sum, and `tune` records that the second stands on the first."""
    base = toys()[0]
    ids = torch.randint(3, 37, (8, 7), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": x, "labels": x} for x in ids.split(4)]
    task = lm_task(base)
    kw: Any = {"loss": task.objective.fn, "steps": 4, "lr": 1e-2, "progress": False, "precision": "fp32"}
    one = ts.tune(base, data, method=HFT(round=0), name="one", **kw).delta
    with base.using(one):
        two = ts.tune(base, data, method=HFT(round=1), name="two", **kw).delta
    assert [p["name"] for p in two.provenance["lineage"]] == ["one"]
    assert set(one.parts[0].kind_of) != set(two.parts[0].kind_of)
    after = dict(base.merged(one, two).model.named_parameters())
    for name, w in base.model.named_parameters():
        path, _, kind = name.rpartition(".")
        for delta in (one, two):
            w = w + (delta.parts[0].tensors(path)[kind] if path in delta.parts[0].kind_of else 0)
        torch.testing.assert_close(after[name], w, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "method", [Full(), LoRA(rank=2, targets="all-linear"), HFT(round=2)], ids=lambda m: m.info.name
)
@pytest.mark.parametrize("rule", ["category", "model", "layer"])
def test_complementary_resets_give_the_base_back(method: Any, rule: str, ids, moved) -> None:
    base = Base(llama_of(4))
    delta = moved(base, method)
    digest = delta.digest
    half = reset(delta, base, rule=rule, round=1)
    other = reset(delta, base, rule=rule, round=1, complement=True)
    kept, left = set(half.parts[0].kind_of), set(other.parts[0].kind_of)
    assert kept | left == set(delta.parts[0].kind_of) and not kept & left and kept and left
    none = reset(half, base, rule=rule, round=1, complement=True)
    assert not none.parts
    with torch.no_grad():
        plain = base.model(input_ids=ids)[0]
        with base.using(none):
            assert torch.equal(base.model(input_ids=ids)[0], plain)
        with base.using(half):
            assert not torch.equal(base.model(input_ids=ids)[0], plain)
    assert delta.digest == digest, "the delta itself is left alone"
    merged, whole = base.merged(half).model, base.merged(delta).model
    for name, _ in base.model.named_parameters():
        want = whole if name.rpartition(".")[0] in kept else base.model
        assert torch.equal(merged.get_parameter(name), want.get_parameter(name)), name


def test_a_reset_half_is_balanced_and_says_what_was_done(moved, tmp_path) -> None:
    base = Base(llama_of(4))
    delta = moved(base, Full())
    half = reset(delta, base, 0.5, round=7)
    gone = set(delta.parts[0].kind_of) - set(half.parts[0].kind_of)
    assert all((a, n) == (2, 1) and m in (1, 2) for a, m, n in counted(gone, 4))
    half.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d", base)
    assert again.provenance["edits"] == [
        {"edit": "reset", "fraction": 0.5, "rule": "category", "round": 7, "complement": False}
    ]
    assert not reset(delta, base, 1.0).parts
    assert reset(delta, base, 0.0).parts[0].kind_of == delta.parts[0].kind_of


def test_reset_takes_a_tied_pair_together_and_leaves_heads() -> None:
    base = toys()[1]
    delta = Delta.create(base, Full(), Head(classes=3))
    for stage in range(8):
        half = reset(delta, base, round=stage)
        assert ("embed" in half.part("full").kind_of) == bool(half.part("full").alias)
        assert [p.name for p in half.parts][-1] == "head"
    with pytest.raises(UsageError, match="0..1"):
        reset(delta, base, 1.5)
    with pytest.raises(UsageError, match="unknown rule"):
        reset(delta, base, rule="categry")
    assert copy.copy(delta.layout) == half.layout
