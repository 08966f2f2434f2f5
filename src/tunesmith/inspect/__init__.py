# SPDX-License-Identifier: Apache-2.0
"""What a delta changed: one file per probe, plain data out. Importing this package registers every probe."""

from tunesmith.inspect.forgetting import LEET, Ability, Transform, forgetting
from tunesmith.inspect.head_descent import double_descent, head_tune
from tunesmith.inspect.icl import icl
from tunesmith.inspect.readout import block_states, capability, readout
from tunesmith.inspect.regimes import cka, connectivity, regimes
from tunesmith.inspect.revival import Revival, revive
from tunesmith.inspect.transferability import rank_sources, transferability
from tunesmith.inspect.wrapper import Wrapper, ablation

__all__ = [
    "LEET",
    "Ability",
    "Revival",
    "Transform",
    "Wrapper",
    "ablation",
    "block_states",
    "capability",
    "cka",
    "connectivity",
    "double_descent",
    "forgetting",
    "head_tune",
    "icl",
    "rank_sources",
    "readout",
    "regimes",
    "revive",
    "transferability",
]
