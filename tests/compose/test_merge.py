# SPDX-License-Identifier: Apache-2.0
"""Changes by place, the delta made of them, and the verbs; linear combinations of cards 030 (soups) and 116."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from compose_cases import FORMS, dense, form, gap, moved

import tunesmith as ts
from tunesmith.compose import DeltaChanges, compress, merge, negate, scale, subtract
from tunesmith.core import method as methods
from tunesmith.core.algebra import LowRank, Sparse, Sum
from tunesmith.core.assemble import coalesced, joined
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.toys import toys

LM, TIED, VISION, SEQUENCE = toys()
SITE = "layers.0.gate"


def folded_change(base: Base, *deltas: Delta) -> dict[str, torch.Tensor]:
    """What merging into the weights changes, tensor by tensor: the oracle of every additive form."""
    before, after = base.model.state_dict(), base.merged(*deltas).model.state_dict()
    return {k: after[k] - v for k, v in before.items() if v.is_floating_point()}


# Changes


@pytest.mark.parametrize("which", FORMS)
def test_changes_are_what_folding_makes(which: str) -> None:
    """Each source's own, biases and norms and functions of the weight included."""
    for delta in form(LM, which):
        found = dense(LM, delta)
        for key, want in folded_change(LM, delta).items():
            got = found[key][0].float() if key in found else torch.zeros_like(want)
            assert torch.allclose(got, want, atol=3e-7), (delta.name, key)


@pytest.mark.parametrize("info", [i for i in methods.methods() if hasattr(i.cls, "differences")], ids=lambda i: i.name)
def test_differences_are_what_the_rewrite_adds(info: methods.MethodInfo) -> None:
    for base in toys():
        try:
            delta = moved(base, info.name, methods.config(info.cls.toy()))
        except ts.TunesmithError:
            continue  # the method has no target on this base
        part = delta.parts[0]
        for path, kind in part.kind_of.items():
            site, t = base.sites.of(path, kind), part.tensors(path)
            old = site.params()
            new = part.method.rewrite(site, t, old)
            said = part.method.differences(site, t)
            for name in [n for n, v in old.items() if v.is_floating_point()]:
                want = new[name] - old[name] if name in said else torch.zeros(())
                got = said[name].dense() if name in said else new[name] - old[name]
                assert torch.allclose(got.detach(), want.detach(), atol=1e-6), (path, name)
        if methods.observes(part.method):
            break  # its start takes a training run


def test_forms_are_kept_and_strengths_count() -> None:
    low, thin = moved(LM, "lora", {"rank": 2, "alpha": 4.0}), moved(LM, "sparse", {"rank": 1, "select": "random"})
    changes = DeltaChanges(LM, [low.at(0.5), thin])
    place = next(p for p in changes.places() if p.path == SITE)
    one, two = changes.at(place)
    assert isinstance(one, LowRank) and one.scale == 1.0 and isinstance(two, Sparse)
    assert (place.kind, place.depth, place.of, place.shape) == ("linear", 0, 2, (32, 16))
    assert torch.equal(place.base(), LM.modules[SITE].weight)
    both = Delta.create(LM, ts.LoRA(rank=1), methods.build("sparse", {"count": 3, "select": "random"}))
    found = DeltaChanges(LM, [both]).at(place)[0]
    assert isinstance(found, Sum) and [type(t).__name__ for t in found.terms] == ["LowRank", "Sparse"]


