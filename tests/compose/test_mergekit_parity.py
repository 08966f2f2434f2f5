# SPDX-License-Identifier: Apache-2.0
"""Combiners against mergekit's own merge functions, tensor by tensor, where mergekit can be imported.

mergekit (0.1.5 here) is no test dependency: it asks for datasets, sentencepiece, protobuf and immutables beside what is
installed. `pip install --no-deps mergekit immutables` into an environment that has this project's `dev` extra is enough
for these tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tunesmith as ts
from tunesmith.compose import sparsify
from tunesmith.core.algebra import Dense
from tunesmith.core.combine import COMBINERS, Now, Place

try:
    from mergekit import sparsify as theirs
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.slerp import slerp as their_slerp

    problem = ""
except Exception as e:  # any part of it that does not import
    problem = f"mergekit cannot be imported ({type(e).__name__}: {e})"

pytestmark = pytest.mark.skipif(bool(problem), reason=problem or "mergekit is here")
SHAPES = [(12, 20), (7, 3, 3), (30,)]
WEIGHTS = [1.0, 0.5, -0.3]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape: tuple[int, ...], n: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and n changes, fp64: the two sides then differ by the formula alone."""
    g = torch.Generator().manual_seed(seed)
    base, *changes = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n + 1))
    return base, [0.3 * c for c in changes]


def ours(text: str, base: Tensor, changes: list[Tensor], weights: list[float]) -> Tensor:
    """The base plus the combined change."""
    at = Place("layer", "weight", tuple(base.shape), "linear", base=lambda: base)
    how = COMBINERS.parse(text)
    found = how.combine(at, [Dense(c) for c in changes], weights, Now(names=("a", "b", "c")))
    return base if found is None else base + found.dense()


def mergekit(name: str, base: Tensor | None, changes: list[Tensor], weights: list[float], **options: Any) -> Tensor:
    """mergekit's merge of the models; `weight` and `density` go to each."""
    whole = changes if base is None else [base, *(base + c for c in changes)]
    group = TensorGroup.from_tensors(whole, base_index=None if base is None else 0)
    method = registry.get(name)
    ids = [e.id for e in group.non_base]
    known = {p.name for p in method.spec.parameters}
    given: dict[str, Any] = {
        k: dict.fromkeys(ids, v) if k in ("density", "gamma", "epsilon") else v for k, v in options.items()
    }
    if "weight" in known:
        given["weight"] = dict(zip(ids, weights, strict=True))
    return method([group], parameters=given)[0]


