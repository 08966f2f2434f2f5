# SPDX-License-Identifier: Apache-2.0
"""Data that a method learns from before it trains, and what can be collected on it.

A `Sample` is a few batches with the functions that run the base on them. `look` shows the rows that enter each site while
one batch runs, `inputs` streams them batch by batch, `second_moments` sums their outer products, `gradients` streams the
gradient of the loss with respect to each weight. All act on the base as it stands, with whatever deltas are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
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
        read: `read(base, source)`: a sample of other data (a path), for methods that measure on more than the task.
        context: what was read so, `{source: {"digest", "rows"}}`, filled by `read` and kept in the delta's provenance.
    """

    batches: Callable[[], Iterable[Any]]
    run: Callable[[Base, Any], Any]
    loss: Callable[[Base, Any], Tensor]
    keep: Callable[..., Tensor | None] = lambda batch, supervised=False: None
    train: Callable[[Base, list[Any], float], Delta] | None = None
    companions: tuple[Any, ...] = ()
    seed: int = 0
    read: Callable[[Base, str], Sample] | None = None
    context: dict[str, Any] = field(default_factory=dict)

    def of(self, base: Base, source: str) -> Sample:
        """A sample of the data at `source` for this base. Raises UsageError where no other data can be read."""
        if self.read is None:
            raise UsageError(
                f"{source!r} cannot be read here", hint="use ts.tune with data in a file, or pass its Sample"
            )
        return self.read(base, source)

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
        return _patches(m, x, 1 if site.kind == "conv1d" else 2)
    grouped = "grouped " if site.kind.startswith("conv") else ""
    raise UsageError(f"the inputs of a {grouped}{site.kind} cannot be collected as rows", where=site.path)


def _patches(m: Any, x: Tensor, dims: int) -> Tensor:
    """Patches [n, in * kernel] of a convolution's input [B, in, ...] or [in, ...], padding of any mode included."""
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    pad = m.padding
    if m.padding_mode != "zeros" or pad == "same":  # as torch pads them, sides of "same" may differ
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        x, pad = F.pad(x, m._reversed_padding_repeated_twice, mode=mode), "valid"
    kernel, dilation, stride = m.kernel_size, m.dilation, m.stride
    sides = (0,) * dims if pad == "valid" else tuple(pad)
    if dims == 1:  # unfold knows pictures only: a signal is one of height 1
        x = x.unsqueeze(-2)
        kernel, dilation, stride, sides = (1, *kernel), (1, *dilation), (1, *stride), (0, *sides)
    cols = F.unfold(x, kernel, dilation=dilation, padding=sides, stride=stride)  # [B, in * kernel, positions]
    return cols.transpose(1, 2).reshape(-1, cols.shape[1])


@contextmanager
def _watching(base: Base, sites: Iterable[Site], see: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call `see(site, input)` whenever one of the sites runs."""

    def hook_for(site: Site) -> Any:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs)
            if x is not None:
                see(site, x)

        return hook

    handles = [base.modules[s.path].register_forward_pre_hook(hook_for(s), with_kwargs=True) for s in sites]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


Seen = Callable[["Site", Tensor, list[int]], None]


@torch.no_grad()
def look(base: Base, sites: Iterable[Site], sample: Sample, batch: Any, see: Seen, *, supervised: bool = False) -> None:
    """Run one batch in eval mode and call `see(site, rows, sizes)` each time a site runs, without keeping anything.

    `rows` [n, in * kernel] are fp32 and without padding; with `supervised` only positions with a label. A site whose
    input has other leading dimensions than the mask (a pooled state, an image) shows all its rows. `sizes` says how many
    rows belong to each example; where the input is one matrix, that is taken for one example.
    """
    mask = sample.keep(batch, supervised=supervised)

    def watched(site: Site, x: Tensor) -> None:
        if mask is not None and site.kind == "linear" and x.shape[:-1] == mask.shape:
            see(site, x[mask.to(x.device)].float(), mask.flatten(1).sum(1).tolist())
            return
        rows = rows_of_input(site, x).float()
        batched = x.dim() >= (len(site.shape) if site.kind.startswith("conv") else 3) and len(x) > 0
        see(site, rows, [len(rows) // len(x)] * len(x) if batched else [len(rows)])

    with base.evaluating(), _watching(base, sites, watched):
        sample.run(base, batch)


def inputs(base: Base, sites: list[Site], sample: Sample, *, supervised: bool = False) -> Iterator[dict[str, Tensor]]:
    """For every batch, the fp32 input rows [n, in * kernel] of each site that ran, by path; see `look`."""
    for batch in sample.batches():
        seen: dict[str, list[Tensor]] = {}

        def see(site: Site, rows: Tensor, sizes: list[int], seen: dict[str, list[Tensor]] = seen) -> None:
            seen.setdefault(site.path, []).append(rows)

        look(base, sites, sample, batch, see, supervised=supervised)
        yield {path: torch.cat(rows) for path, rows in seen.items()}


@torch.no_grad()
def second_moments(
    base: Base, sites: list[Site], sample: Sample, *, scaled: bool = True, supervised: bool = False
) -> dict[str, Tensor]:
    """mean over examples of X^T X, [in * kernel, in * kernel] fp32, for each site that ran; X are an example's rows.

    With `scaled`, X is first divided by its largest absolute entry. Nothing is centred.
    """
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def see(site: Site, X: Tensor, sizes: list[int]) -> None:
        sizes = [n for n in sizes if n]
        if not sizes:
            return
        if scaled:
            largest = torch.stack([x.abs().max() for x in X.split(sizes)]).clamp_min(1e-12)
            X = X / largest.repeat_interleave(torch.tensor(sizes, device=X.device))[:, None]
        C = X.T @ X
        total[site.path] = total[site.path] + C if site.path in total else C
        count[site.path] = count.get(site.path, 0) + len(sizes)

    for batch in sample.batches():
        look(base, sites, sample, batch, see, supervised=supervised)
    return {path: C / count[path] for path, C in total.items()}


def gradients(base: Base, sites: list[Site], sample: Sample) -> Iterator[dict[str, Tensor]]:
    """For every batch, the gradient of its summed loss with respect to each site's canonical weight, fp32, by path.

    Give batches of one example for per-example gradients. The weights themselves never take part in training: their
    flags and gradients are put back.
    """
    weights = {s.path: s.module._parameters.get("weight") for s in sites if not s.held}
    turned = {s.path: s.transposed for s in sites}
    for batch in sample.batches():
        with base.evaluating(), base.frozen(), sample.accompanied(base), _changes(base, sites) as changes:
            for w in weights.values():
                w.requires_grad_(True)  # type: ignore[union-attr]
            wanted: dict[str, Any] = {**weights, **changes}
            got = torch.autograd.grad(sample.loss(base, batch), list(wanted.values()), allow_unused=True)
        yield {p: (g.T if turned[p] else g).float() for p, g in zip(wanted, got, strict=True) if g is not None}


@contextmanager
def _changes(base: Base, sites: Iterable[Site]) -> Iterator[dict[str, Tensor]]:
    """A zero change [out, in] added to each linear layer that holds no dense weight: its gradient is the weight's."""
    changes, handles = {}, []
    for s in sites:
        if s.held:
            Z = torch.zeros(s.shape, dtype=base.dtype, device=base.device, requires_grad=True)
            changes[s.path] = Z
            handles.append(
                base.modules[s.path].register_forward_hook(
                    lambda _m, args, kwargs, out, Z=Z: out + F.linear(_first(args, kwargs), Z), with_kwargs=True
                )
            )
    try:
        yield changes
    finally:
        for h in handles:
            h.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


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