def test_a_tied_weight_is_one_place_unless_one_side_changes_alone() -> None:
    def of(tied: str) -> Delta:
        delta = Delta.create(TIED, ts.LoRA(rank=2, targets="embed" if tied == "both" else "head"), tied=tied, seed=1)
        with torch.no_grad():
            for _, t in delta.items():
                t.add_(0.1)
        return delta

    both, one = of("both"), of("untie")
    (place,) = DeltaChanges(TIED, [both, both.at(0.5)]).places()
    assert place.path == "embed" and place.tied == ("head",) and place.depth is None
    made = merge(TIED, [both, both.at(0.5)], "task-arithmetic")
    assert made.parts[0].alias == {"head": "embed"}
    model = TIED.merged(made).model
    assert model.head.weight is model.embed.weight
    assert [p.path for p in DeltaChanges(TIED, [both, one]).places()] == ["embed", "head"]
    mixed = merge(TIED, [both, one], "task-arithmetic")
    model = TIED.merged(mixed).model
    want = TIED.merged(both, one).model
    for part in ("embed", "head"):
        assert torch.allclose(getattr(model, part).weight, getattr(want, part).weight, atol=1e-6)


def test_parts_that_cannot_merge_are_named() -> None:
    prompt = Delta.create(LM, methods.build("prompt-tuning", {"tokens": 2}), name="soft")
    with pytest.raises(ts.TunesmithError, match="prompt-tuning cannot be merged") as found:
        DeltaChanges(LM, [prompt])
    assert "soft" in str(found.value)
    with pytest.raises(ts.TunesmithError, match="not for"):
        DeltaChanges(LM, [moved(SEQUENCE, "lora")])


# The delta that is made


def test_a_merge_of_loras_is_a_lora_of_ranks_side_by_side() -> None:
    """Equal to the sum of the densified changes, as PEFT's `cat` with weights; not the average of factors."""
    a, b = moved(LM, "lora", {"rank": 2, "alpha": 8.0}, 0), moved(LM, "lora", {"rank": 3}, 1)
    made = merge(LM, [a, b], "linear", [1.0, 3.0])
    (part,) = made.parts
    assert part.info.name == "lora" and part.method.rank == 5 and not part.method.rank_pattern
    rows = dense(LM, a, b)
    for key, (got,) in dense(LM, made).items():
        assert torch.allclose(got, 0.25 * rows[key][0] + 0.75 * rows[key][1], atol=1e-6)
    wrong = (0.25 * a.parts[0].parameter(SITE, "B") @ (0.25 * a.parts[0].parameter(SITE, "A"))).detach()
    assert not torch.allclose(wrong, dense(LM, made)[f"{SITE}.weight"][0].float(), atol=1e-3)


def test_ranks_that_differ_become_a_pattern_and_load_again(tmp_path: Path) -> None:
    a = moved(LM, "lora", {"rank": 2, "rank_pattern": {"gate": 4, "layers.1.attention.q": 1}})
    b = moved(LM, "lora", {"rank": 1, "targets": "gate,up"}, 1)
    made = merge(LM, [a, b], "task-arithmetic")
    part = made.parts[0]
    assert {p: len(part.parameter(p, "A")) for p in ("layers.0.gate", "layers.0.up", "layers.1.attention.q", "layers.1.attention.v")} == {
        "layers.0.gate": 5, "layers.0.up": 3, "layers.1.attention.q": 1, "layers.1.attention.v": 2,
    }  # fmt: skip
    made.save(tmp_path / "m")
    assert Delta.load(tmp_path / "m", LM).digest == made.digest
    text = json.loads((tmp_path / "m" / "delta.json").read_text())["provenance"]["composed"]
    assert text["combiner"] == "task-arithmetic" and [s["weight"] for s in text["sources"]] == [1.0, 1.0]


def test_factors_larger_than_the_matrix_are_held_dense_and_both_forms_side_by_side() -> None:
    wide = [moved(LM, "lora", {"rank": 8, "targets": "layers.0.attention.q"}, s) for s in range(3)]
    assert [p.info.name for p in merge(LM, wide).parts] == ["full"]
    low, thin = moved(LM, "lora", {"rank": 1, "targets": SITE}), moved(LM, "sparse", {"count": 4, "targets": SITE})
    made = merge(LM, [low, thin], "task-arithmetic")
    assert [p.info.name for p in made.parts] == ["lora", "sparse"]
    want = dense(LM, low)[f"{SITE}.weight"][0] + dense(LM, thin)[f"{SITE}.weight"][0]
    assert torch.allclose(dense(LM, made)[f"{SITE}.weight"][0], want)


