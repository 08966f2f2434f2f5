# SPDX-License-Identifier: Apache-2.0
"""Derived bases: new models made from a base by a recipe. Importing this package registers every recipe.

    small = ts.derive.factorise(base, ratio=2.0)          # two thin layers in place of each (PELA)
    packed = ts.derive.quantise(base, bits=4)             # 2 to 8 bits a weight, in memory too
    packed, start = ts.derive.lq_lora(base, rank=64, budget=2.75)
    sparse = ts.derive.sparsify(base, share=0.75)         # a random mask held as a number (SPDF)

The base they are made from is never changed; `base.source["derived"]` says how one was made.
"""

from tunesmith.core.derive import RECIPES, again, derive, records
from tunesmith.core.derived_store import load_derived, save_derived
from tunesmith.derive.factorise import FactoredLinear, Factorise, dense_delta, factorise
from tunesmith.derive.lq import LQ, LoftQ, fisher_weights, loftq, lq_lora
from tunesmith.derive.nf import Format
from tunesmith.derive.own import Schedule, TrainedBase, train_own
from tunesmith.derive.pela import PELA
from tunesmith.derive.quantise import Quantise, QuantLinear, quantise
from tunesmith.derive.repair import repair
from tunesmith.derive.sparsify import Densify, RandomMask, Sparsify, densify, flops, mask_of, masks, sparsify, split

__all__ = [
    "LQ",
    "PELA",
    "RECIPES",
    "Densify",
    "FactoredLinear",
    "Factorise",
    "Format",
    "LoftQ",
    "QuantLinear",
    "Quantise",
    "RandomMask",
    "Schedule",
    "Sparsify",
    "TrainedBase",
    "again",
    "dense_delta",
    "densify",
    "derive",
    "factorise",
    "fisher_weights",
    "flops",
    "load_derived",
    "loftq",
    "lq_lora",
    "mask_of",
    "masks",
    "quantise",
    "records",
    "repair",
    "save_derived",
    "sparsify",
    "split",
    "train_own",
]
