# SPDX-License-Identifier: Apache-2.0
"""The methods: importing this package registers every one of them."""

from tunesmith.deltas.hidden.ia3 import IA3
from tunesmith.deltas.hidden.meteora import MeteoRA
from tunesmith.deltas.hidden.ssf import SSF
from tunesmith.deltas.output.head import Head
from tunesmith.deltas.prompt.p_tuning import PTuning
from tunesmith.deltas.prompt.prefix_tuning import PrefixTuning
from tunesmith.deltas.prompt.prompt_tuning import PromptTuning
from tunesmith.deltas.side.ladder import Ladder
from tunesmith.deltas.weight.adalora import AdaLoRA
from tunesmith.deltas.weight.bitfit import BitFit
from tunesmith.deltas.weight.block_lora import BlockLoRA
from tunesmith.deltas.weight.boft import BOFT
from tunesmith.deltas.weight.bone import Bone
from tunesmith.deltas.weight.corda import CorDA
from tunesmith.deltas.weight.dora import DoRA
from tunesmith.deltas.weight.dsee import DSEE
from tunesmith.deltas.weight.eva import EVA
from tunesmith.deltas.weight.fixed_mask import FixedMask
from tunesmith.deltas.weight.flora import FLoRA
from tunesmith.deltas.weight.fourierft import FourierFT
from tunesmith.deltas.weight.full import Full
from tunesmith.deltas.weight.hash_shared import HashShared
from tunesmith.deltas.weight.hft import HFT
from tunesmith.deltas.weight.hira import HiRA
from tunesmith.deltas.weight.hut import HUT
from tunesmith.deltas.weight.hydra import Hydra
from tunesmith.deltas.weight.implicit_sparse import ImplicitSparse
from tunesmith.deltas.weight.increlora import IncreLoRA
from tunesmith.deltas.weight.lift import LIFT
from tunesmith.deltas.weight.loha import LoHa
from tunesmith.deltas.weight.lokr import LoKr
from tunesmith.deltas.weight.lora import LoRA
from tunesmith.deltas.weight.lora_refactor import LoRARefactor
from tunesmith.deltas.weight.lt_sft import LTSFT
from tunesmith.deltas.weight.mask import Mask
from tunesmith.deltas.weight.miss import MiSS
from tunesmith.deltas.weight.norm_tuning import NormTuning
from tunesmith.deltas.weight.oft import OFT
from tunesmith.deltas.weight.olora import OLoRA
from tunesmith.deltas.weight.pissa import PiSSA
from tunesmith.deltas.weight.ppt import PivotalTuning
from tunesmith.deltas.weight.sara import SaRA
from tunesmith.deltas.weight.shira import SHiRA
from tunesmith.deltas.weight.sora import SoRA
from tunesmith.deltas.weight.sparse_delta import SparseDelta
from tunesmith.deltas.weight.trainable_tokens import TrainableTokens
from tunesmith.deltas.weight.vera import VeRA

__all__ = [
    "BOFT",
    "DSEE",
    "EVA",
    "HFT",
    "HUT",
    "IA3",
    "LIFT",
    "LTSFT",
    "OFT",
    "SSF",
    "AdaLoRA",
    "BitFit",
    "BlockLoRA",
    "Bone",
    "CorDA",
    "DoRA",
    "FLoRA",
    "FixedMask",
    "FourierFT",
    "Full",
    "HashShared",
    "Head",
    "HiRA",
    "Hydra",
    "ImplicitSparse",
    "IncreLoRA",
    "Ladder",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRARefactor",
    "Mask",
    "MeteoRA",
    "MiSS",
    "NormTuning",
    "OLoRA",
    "PTuning",
    "PiSSA",
    "PivotalTuning",
    "PrefixTuning",
    "PromptTuning",
    "SHiRA",
    "SaRA",
    "SoRA",
    "SparseDelta",
    "TrainableTokens",
    "VeRA",
]
