# SPDX-License-Identifier: Apache-2.0
"""Head puts a new output layer on the base's features.

    logits = W pool(features) + b      W [classes, d], features [B, T, d] or [B, d]

W and b train, W starting at N(0, 0.02) and b at zero; the base is frozen. The features are what the base's own output
layer reads (that layer is skipped: no product over the vocabulary is made), or the last hidden state of a base without
one. It replaces the output, so it is never the identity, has no strength between, and cannot be merged.

Defaults: pooling by what the base is: the last real token where attention is causal, the mean over real tokens where it
is not, the mean over positions of a feature map. `task="tagging"` gives logits per token. Labels do not reach the base;
if given, the loss is computed here.
Use when: classification, regression or tagging with any base; together with another method or alone as a linear probe.
Avoid when: a causal model can answer in words and few labels exist.
Cost: classes (d + 1) parameters; less than the base's own head.

The linear probe: Alain and Bengio 2016, arXiv 1610.01644.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.core.features import head_input, head_site
from tunesmith.core.method import option, register
from tunesmith.core.sites import Site
from tunesmith.deltas.output.pooling import POOLS, pooled

TASKS = ("classification", "regression", "tagging")


@register(
    "head", carrier="output", paper="1610.01644", kinds=("model",), identity_at_init=False, strength="on-off",
    merge="it replaces the output by one of another shape",
    expected={"rows_are_independent": "rows with and without the head have outputs of different shapes"},
)  # fmt: skip
class Head:
    """Put a new output layer on the base's features."""

    classes: int = option(2, "number of classes, or of regressed values", low=1, high=10_000_000)
    task: str = option("classification", "what is predicted", choices=TASKS)
    pool: str = option("auto", "how token features become one", choices=POOLS)
    dropout: float = option(0.0, "dropout on the pooled features while training", low=0.0, high=1.0)
    std: float = option(0.02, "spread of the first weights", low=0.0, high=10.0)
    lr_ratio: float = option(1.0, "learning rate of the head over the run's", low=1e-4, high=1e4)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """W [classes, d] and b [classes], fp32."""
        W = torch.randn(self.classes, _feature_size(site), generator=generator) * self.std
        return {"W": W, "b": torch.zeros(self.classes)}

    def model(self, site: Site, t: dict[str, Tensor], call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Logits [B, classes], or [B, T, classes] for tagging, in fp32, in an output of the base's kind."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        x, out = head_input(site, call, inputs)
        if self.task != "tagging" and self.pool != "none":
            x = pooled(x, inputs.get("attention_mask"), self.pool, site)
        x = F.dropout(x.to(t["W"].dtype), self.dropout, training=site.module.training)
        logits = F.linear(x, t["W"], t["b"])
        return _output(out, logits, None if labels is None else self.loss(logits, labels))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy (-100 does not count) or mean squared error. Raises UsageError for other shapes."""
        fitting = [logits.shape] if self.task == "regression" else [logits.shape[:-1]]
        if self.classes == 1:
            fitting.append(logits.shape[:-1])
        if labels.shape not in fitting:
            raise UsageError(f"labels have shape {list(labels.shape)}, the logits {list(logits.shape)}", where="head")
        if self.task == "regression":
            return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def learning_rates(self) -> dict[str, float]:
        """A fresh head often wants a larger rate than what it is trained with."""
        return {"W": self.lr_ratio, "b": self.lr_ratio}

    def recipe(self) -> dict[str, float]:
        """A linear layer under AdamW."""
        return {"lr": 1e-3}

    @classmethod
    def toy(cls) -> Head:
        return cls(classes=3)


class HeadOutput(dict[str, Any]):
    """Output of a head on a base whose own output has no place for logits; entries can be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _output(out: Any, logits: Tensor, loss: Tensor | None) -> Any:
    if isinstance(out, Tensor) and loss is None:
        return logits
    new = {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
    return type(out)(**{**out, **new}) if isinstance(out, dict) and "logits" in out else HeadOutput(new)


def _feature_size(site: Site) -> int:
    head = head_site(site)
    if head is not None:
        return head.shape[1]
    shape = site.map.trace.output_shape if site.map is not None and site.map.trace is not None else ()
    if len(shape) < 2:
        hint = "give the base an example input: Base(model, example=...)"
        raise UsageError("the width of the base's features is not known", hint=hint)
    return shape[1] if len(shape) == 4 else shape[-1]