def test_sums_of_factors_and_entries() -> None:
    terms = [LowRank(torch.randn(5, 2), torch.randn(2, 4), -0.5), LowRank(torch.randn(5, 1), torch.randn(1, 4), 2.0)]
    both = joined(terms)
    assert both is not None
    B, A = both
    assert torch.allclose(B @ A, Sum(tuple(terms)).dense(), atol=1e-6)
    again = joined([*terms, terms[0].scaled(3.0)])
    assert again is not None and len(again[1]) == 3  # one A, its B added up
    assert joined([terms[0], terms[0].scaled(-1.0)]) is None
    i, full = torch.tensor, (3, 4)
    found = coalesced([Sparse(i([1, 5]), i([1.0, 2.0]), full), Sparse(i([5, 7]), i([-2.0, 3.0]), full)])
    assert found is not None
    assert found[0].tolist() == [1, 7] and found[1].tolist() == [1.0, 3.0]
    assert coalesced([Sparse(i([1]), i([1.0]), full), Sparse(i([1]), i([-1.0]), full)]) is None


def test_bias_alone_and_norms_are_held_by_registered_methods() -> None:
    bias, norms = moved(LM, "bitfit"), moved(LM, "norm-tuning", {}, 1)
    made = merge(LM, [bias, norms], "task-arithmetic")
    assert {p.info.name for p in made.parts} == {"bitfit", "full"}
    want = folded_change(LM, bias, norms)
    assert all(torch.allclose(w, folded_change(LM, made)[k], atol=1e-6) for k, w in want.items())


def test_on_a_packed_base_and_out_to_peft(tmp_path: Path) -> None:
    """A base of 4-bit layers takes merges as any other; a merge of LoRAs is an adapter that PEFT can read."""
    packed = ts.derive.quantise(toys()[0], bits=4)
    low, plain = moved(packed, "lora", {"rank": 2}), moved(packed, "full", {"targets": SITE}, 1)
    rows, made = dense(packed, low, plain), merge(packed, [low, plain], "ties:density=0.5")
    with packed.using(made):
        out = packed.probe_outputs()
    assert torch.allclose(packed.merged(made).probe_outputs(), out, atol=1e-4)
    assert set(dense(packed, made)) == set(rows)
    made = merge(LM, [moved(LM, "lora", {"rank": 2}), moved(LM, "lora", {"rank": 1}, 1)], weights=[1, 2])
    export = importlib.import_module("tunesmith.export.peft")
    export.write_peft(made, LM, tmp_path / "peft")
    again = export.read_peft(tmp_path / "peft", LM)
    assert gap(dense(LM, again), dense(LM, made)) < 1e-6


def test_half_precision_bases_are_combined_in_fp32() -> None:
    base = Base(copy.deepcopy(LM.model).to(torch.bfloat16), example=LM.probe())
    a, b = moved(base, "dora", {"rank": 2}), moved(base, "full", {}, 1)
    for method in ("linear", "ties", "slerp", "pcb"):
        made = merge(base, [a, b], method)
        assert {t.dtype for _, t in made.items() if t.is_floating_point()} == {torch.float32}
        assert bool(torch.isfinite(base.merged(made).probe_outputs()).all())


# Linear combinations: uniform soup, task arithmetic


def test_the_soup_of_copies_is_the_model_and_the_soup_is_the_mean_of_state_dicts() -> None:
    one = moved(LM, "full")
    soup, model = LM.merged(merge(LM, [one] * 3)).model.state_dict(), LM.merged(one).model.state_dict()
    for k, want in model.items():  # the thirds are rounded, so it is one ulp of the change and one of the sum
        large = want.abs() + LM.model.state_dict()[k].abs()  # no change is larger
        ulp = torch.nextafter(large, torch.tensor(torch.inf)) - large
        assert bool(((soup[k] - want).abs() <= 2 * ulp).all())
    deltas = [moved(VISION, "full", {}, s) for s in range(3)]
    soup = VISION.merged(merge(VISION, deltas)).model.state_dict()
    models = [VISION.merged(d).model.state_dict() for d in deltas]
    for k, v in soup.items():
        if v.is_floating_point():
            assert torch.allclose(v, torch.stack([m[k] for m in models]).mean(0), atol=1e-6)
        else:
            assert torch.equal(v, VISION.model.state_dict()[k])  # integer counters are nobody's to average


