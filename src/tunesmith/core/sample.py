# SPDX-License-Identifier: Apache-2.0
"""Data that a method learns from before it trains, and what can be collected on it.

A `Sample` is a few batches with the functions that run the base on them. `inputs` streams the rows that enter each
site, `second_moments` sums their outer products, `gradients` streams the gradient of the loss with respect to each
weight. All act on the base as it stands, with whatever deltas are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.core.errors import UsageError
from tunesmith.core.trace import primary

if TYPE_CHECKING:
    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta
    from tunesmith.core.sites import Site


@dataclass(frozen=True)
class Sample:
    """Batches of training data as a method's `observe` sees them.

    Args:
        batches: gives the batches anew at each call, in one fixed order.
        run: `run(base, batch)`: one forward pass.
        loss: `loss(base, batch)`: the summed loss, a scalar.
        keep: `keep(batch)`: a boolean mask [B, T] of the positions that count (no padding), or None for all; with
            `supervised=True` those that carry a label.
        train: `train(base, methods, share)`: a delta of those methods trained for `share` of the run's steps.
        companions: the other methods of the delta being made, such as the head that the loss needs.
        seed: for whatever a method draws.
    """

    batches: Callable[[], Iterable[Any]]
    run: Callable[[Base, Any], Any]
    loss: Callable[[Base, Any], Tensor]
    keep: Callable[..., Tensor | None] = lambda batch, supervised=False: None
    train: Callable[[Base, list[Any], float], Delta] | None = None
    companions: tuple[Any, ...] = ()
    seed: int = 0

    def trained(self, base: Base, methods: list[Any], share: float) -> Delta:
        """A trial delta of `methods` (its first parts) and the companions.

        Raises UsageError where the sample cannot train one.
        """
        if self.train is None:
            raise UsageError("this method trains a trial delta first", hint="use ts.tune, or pass Sample(train=...)")
        return self.train(base, [*methods, *self.companions], share)

    def accompanied(self, base: Base) -> AbstractContextManager[Any]:
        """The base with fresh companions in use, so that `loss` can be computed."""
        from tunesmith.core.delta import Delta

        if not self.companions:
            return nullcontext(base)
        return base.using(Delta.create(base, *self.companions, name="companions", seed=self.seed))


def rows_of_input(site: Site, x: Tensor) -> Tensor:
    """The rows a site's weight multiplies, [n, in * kernel]: features, or unfolded patches of a convolution.

    Rows keep the order of the input's leading positions. Raises UsageError for embeddings and grouped convolutions.
    """
    if site.kind == "linear":
        return x.reshape(-1, x.shape[-1])
    m: Any = site.module
    if site.kind in ("conv1d", "conv2d") and m.groups == 1:
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        one = site.kind == "conv1d"
        if one:
            x = x.unsqueeze(-2)
        pad: Any = m.padding if m.padding_mode == "zeros" else 0
        if isinstance(pad, str):
            total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
            if pad == "same":
                x = F.pad(x, [n for t in reversed(total) for n in (t // 2, t - t // 2)])
            pad = 0
        wide = (lambda v, first: (first, *v) if isinstance(v, tuple) else (first, v)) if one else (lambda v, first: v)
        cols = F.unfold(
            x, wide(m.kernel_size, 1), dilation=wide(m.dilation, 1), padding=wide(pad, 0) if pad else 0,
            stride=wide(m.stride, 1),
        )  # fmt: skip  # [B, in * kernel, positions]
        return cols.transpose(1, 2).reshape(-1, cols.shape[1])
    raise UsageError(f"the inputs of a {site.kind} cannot be collected as rows", where=site.path)


@contextmanager
def _watching(base: Base, sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call `see(site, input)` whenever one of the sites runs."""

    def hook_for(site: Site) -> Any:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if x is not None:
                see(site, x)

        return hook

    handles = [base.modules[s.path].register_forward_pre_hook(hook_for(s), with_kwargs=True) for s in sites]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@torch.no_grad()
def inputs(base: Base, sites: list[Site], sample: Sample, *, supervised: bool = False) -> Iterator[dict[str, Tensor]]:
    """For every batch, the fp32 input rows [n, in * kernel] of each site that ran, by path, without padding.

    With `supervised` only positions with a label. A site whose input has other leading dimensions than the mask (a
    pooled state, an image) keeps all its rows. The base runs in eval mode.
    """
    for batch in sample.batches():
        seen: dict[str, list[Tensor]] = {}
        mask = sample.keep(batch, supervised=supervised)

        def see(site: Site, x: Tensor, mask: Tensor | None = mask, seen: dict[str, list[Tensor]] = seen) -> None:
            if mask is not None and site.kind == "linear" and x.shape[:-1] == mask.shape:
                rows = x[mask.to(x.device)]
            else:
                rows = rows_of_input(site, x)
            seen.setdefault(site.path, []).append(rows.float())

        with base.evaluating(), _watching(base, sites, see):
            sample.run(base, batch)
        yield {path: torch.cat(rows) for path, rows in seen.items()}


@torch.no_grad()
def second_moments(
    base: Base, sites: list[Site], sample: Sample, *, scaled: bool = True, supervised: bool = False
) -> dict[str, Tensor]:
    """mean over batches of X^T X, [in, in] fp32 for each site that ran; X is first divided by max |X| if `scaled`."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    for found in inputs(base, sites, sample, supervised=supervised):
        for path, X in found.items():
            if not len(X):
                continue
            X = X / X.abs().max().clamp_min(1e-12) if scaled else X
            total[path] = total[path] + X.T @ X if path in total else X.T @ X
            count[path] = count.get(path, 0) + 1
    return {path: C / count[path] for path, C in total.items()}


def gradients(base: Base, sites: list[Site], sample: Sample) -> Iterator[dict[str, Tensor]]:
    """For every batch, the gradient of its summed loss with respect to each site's canonical weight, fp32, by path.

    Give batches of one example for per-example gradients. The weights themselves never take part in training: their
    flags and gradients are put back.
    """
    weights = {s.path: s.module._parameters["weight"] for s in sites}
    turned = {s.path: s.transposed for s in sites}
    for batch in sample.batches():
        with base.evaluating(), base.frozen(), sample.accompanied(base):
            for w in weights.values():
                w.requires_grad_(True)  # type: ignore[union-attr]
            loss = sample.loss(base, batch)
            got = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)  # type: ignore[arg-type]
        yield {
            p: (g.T if turned[p] else g).float()
            for (p, _), g in zip(weights.items(), got, strict=True)
            if g is not None
        }


def probe_sample(base: Base, steps: int = 3) -> Sample:
    """A sample made of the base's own probe, with a random linear loss: enough to set a method up for the laws."""
    from tunesmith.core.delta import Delta

    probe = base.probe()
    if probe is None:
        raise UsageError("no probe input is known", where=base.name, hint="Base(model, example=inputs)")

    def run(b: Base, batch: Any) -> Any:
        return b.model(**batch) if isinstance(batch, Mapping) else b.model(*batch)

    def loss(b: Base, batch: Any) -> Tensor:
        out = primary(run(b, batch))
        assert out is not None
        g = torch.Generator().manual_seed(5)
        return (out * torch.randn(out.shape, generator=g).to(out)).sum() + 0.1 * out.square().sum()

    def train(b: Base, methods: list[Any], share: float) -> Delta:
        delta = Delta.create(b, *methods, name="trial")
        trained = [t for _, t in delta.items() if t.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=1e-2)
        for _ in range(steps):
            with b.frozen(), b.using(delta):
                loss(b, probe).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return delta

    return Sample(lambda: [probe], run, loss, train=train)
