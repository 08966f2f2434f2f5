# SPDX-License-Identifier: Apache-2.0
"""What a delta changed: one file per probe, plain data out. Importing this package registers every probe.

    from tunesmith.core.probe import PROBES
    PROBES.parse("intruders:k=10,eps=0.5").measure(base, delta)

`ts.diff(base, delta)` runs several and draws the report. The functions behind the probes are here too.
"""

from tunesmith.inspect.depth_kl import DepthKL
from tunesmith.inspect.drift import Drift, module_drift, sensitivity, steps
from tunesmith.inspect.forgetting import LEET, Ability, Transform, forgetting
from tunesmith.inspect.head_descent import double_descent, head_tune
from tunesmith.inspect.icl import icl
from tunesmith.inspect.intruders import Intruders, dampened, find_intruders, match, overlap, similarity
from tunesmith.inspect.lens import Lens
from tunesmith.inspect.localisation import Localisation
from tunesmith.inspect.norms import Norms
from tunesmith.inspect.novelty import Novelty, contrast, explore
from tunesmith.inspect.prior import Prior, items_of, prior_of, read_layers
from tunesmith.inspect.readout import block_states, capability, readout
from tunesmith.inspect.regimes import cka, connectivity, regimes
from tunesmith.inspect.revival import Revival, revive
from tunesmith.inspect.spectra import Spectra
from tunesmith.inspect.transferability import rank_sources, transferability
from tunesmith.inspect.wrapper import Wrapper, ablation

__all__ = [
    "LEET",
    "Ability",
    "DepthKL",
    "Drift",
    "Intruders",
    "Lens",
    "Localisation",
    "Norms",
    "Novelty",
    "Prior",
    "Revival",
    "Spectra",
    "Transform",
    "Wrapper",
    "ablation",
    "block_states",
    "capability",
    "cka",
    "connectivity",
    "contrast",
    "dampened",
    "double_descent",
    "explore",
    "find_intruders",
    "forgetting",
    "head_tune",
    "icl",
    "items_of",
    "match",
    "module_drift",
    "overlap",
    "prior_of",
    "rank_sources",
    "read_layers",
    "readout",
    "regimes",
    "revive",
    "sensitivity",
    "similarity",
    "steps",
    "transferability",
]
