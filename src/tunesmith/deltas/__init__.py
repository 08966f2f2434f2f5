# SPDX-License-Identifier: Apache-2.0
"""The methods: importing this package registers every one of them."""

from tunesmith.deltas.hidden.ia3 import IA3
from tunesmith.deltas.hidden.ssf import SSF
from tunesmith.deltas.output.head import Head
from tunesmith.deltas.prompt.p_tuning import PTuning
from tunesmith.deltas.prompt.prefix_tuning import PrefixTuning
from tunesmith.deltas.prompt.prompt_tuning import PromptTuning
from tunesmith.deltas.side.ladder import Ladder
from tunesmith.deltas.weight.bitfit import BitFit
from tunesmith.deltas.weight.dora import DoRA
from tunesmith.deltas.weight.flora import FLoRA
from tunesmith.deltas.weight.fourierft import FourierFT
from tunesmith.deltas.weight.full import Full
from tunesmith.deltas.weight.loha import LoHa
from tunesmith.deltas.weight.lokr import LoKr
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.norm_tuning import NormTuning
from tunesmith.deltas.weight.vera import VeRA

__all__ = [
    "IA3",
    "SSF",
    "BitFit",
    "DoRA",
    "FLoRA",
    "FourierFT",
    "Full",
    "Head",
    "Ladder",
    "LoHa",
    "LoKr",
    "LoRA",
    "NormTuning",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "VeRA",
]
