# SPDX-License-Identifier: Apache-2.0
"""What the single stream of `benchmarks/serve.py` is asked: five plain requests of different kinds."""

from __future__ import annotations

PROMPTS = (
    "Rewrite this paragraph in simpler words: The municipal authority has resolved to defer the commencement of the "
    "restoration works on the northern footbridge until such time as the seasonal flooding has abated, whereupon tenders "
    "will be invited from contractors with demonstrable experience of riverine construction.",
    "A bakery sells 48 loaves in the morning and half as many in the afternoon. Each loaf costs 3 dollars. On Sunday it "
    "sells twice as many loaves as on any other day. How much does the bakery earn in a week? Explain each step.",
    "Write a short letter to a landlord about a kitchen tap that has been leaking for two weeks, and ask for a date.",
    "What is wrong with this function, and how should it read?\n\ndef mean(values):\n    total = 0\n    for v in values:\n"
    "        total = v\n    return total / len(values)",
    "Summarise these notes in three points. Anna: the parser fails on empty files, ticket open since March. Ben: the new "
    "index halves search time, but the nightly build takes 20 minutes longer. Carla: two customers asked for export to CSV, "
    "one for dark colours. Ben will measure the build without the index. Anna mends the parser before Friday.",
)