def test_a_merge_of_loras_equals_pefts_cat() -> None:
    """`add_weighted_adapter(combination_type="cat")` of the same factors, merged."""
    peft = pytest.importorskip("peft")
    a, b = (moved(LM, "lora", {"rank": r, "alpha": 8.0, "targets": "gate"}, s) for s, r in enumerate((2, 3)))
    made = dense(LM, merge(LM, [a, b], "task-arithmetic", [0.7, 0.2]))
    model = copy.deepcopy(LM.model)
    for name, delta in (("a", a), ("b", b)):
        config = peft.LoraConfig(r=delta.parts[0].method.rank, lora_alpha=8, target_modules=["gate"])
        model = peft.get_peft_model(model, config, name) if name == "a" else (model.add_adapter(name, config) or model)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 2
    for n, m in layers.items():
        for name, delta in (("a", a), ("b", b)):
            t = delta.parts[0].tensors(n.removeprefix("base_model.model."))
            m.lora_A[name].weight.data, m.lora_B[name].weight.data = t["A"].detach(), t["B"].detach()
    model.add_weighted_adapter(["a", "b"], [0.7, 0.2], "both", combination_type="cat")
    for n, m in layers.items():
        want = m.get_delta_weight("both").detach().double()
        assert torch.allclose(made[n.removeprefix("base_model.model.") + ".weight"][0], want, atol=1e-6)


def test_weights_that_cannot_be() -> None:
    a, b = form(LM, "dense")
    for weights, what in (
        ([1.0], "2 deltas and 1 weights"),
        ([1.0, float("nan")], "not finite"),
        ([1.0, -1.0], "add up to 0"),
    ):
        with pytest.raises(ts.TunesmithError, match=what):
            merge(LM, [a, b], "linear", weights)
    with pytest.raises(ts.TunesmithError, match="must be a number"):
        merge(LM, [a, b], "linear", ["much", 1])  # type: ignore[list-item]
    with pytest.raises(ts.TunesmithError, match="nothing is left"):
        merge(LM, [a, b], weights=[0, 0])
    with pytest.raises(ts.TunesmithError, match="takes 2 sources"):
        merge(LM, [a, b, b], "slerp")
    with pytest.raises(ts.TunesmithError, match="list"):
        merge(LM, a)  # type: ignore[arg-type]
    with pytest.raises(ts.TunesmithError, match="did you mean 'ties'"):
        merge(LM, [a, b], "tis")
    with pytest.raises(ts.TunesmithError, match="no combiner"):
        merge(LM, [a, b], ts.compose.Ties)  # type: ignore[arg-type]


def test_scale_negate_subtract() -> None:
    a, b = moved(LM, "lora", {"rank": 2}), moved(LM, "dora", {"rank": 2}, 1)
    rows = dense(LM, a, b)
    for made, want in (
        (scale(LM, a, 0.25), lambda x, y: 0.25 * x), (negate(LM, a), lambda x, y: -x), (subtract(LM, a, b), lambda x, y: x - y),
    ):  # fmt: skip
        got = dense(LM, made)
        assert all(torch.allclose(got[k][0], want(x, y), atol=1e-6) for k, (x, y) in rows.items())
    assert scale(LM, a, 0.5).parts[0].info.name == "lora" and negate(LM, a).parts[0].method.rank == 2
    assert ts.subtract is subtract and ts.merge is merge and ts.compose.scale is ts.scale
    with pytest.raises(ts.TunesmithError, match="nothing is left"):
        subtract(LM, a, a.at(1))


