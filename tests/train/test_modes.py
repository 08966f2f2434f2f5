# SPDX-License-Identifier: Apache-2.0
"""Measuring runs as training does, without gradients, and leaves every flag as it was."""

from __future__ import annotations

import torch

from tunesmith.core.toys import toys
from tunesmith.train.modes import measuring


def test_measuring_takes_the_format_of_training_and_puts_flags_back() -> None:
    base = toys()[0]
    base.model.train()
    base.model.layers[0].eval()  # type: ignore[index, union-attr]
    ids = base.probe()
    with measuring(base, "fp32"):
        assert not base.model.training and not torch.is_grad_enabled()
        plain = base.model(**ids)["logits"]
    with measuring(base, "bf16"):
        half = base.model(**ids)["logits"]
    assert plain.dtype == torch.float32 and half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, atol=0.05, rtol=0.05)
    assert base.model.training and not base.model.layers[0].training  # type: ignore[index, union-attr]
    assert torch.is_grad_enabled()
