# SPDX-License-Identifier: Apache-2.0
"""PELA as one recipe: factorise a base, repair it towards what it was, and then train all of it.

    tunesmith tune DATA --model M --method pela:ratio=2

The repair's task loss is that of the sample where the base can be scored without a new head; else only features and
weights are pulled. The paper repairs on the data of pre-training. From `tune` the sample is the training data, which is
less of it and of another kind: expect less, or give another base made with `repair`.

Guo et al. 2023, arXiv 2310.10700; the parts are in `factorise` and `repair`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.derive import Made, recipe
from tunesmith.core.errors import UsageError
from tunesmith.core.method import option
from tunesmith.core.sample import Sample
from tunesmith.derive.factorise import SMALLEST, FactoredLinear, Factorise
from tunesmith.derive.own import Schedule
from tunesmith.derive.repair import repair


@recipe("pela", paper="2310.10700")
class PELA:
    """Two thin layers for each linear one, repaired towards the original; all of it trains."""

    ratio: float = option(2.0, "c: how many times fewer numbers a matrix keeps", low=0.01, high=1e6)
    targets: str = option("all-linear", "which linear layers")
    ratio_pattern: dict[str, float] = option({}, "glob or last path part -> ratio of those layers")
    smallest: int = option(SMALLEST, "layers with fewer outputs are left alone", low=1, high=1 << 31)
    steps: int = option(200, "steps of the repair; 0 for none", low=0, high=10**9)
    lr: float = option(1e-4, "learning rate of the repair (AdamW)", low=0.0, high=10.0)
    feature: float = option(1.0, "a: weight of the distance between block outputs", low=0.0, high=1e6)
    logits: float = option(0.0, "b: weight of the distance between outputs", low=0.0, high=1e6)
    weight: float = option(1.0, "g: weight of the largest error of an entry", low=0.0, high=1e6)

    def observes(self) -> bool:
        """Whether data goes into it."""
        return self.steps > 0

    def make(self, base: Base, sample: Sample | None) -> Made:
        """Factored layers by path."""
        parts = Factorise(self.ratio, self.targets, self.ratio_pattern, self.smallest)
        return parts.make(base, None)

    def then(self, made: Base, parent: Base, sample: Sample | None) -> Base:
        """The factored base after its repair. Raises UsageError where there is no data for it."""
        if not self.steps:
            return made
        if sample is None:
            raise UsageError("the repair needs data", where="pela", hint="a sample, or steps=0")
        batches = list(sample.batches())
        known: dict[int, Base] = {}

        def based(model: nn.Module) -> Base:
            if id(model) not in known:
                known[id(model)] = Base(model, tokenizer=made.tokenizer, example=made._example, family=made.family)
            return known[id(model)]

        current: list[nn.Module] = []

        def run(model: nn.Module, batch: Any) -> Any:
            if model is not parent.model:
                current[:] = [model]
            return sample.run(based(model), batch)

        def loss(output: Any, batch: Any) -> Tensor:
            if sample.companions:  # a head that does not exist yet has nothing to say
                return torch.zeros(())
            keep = sample.keep(batch, supervised=True)
            count = int(keep.sum()) if keep is not None else max(1, len(next(iter(batch.values()))))
            return sample.loss(based(current[0]), batch) / max(1, count)

        schedule = Schedule(steps=self.steps, lr=self.lr, seed=sample.seed)
        options = {"feature": self.feature, "logits": self.logits, "weight": self.weight}
        return repair(made, parent, lambda i: batches[i % len(batches)], run, loss, schedule, **options).base

    def trains(self, base: Base, extra: Any) -> list[Any]:
        """Every parameter of the small model, as the paper's fine-tuning: factors in place of the layers they make up."""
        whole = ",".join(f"!{p}" for p, m in base.modules.items() if isinstance(m, FactoredLinear))
        return [methods.build("full", {"targets": f"everything,{whole},first,second"})]
