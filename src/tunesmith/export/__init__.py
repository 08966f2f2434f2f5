# SPDX-License-Identifier: Apache-2.0
"""Deltas in other tools' formats, and back."""
