# SPDX-License-Identifier: Apache-2.0
"""MeteoRA: its gates and products against loops and PEFT, on one layer where everything can be written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.gates import watched
from tunesmith.deltas import MeteoRA

peft = pytest.importorskip("peft")


def layer(n_in: int = 6, out: int = 5) -> tuple[Base, Tensor]:
    x = torch.randn(7, n_in)
    x[:, 0] = 1.0  # a feature that is always there, so that a gate without bias can be set
    return Base(nn.Sequential(nn.Linear(n_in, out)), example=(x,)), x


def filled(base: Base, **options: object) -> tuple[Delta, dict[str, Tensor]]:
    delta = Delta.create(base, MeteoRA(**{"experts": 3, "rank": 2, "fill": "random", "targets": "0", **options}))
    return delta, delta.parts[0].tensors("0")


def by_loops(base: Base, t: dict[str, Tensor], x: Tensor, k: int, T: float) -> Tensor:
    """The equation for one token after the other."""
    W, b = base.model[0].weight, base.model[0].bias
    rows = []
    for token in x:
        g = t["G"] @ token
        chosen = sorted(range(len(g)), key=lambda i: -float(g[i]))[:k]
        total = sum(float(torch.exp(g[i] / T)) for i in chosen)
        y = W @ token + b
        for i in chosen:
            mine = t["of"] == i
            y = y + float(torch.exp(g[i] / T)) / total * (t["B"][:, mine] @ (t["A"][mine] @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("k", "T"), [(1, 1.0), (2, 1.0), (2, 15.0), (3, 0.5)])
def test_it_is_the_equation_token_by_token_with_unequal_ranks(k: int, T: float) -> None:
    base, x = layer()
    delta, t = filled(base, top_k=k, temperature=T, start="normal")
    delta.parts[0].put("0", "of", torch.tensor([0, 1, 1, 1, 2, 2]), trainable=False)
    t = delta.parts[0].tensors("0")
    with torch.no_grad(), base.using(delta), watched() as seen:
        got = base.model(x)
    with torch.no_grad():
        torch.testing.assert_close(got, by_loops(base, t, x, k, T), atol=1e-5, rtol=0)
        w = delta.parts[0].method.weights(seen["0"])
    torch.testing.assert_close(w.sum(-1), torch.ones(7))
    assert ((w > 0).sum(-1) == k).all()
    kinds = {tuple(r.nonzero().flatten().tolist()) for r in w}
    assert len(kinds) > 1 or k == 3, "tokens choose for themselves"


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_one_hot_gate_is_pefts_adapter(chosen: int) -> None:
    base, x = layer()
    delta, t = filled(base, top_k=1)
    with torch.no_grad():
        t["G"].zero_()
        t["G"][chosen, 0] = 1e6
    configs = [peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False) for _ in range(3)]
    twin = peft.get_peft_model(copy.deepcopy(base.model), configs[0], adapter_name="a0")
    for i in (1, 2):
        twin.add_adapter(f"a{i}", configs[i])
    with torch.no_grad():
        for i in range(3):
            module = twin.base_model.model[0]
            module.lora_A[f"a{i}"].weight.copy_(t["A"][t["of"] == i])
            module.lora_B[f"a{i}"].weight.copy_(t["B"][:, t["of"] == i])
        twin.set_adapter(f"a{chosen}")
        want = twin(x)
        with base.using(delta):
            torch.testing.assert_close(base.model(x), want, atol=1e-5, rtol=0)
        assert (want - base.model(x)).abs().max() > 0.1


def test_all_of_them_at_a_boundless_temperature_are_their_mean() -> None:
    base, x = layer()
    delta, t = filled(base, top_k=3, temperature=1e9, start="normal")
    with torch.no_grad(), base.using(delta):
        want = nn.functional.linear(x, base.model[0].weight + t["B"] @ t["A"] / 3, base.model[0].bias)
        torch.testing.assert_close(base.model(x), want, atol=1e-5, rtol=0)


def test_a_token_is_routed_whatever_stands_beside_it(llama, ids) -> None:
    base = Base(llama)
    delta = Delta.create(base, MeteoRA(experts=4, rank=2, fill="random", start="normal"))
    with torch.no_grad(), base.using(delta):
        together = llama(input_ids=ids)[0]
        for i in range(len(ids)):
            torch.testing.assert_close(llama(input_ids=ids[i : i + 1])[0][0], together[i], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(llama(input_ids=ids[i : i + 1, :5])[0][0], together[i, :5], atol=1e-4, rtol=1e-5)


def test_gates_alone_train_and_are_n_rows_a_layer(llama, ids) -> None:
    base = Base(llama)
    delta = Delta.create(base, MeteoRA(experts=5, rank=2))
    sites = base.sites.select("all-linear", ("linear",))
    assert delta.trainable_parameters == sum(5 * s.shape[1] for s in sites) and len(sites) == 14
    assert all(key.endswith("/G") == t.requires_grad for key, t in delta.items())
    with torch.no_grad():
        plain = llama(input_ids=ids)[0]
        with base.using(delta):
            assert torch.equal(llama(input_ids=ids)[0], plain), "nothing is there to route between yet"


def test_first_gates_and_what_is_refused() -> None:
    base = Base(nn.Sequential(nn.Linear(400, 3)), example=(torch.randn(2, 400),))
    std = {s: filled(base, start=s)[1]["G"].std() for s in ("scaled", "normal")}
    assert 0.045 < std["scaled"] < 0.055 and 0.9 < std["normal"] < 1.1
    with pytest.raises(UsageError, match="4 of 3 deltas cannot act"):
        filled(base, top_k=4)
    with pytest.raises(UsageError, match="gates depend on the input"):
        base.merged(filled(base)[0])
