# SPDX-License-Identifier: Apache-2.0
"""Many deltas served from one base."""
