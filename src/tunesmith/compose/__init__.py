# SPDX-License-Identifier: Apache-2.0
"""Merging, sparsifying, scaling and compressing: deltas in, delta out. Importing this package registers every combiner.

    both = ts.merge(base, [a, b])                             # the mean
    both = ts.merge(base, [a, b], "ties:density=0.3")
    half = ts.scale(base, a, 0.5)
    small = ts.compress(base, a, rank=4)

What comes out is a delta like any other, stored in the lightest form that holds it exactly.
"""

from tunesmith.compose.build import build
from tunesmith.compose.collect import DeltaChanges
from tunesmith.compose.consensus import Breadcrumbs, BreadcrumbsTies, Dare, DareTies, Della, DellaLinear, Ties
from tunesmith.compose.enchtable import EnchTable
from tunesmith.compose.graft import MovementGraft
from tunesmith.compose.linear import Linear, TaskArithmetic
from tunesmith.compose.lines import Lines
from tunesmith.compose.merge import Compressed, compress, merge, negate, scale, subtract
from tunesmith.compose.pcb import PCB
from tunesmith.compose.route import reset, route, trace
from tunesmith.compose.sphere import Karcher, NuSlerp, Slerp
from tunesmith.compose.stock import ModelStock
from tunesmith.core.combine import COMBINERS, Combiner

__all__ = [
    "COMBINERS",
    "PCB",
    "Breadcrumbs",
    "BreadcrumbsTies",
    "Combiner",
    "Compressed",
    "Dare",
    "DareTies",
    "Della",
    "DellaLinear",
    "DeltaChanges",
    "EnchTable",
    "Karcher",
    "Linear",
    "Lines",
    "ModelStock",
    "MovementGraft",
    "NuSlerp",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "build",
    "compress",
    "merge",
    "negate",
    "reset",
    "route",
    "scale",
    "subtract",
    "trace",
]
