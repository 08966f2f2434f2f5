# SPDX-License-Identifier: Apache-2.0
"""Read adapters that PEFT wrote, and write deltas that PEFT can read.

`read_peft(folder, base)` gives a delta with the same outputs; `write_peft(delta, base, folder)` writes
`adapter_config.json` and `adapter_model.safetensors`. PEFT itself is not needed. What the other side cannot hold is named
in the error; `nearest_lora` gives the closest low-rank delta with its error, which PEFT can always read.
"""

from tunesmith.core.nearest import Fit, nearest_lora
from tunesmith.export.peft.read import read_peft
from tunesmith.export.peft.write import WRITERS, write_peft

__all__ = ["WRITERS", "Fit", "nearest_lora", "read_peft", "write_peft"]
