# SPDX-License-Identifier: Apache-2.0
"""Set-ups that studies share: a base, its training task, splits for choosing and for reporting, and a retention set.

`language.gsm8k_top` adapts the upper blocks of SmolLM2 on worked sums, `text.few_shot` adapts MiniLM to a few sentences
of each class; `arms` trains methods in either and chooses learning rates with equal trials. `Context.smoke` gives toy
versions that need neither data nor weights.
"""