def near(a: Tensor, b: Tensor, gap: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= gap * max(1.0, float(b.abs().max()))


@shapes
def test_linear(shape: tuple[int, ...]) -> None:
    """Equal weights are the uniform soup; the whole models are what mergekit averages."""
    base, changes = tensors(shape)
    for weights in ([1.0, 1.0, 1.0], [0.2, 0.5, 0.9]):
        near(ours("linear", base, changes, weights), mergekit("linear", None, [base + c for c in changes], weights))


@shapes
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(shape: tuple[int, ...], normalize: bool) -> None:
    base, changes = tensors(shape)
    text = f"task-arithmetic:lam=0.7,normalize={str(normalize).lower()}"
    near(
        ours(text, base, changes, WEIGHTS),
        mergekit("task_arithmetic", base, changes, WEIGHTS, **{"lambda": 0.7, "normalize": normalize}),
    )


@shapes
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_ties(shape: tuple[int, ...], density: float, normalize: bool) -> None:
    base, changes = tensors(shape)
    for weights in ([1.0, 1.0, 1.0], [1.0, 0.5, 0.3]):
        text = f"ties:density={density},normalize={str(normalize).lower()},lam=1.3"
        want = mergekit("ties", base, changes, weights, density=density, normalize=normalize, **{"lambda": 1.3})
        near(ours(text, base, changes, weights), want)


@shapes
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs-ties"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_breadcrumbs_per_tensor(shape: tuple[int, ...], name: str, rescale: str) -> None:
    """Also where int(gamma n) is 0, which older versions zeroed the tensor for, and where both shares exceed 1."""
    base, changes = tensors(shape)
    for density, top in ((0.4, 0.1), (0.5, 0.001), (0.9, 0.3)):
        text = f"{name}:density={density},drop_top={top},per=tensor,rescale={rescale},lam=0.8"
        want = mergekit(
            name.replace("-", "_"), base, changes, WEIGHTS, density=density, gamma=top, rescale=rescale == "l1", **{"lambda": 0.8}
        )  # fmt: skip
        near(ours(text, base, changes, WEIGHTS), want)


@shapes
@pytest.mark.parametrize("name", ["dare", "dare-ties"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_dare_with_the_same_masks(
    shape: tuple[int, ...], name: str, rescale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws are handed over: mergekit's are from a global generator."""
    base, changes = tensors(shape)
    at, now = Place("layer", "weight", shape, "linear"), Now(names=("a", "b", "c"))
    drawn = iter([(torch.rand(shape, generator=now.generator(at, i)) < 0.4).float() for i in range(3)])
    monkeypatch.setattr(theirs.torch, "bernoulli", lambda _: next(drawn))
    name_there = {"dare": "dare_linear", "dare-ties": "dare_ties"}[name]
    want = mergekit(name_there, base, changes, WEIGHTS, density=0.4, rescale=rescale == "l1")
    # it sparsifies in fp32
    near(ours(f"{name}:density=0.4,rescale={rescale}", base, changes, WEIGHTS), want, 1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (30,)], ids=str)
@pytest.mark.parametrize("name", ["della", "della-linear"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_della_with_the_same_draws(
    shape: tuple[int, ...], name: str, rescale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix or a vector; for kernels it ranks along another axis."""
    base, changes = tensors(shape)
    at, now = Place("layer", "weight", shape, "linear"), Now(names=("a", "b", "c"))
    flat = shape if len(shape) == 2 else (1, *shape)
    drawn = iter([torch.rand(flat, generator=now.generator(at, i)) for i in range(3)])
    monkeypatch.setattr(theirs.torch, "bernoulli", lambda p: (next(drawn) < p).float())
    want = mergekit(
        name.replace("-", "_"),
        base,
        changes,
        WEIGHTS,
        density=0.5,
        epsilon=0.2,
        rescale=rescale == "l1",
        normalize=False,
    )
    near(ours(f"{name}:density=0.5,epsilon=0.2,rescale={rescale},normalize=false", base, changes, WEIGHTS), want, 1e-6)


@shapes
def test_magnitude_keeps_at_least_one(shape: tuple[int, ...]) -> None:
    _, (D, *_) = tensors(shape)
    near(sparsify.magnitude(D, 1e-6), theirs.magnitude(D, 1e-6))


@shapes
@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp(shape: tuple[int, ...], t: float) -> None:
    """On whole weights; both nearly parallel and far apart."""
    base, (a, b, _) = tensors(shape)
    for near_by in (1.0, 1e-3):
        want = their_slerp(torch.tensor([t]), (base + near_by * a)[None], (base + near_by * b)[None])[0]
        near(ours("slerp", base, [near_by * a, near_by * b], [1 - t, t]), want, 1e-7)  # its t is fp32


@shapes
@pytest.mark.parametrize("options", ["flatten=true", "flatten=false", "flatten=false,row_wise=true"])
def test_nuslerp(shape: tuple[int, ...], options: str) -> None:
    base, changes = tensors(shape)
    given = {"nuslerp_flatten": "flatten=true" in options, "nuslerp_row_wise": "row_wise=true" in options}
    want = mergekit("nuslerp", base, changes[:2], [0.4, 0.9], **given)
    near(ours(f"nuslerp:{options}", base, changes[:2], [0.4, 0.9]), want, 1e-7)


@shapes
def test_karcher(shape: tuple[int, ...]) -> None:
    """Of equal weights, which is all it has."""
    base, changes = tensors(shape)
    want = mergekit("karcher", None, [base + c for c in changes], [1.0] * 3)
    near(ours("karcher", base, changes, [1.0] * 3), want, 1e-9)


@shapes
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(shape: tuple[int, ...], filter_wise: bool) -> None:
    """Kernels by row differ: it takes cosines along the last axis alone."""
    if filter_wise and len(shape) > 2:
        return
    base, changes = tensors(shape)
    changes = [c + changes[0] for c in changes]  # of one direction, as fine-tuned models are
    text = f"model-stock:filter_wise={str(filter_wise).lower()}"
    near(
        ours(text, base, changes, [1.0] * 3), mergekit("model_stock", base, changes, [1.0] * 3, filter_wise=filter_wise)
    )


def test_lines_is_a_gradient_of_weights_over_layers() -> None:
    """mergekit's `weight: [alpha, alpha + beta]` is interpolated over layers: the same scales as `lines`."""
    evaluate_setting = pytest.importorskip("mergekit.config", exc_type=ImportError).evaluate_setting
    alpha, beta, L = 0.1, 0.9, 5
    for depth in range(L):
        want = evaluate_setting("layer", [alpha, alpha + beta], depth / (L - 1), validate=float)
        at = Place("layer", "weight", (3, 4), "linear", depth, L)
        assert ts.compose.lines.scale_at(at, alpha, beta) == pytest.approx(want, abs=1e-12)
