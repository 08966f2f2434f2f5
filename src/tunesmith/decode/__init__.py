# SPDX-License-Identifier: Apache-2.0
"""Change the next-token distribution and leave the weights alone.

    steered = combine(large, [(1.0, tuned, small)])                # emulated fine-tuning
    more = combine(base, [(1.5, delta)])                           # a delta beyond its strength, in log space
    guarded = handoff(base, delta, k=15)                           # the base writes the first 15 tokens

What comes out is a `core.decoding.Decoder`: give it to `evaluate.generate.generate` in place of a base, or to a server's
library (`Library.guide`).
"""

from tunesmith.core.decoding import Decoder, Member
from tunesmith.decode.combine import Combination, combine, contrastive
from tunesmith.decode.handoff import Forced, Handoff, forced, handoff

__all__ = ["Combination", "Decoder", "Forced", "Handoff", "Member", "combine", "contrastive", "forced", "handoff"]