# Parts on no weight


def test_scales_are_combined_tensor_by_tensor() -> None:
    """IA3: a weight of one half each is the mean of the scales; without normalising their moves from one add up."""
    a, b = moved(LM, "ia3", {}, 0), moved(LM, "ia3", {}, 1)
    for made, c in ((merge(LM, [a, b]), 0.5), (merge(LM, [a, b], "task-arithmetic"), 1.0)):
        (part,) = made.parts
        assert part.info.name == "ia3"
        for path, name, t in part.items():
            x, y = a.parts[0].parameter(path, name), b.parts[0].parameter(path, name)
            assert torch.allclose(t, 1 + c * (x - 1) + c * (y - 1), atol=1e-6)
    alone = merge(LM, [a])
    assert all(torch.equal(t, a.parts[0].parameter(p, n)) for p, n, t in alone.parts[0].items())
    folded = merge(LM, [a, b], "ties")  # not linear: their effect on the weights is what is combined
    assert "ia3" not in {p.info.name for p in folded.parts}


def test_prompts_average_and_do_not_add() -> None:
    def soft(seed: int, length: int = 3) -> Delta:
        return Delta.create(LM, methods.build("prompt-tuning", {"tokens": length}), name=f"soft{length}", seed=seed)

    made = merge(LM, [soft(0), soft(1)])
    values = [d.parts[0].items() for d in (made, soft(0), soft(1))]
    for (_, _, t), (_, _, x), (_, _, y) in zip(*values, strict=True):
        assert torch.allclose(t, (x + y) / 2)
    with pytest.raises(ts.TunesmithError, match="add up to 1"):
        merge(LM, [soft(0), soft(1)], "task-arithmetic")
    with pytest.raises(ts.TunesmithError, match="do not have the same one") as found:
        merge(LM, [soft(0), soft(1, 4)])
    assert "soft4: prompt-tuning(tokens=4)" in str(found.value)
    with pytest.raises(ts.TunesmithError, match="do not have the same one"):
        merge(LM, [soft(0), moved(LM, "lora")])


def test_layout_and_lineage() -> None:
    a, b = moved(LM, "lora"), moved(LM, "lora", {}, 1)
    a.layout, b.layout = {"kind": "chat", "system": "x"}, {"kind": "chat", "system": "y"}
    a.provenance["lineage"] = [{"name": b.name, "digest": b.digest}, {"name": "far", "digest": "f" * 64}]
    made = merge(LM, [a, b])
    assert made.layout == {"kind": "chat"} and made.provenance["composed"]["layout_dropped"] == ["system"]
    assert [p["name"] for p in made.provenance["lineage"]] == ["far"]
    of_w = moved(LM, "dora")
    of_w.provenance["lineage"] = [{"name": "far", "digest": "f" * 64}]
    with pytest.raises(ts.TunesmithError, match="function of a weight"):
        merge(LM, [of_w])


# Compression


def test_compress_gives_the_nearest_and_its_error() -> None:
    delta = moved(LM, "full")
    small = compress(LM, delta, rank=3)
    change = dense(LM, delta)[f"{SITE}.weight"][0]
    S = torch.linalg.svdvals(change)
    assert small.errors[SITE] == pytest.approx(float((S[3:].square().sum() / S.square().sum()).sqrt()), rel=1e-4)
    assert small.delta.parts[0].info.name == "lora" and "layers.0.gate.bias" in small.lost and small.ratio < 1
    exact = compress(LM, moved(LM, "lora", {"rank": 2}), rank=2)
    assert exact.error < 1e-5
    thin = compress(LM, delta, "ties:density=0.1")
    rest = change - dense(LM, thin.delta)[f"{SITE}.weight"][0]
    assert thin.errors[f"{SITE}.weight"] == pytest.approx(float(rest.norm() / change.norm()), rel=1e-5)
    assert 0.3 < thin.error < 1 and thin.ratio < 0.35
