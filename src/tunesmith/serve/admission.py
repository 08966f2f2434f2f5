# SPDX-License-Identifier: Apache-2.0
"""Who joins the running batch, and when: admission that cannot overflow, clustering, fairness, early abort.

Everything here is pure bookkeeping over `Waiting` and `Running` records, with no tensor and no clock of its own.

Sheng et al. 2023 (S-LoRA), arXiv 2311.03285; fairness by virtual token counters, Sheng et al. 2024, arXiv 2401.00588.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith.core.errors import UsageError

POLICIES = ("fcfs", "cluster", "fair")


@dataclass(frozen=True)
class Waiting:
    """A request in the queue: prompt tokens, the most it may generate, its delta (None: the base), arrival in seconds.

    `shared` of the prompt's tokens lie in cells that running requests read as well.
    """

    id: str
    prompt: int
    new: int
    delta: str | None = None
    arrived: float = 0.0
    shared: int = 0


@dataclass(frozen=True)
class Running:
    """A request in the batch: tokens in cells of its own, tokens it may still generate."""

    id: str
    used: int
    left: int
    delta: str | None = None


def need(requests: Iterable[tuple[int, int]]) -> int:
    """Cells that suffice for `(used, left)` requests until all have finished, whatever their lengths turn out to be.

        sort by left, falling;  need = max_i ( left_i * i + sum_{j <= i} used_j ),  i = 1..n

    When i requests still run, the shortest of them has at most left_i to go, and each of the i holds at most used + left_i.
    """
    most = total = 0
    for i, (used, left) in enumerate(sorted(requests, key=lambda r: -r[1]), start=1):
        total += used
        most = max(most, left * i + total)
    return most


@dataclass(frozen=True)
class Limits:
    """What a batch may hold.

    Args:
        cells: of the pool, for caches and resident deltas together.
        requests: in the running batch.
        prompt_tokens: of requests that join together (0: a sixth of the cells, as in the released server).
        deltas: distinct ones in the batch before clustering prefers requests whose delta is there already.
        resident: most distinct ones in the batch at all (0: as many as fit).
    """

    cells: int
    requests: int = 64
    prompt_tokens: int = 0
    deltas: int = 8
    resident: int = 0

    @property
    def joining(self) -> int:
        return self.prompt_tokens or max(1, self.cells // 6)


@dataclass
class Batch:
    """The requests that run and those that join, while candidates are tried one by one.

    `held` cells are read by running requests in common and belong to none of them.
    """

    limits: Limits
    sizes: Mapping[str, int]
    running: Sequence[Running] = ()
    held: int = 0
    joined: list[Waiting] = field(default_factory=list)

    def deltas(self) -> set[str]:
        return {r.delta for r in (*self.running, *self.joined) if r.delta is not None}

    def fits(self, one: Waiting) -> bool:
        """Whether `one` may join as well. A pure test: a refusal leaves no trace."""
        requests = [(r.used, r.left) for r in self.running] + [
            (w.prompt - w.shared, w.new) for w in (*self.joined, one)
        ]
        deltas = self.deltas() | ({one.delta} if one.delta is not None else set())
        joining = sum(w.prompt - w.shared for w in (*self.joined, one))
        alone = not self.joined  # a prompt longer than the limit is read by itself, or it would wait for ever
        return (
            len(requests) <= self.limits.requests
            and (not self.limits.resident or len(deltas) <= self.limits.resident)
            and (joining <= self.limits.joining or alone)
            and need(requests) <= self._room(deltas)
        )

    def can_end(self) -> bool:
        """Whether the running requests can all be served to their end."""
        return need((r.used, r.left) for r in self.running) <= self._room(self.deltas())

    def _room(self, deltas: Iterable[str]) -> int:
        """Cells for what requests have of their own, beside these deltas."""
        return self.limits.cells - self.held - sum(self.sizes[d] for d in deltas)

    def could_ever(self, one: Waiting) -> bool:
        """Whether `one` would fit into an empty batch; if not, waiting does not help it."""
        return Batch(self.limits, self.sizes).fits(one)


def admit(
    queue: Sequence[Waiting],
    running: Sequence[Running],
    limits: Limits,
    sizes: Mapping[str, int],
    *,
    policy: str = "fcfs",
    counters: Counters | None = None,
    held: int = 0,
) -> list[Waiting]:
    """The requests that join the batch now, in the order they do.

    Args:
        sizes: the cells each delta takes.
        policy: "fcfs" takes them in the order of the queue and stops at the first that does not fit; "cluster" first
            those whose delta is in the batch, once `limits.deltas` are; "fair" always from the delta with the smallest
            counter (`counters`, which are charged for what joins).
        held: cells that running requests read in common.
    Raises UsageError for an unknown policy.
    """
    batch = Batch(limits, sizes, running, held)
    if policy == "fair":
        if counters is None:
            raise UsageError("the fair policy needs its counters", where="counters")
        return _fair(queue, batch, counters)
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}", hint=f"one of {', '.join(POLICIES)}")
    rest = list(queue)
    if policy == "cluster" and len(batch.deltas()) >= limits.deltas:
        here = batch.deltas()
        rest = []
        for one in queue:
            if one.delta in here and batch.fits(one):
                batch.joined.append(one)
            else:
                rest.append(one)
    for one in rest:
        if not batch.fits(one):
            break
        batch.joined.append(one)
    return batch.joined


def _fair(queue: Sequence[Waiting], batch: Batch, counters: Counters) -> list[Waiting]:
    lines: dict[str | None, list[Waiting]] = {}
    for one in queue:
        lines.setdefault(one.delta, []).append(one)
    while lines:
        first = min(lines, key=lambda d: (counters.of(d), lines[d][0].arrived))
        if not batch.fits(lines[first][0]):
            break
        one = lines[first].pop(0)
        counters.joined(one)
        batch.joined.append(one)
        if not lines[first]:
            del lines[first]
    return batch.joined


class Counters:
    """Service each delta has had, in weighted tokens: 1 for one read, 2 for one written.

    A delta whose queue was empty and fills again is lifted to the smallest counter among those that wait: idle time earns
    no credit. `weights` divide the charge (2.0: entitled to twice the service).
    """

    def __init__(self, weights: Mapping[str | None, float] | None = None) -> None:
        self.weights = dict(weights or {})
        self._spent: dict[str | None, float] = {}

    def of(self, delta: str | None) -> float:
        return self._spent.get(delta, 0.0)

    def arrived(self, delta: str | None, waiting: Iterable[str | None]) -> None:
        """Call when a request for `delta` comes and none of it waited; `waiting` are the deltas that have requests."""
        others = [self.of(d) for d in waiting if d != delta]
        if others:
            self._spent[delta] = max(self.of(delta), min(others))

    def joined(self, one: Waiting) -> None:
        """Charge for the prompt."""
        self._charge(one.delta, float(one.prompt))

    def wrote(self, delta: str | None, tokens: int = 1) -> None:
        """Charge for generated tokens."""
        self._charge(delta, 2.0 * tokens)

    def _charge(self, delta: str | None, amount: float) -> None:
        self._spent[delta] = self.of(delta) + amount / self.weights.get(delta, 1.0)


class EarlyAbort:
    """Under overload, give up at once on what would be late anyway and serve the newest, who can still be on time.

    Args:
        target: seconds to the first token that count as on time (6 in the paper's runs).
        margin: seconds a prompt takes to read.
    """

    def __init__(self, target: float = 6.0, margin: float = 0.5) -> None:
        self.target, self.margin = target, margin
        self.rate, self.size = 0, 1

    def turn(
        self, queue: Sequence[Waiting], now: float, arrived: int, admitted: int
    ) -> tuple[list[Waiting], list[Waiting]]:
        """The queue in the order it should be served, and the requests to turn away.

        `arrived` came and `admitted` joined since the last turn; both are smoothed (0.7 new, 0.3 old).
        """
        self.rate = int(0.7 * arrived + 0.3 * self.rate)
        self.size = max(int(0.7 * admitted + 0.3 * self.size), 1)
        late = [w for w in queue if now - w.arrived + self.margin > self.target]
        kept = [w for w in queue if now - w.arrived + self.margin <= self.target]
        return sorted(kept, key=lambda w: w.arrived, reverse=self.rate >= self.size), late


def attainment(first_tokens: Sequence[float | None], target: float = 6.0) -> float:
    """Share of requests whose first token came within `target` seconds; None is one that never came."""
    return sum(t is not None and t < target for t in first_tokens) / max(1, len(first_tokens))


def satisfaction(first_tokens: Sequence[float | None], target: float = 6.0) -> float:
    """Mean of max(0, 1 - (t / target)^2)."""
    return sum(max(0.0, 1 - (t / target) ** 2) for t in first_tokens if t is not None) / max(1, len(first_tokens))
