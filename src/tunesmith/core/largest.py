# SPDX-License-Identifier: Apache-2.0
"""The k largest entries of long rows by selecting a threshold: linear in the entries, where sorting takes ten times as long."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import UsageError

LONG, SAMPLE, MARGIN = 1 << 16, 1 << 14, 4  # entries; entries; standard deviations of a rank in the sample


def largest(values: Tensor, k: int) -> Tensor:
    """Mask [rows, n] of the k largest entries of each row of `values` [rows, n]; of equal ones the lower index counts.

    The same entries as the first k of a stable sort in falling order. Raises UsageError for k outside 0 .. n, or NaN.
    """
    rows, n = values.shape
    if not 0 <= k <= n:
        raise UsageError(f"there are no {k} largest of {n} entries")
    if k in (0, n):
        return torch.full((rows, n), k == n, dtype=torch.bool, device=values.device)
    least = kth_largest(values, k)  # [rows, 1]
    keep = values >= least
    over = torch.tensor(
        [_count(row) - k for row in keep]
    )  # of those that equal the least, the last in order are too many
    for i in torch.nonzero(over).flatten().tolist():
        equal = np.flatnonzero((values[i] == least[i]).cpu().numpy())
        keep[i, torch.from_numpy(equal[-int(over[i]) :]).to(keep.device)] = False
    return keep


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest entry [rows, 1] of each row of `values` [rows, n], 1 <= k <= n. Raises UsageError for NaN."""
    if bool(torch.isnan(values.sum())) and bool(torch.isnan(values).any()):
        raise UsageError("an entry is not a number, so the entries cannot be ranked")
    n = values.shape[1]
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return torch.kthvalue(values, n - k + 1, dim=1, keepdim=True).values
    found = [_kth(row, k) for row in values.detach()]
    return torch.from_numpy(np.array(found, dtype=values.numpy().dtype))[:, None]


def _kth(row: Tensor, k: int) -> float:
    """The k-th largest of a row [n]: among the few entries between two bounds that a sample of the row suggests.

    Counting and picking them are passes that run in parallel, several times as quick as partitioning the row, which is
    what is done where the sample misled, or the row is short.
    """
    n = len(row)
    if n > LONG:
        sample = row[:: n // SAMPLE][:SAMPLE].sort().values
        m = len(sample)
        at, slack = m * (n - k) / n, MARGIN * (m * k / n * (1 - k / n)) ** 0.5 + MARGIN
        low, high = (sample[min(m - 1, max(0, int(i)))] for i in (at - slack, at + slack + 1))
        above = _count(row > high)
        if low == high and above < k <= above + _count(row == low):
            return float(low)  # many equal entries, as of differences in half precision
        among = row[(row >= low) & (row <= high)]
        if above < k <= above + len(among) and len(among) < 0.7 * n:
            return _kth(among, k - above)
    return float(np.partition(row.numpy(), len(row) - k)[len(row) - k])  # several times as quick as kthvalue


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.cpu().numpy()))  # many times as quick as torch's
