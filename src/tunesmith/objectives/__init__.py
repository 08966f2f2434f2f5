# SPDX-License-Identifier: Apache-2.0
"""What training optimises. An objective gives a summed loss and the number of units it was summed over."""

from tunesmith.objectives.routed import Routed
from tunesmith.objectives.sft import SFT
from tunesmith.objectives.supervised import Classification, Regression, Tagging

__all__ = ["SFT", "Classification", "Regression", "Routed", "Tagging"]
