# SPDX-License-Identifier: Apache-2.0
"""Study 069: does serving many adapters unmerged in one batch (S-LoRA) pay, and does its cost stay flat in their number?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from .trace import Lengths

# arm: (server, adapters)
ARMS: dict[str, tuple[str, int]] = {
    "together, 64": ("together", 64), "one at a time, 64": ("one", 64), "merged, 64": ("merged", 64),
    "padded, 64": ("padded", 64), "together, 4": ("together", 4), "together, 1": ("together", 1), "merged, 1": ("merged", 1),
}  # fmt: skip

RULE = """\
Throughput is tokens written per processor second of one thread, over the whole trace; three seeds draw the trace. All of
the following on every seed.
1. "together, 64" has at least twice the throughput of "one at a time, 64" and of "merged, 64".
2. "together, 64" has at least 0.8 times the throughput of "together, 4".
3. "together, 64" has a larger mean batch than "padded, 64", which has as many cells in all.
"reproduced" if all three hold; "not reproduced" if on every seed "together, 64" has at most the throughput of "one at a
time, 64"; "inconclusive" otherwise. Whether "merged, 1" beats "together, 1", as the paper says it does, is reported.
"""


@dataclass(frozen=True)
class Sizes:
    """The trace, the ranks of the deltas in turn, cells of the pool, rows of a batch, slots tried for the padded buffer."""

    lengths: tuple[int, float, tuple[int, int], tuple[int, int]]
    ranks: tuple[int, ...]
    cells: int
    requests: int
    slots: tuple[int, ...]
    shrink: int

    def shape(self) -> Lengths:
        from .trace import Lengths

        return Lengths(*self.lengths)


FULL = Sizes((80, 40.0, (8, 65), (8, 33)), (4, 8, 16, 32), 16384, 32, (4, 8, 12, 16, 20), 1)
SMOKE = Sizes((8, 400.0, (3, 6), (2, 5)), (1, 2, 4), 1600, 6, (1, 2, 3), 16)


def run(ctx: Context) -> Raw:
    """Every server on the trace of every seed, and a proof in fp32 that the batch writes what each request writes alone."""
    import os

    from . import trace

    sizes = SMOKE if ctx.smoke else FULL
    counts = {arm: max(1, n // sizes.shrink) for arm, (_, n) in ARMS.items()}
    raw: Raw = {"arms": {arm: [] for arm in ARMS}, "load": os.getloadavg()[0]}
    raw["exact"] = ctx.cell({"exact": True}, lambda: exact(trace.toy() if ctx.smoke else trace.real("float32"), sizes))
    held: dict[str, Any] = {}
    total, done = len(ARMS) * len(ctx.seeds), 0
    for arm, (server, _) in ARMS.items():
        for seed in ctx.seeds:
            n = counts[arm]

            def one(server: str = server, n: int = n, seed: int = seed) -> dict[str, Any]:
                if "base" not in held:
                    held["base"] = trace.toy() if ctx.smoke else trace.real()
                    ranks = tuple(sizes.ranks[i % len(sizes.ranks)] for i in range(max(counts.values())))
                    held["deltas"] = trace.deltas(held["base"], ranks)
                return serve(held, server, n, sizes, seed)

            row = ctx.cell({"arm": arm, "seed": seed}, one)
            raw["arms"][arm].append({"seed": seed, **row})
            done += 1
            ctx.progress(done, total)
            ctx.log(f"{arm}, seed {seed}: {row['metric']:.1f} tokens/s, batch {row['batch']:.1f}")
    return raw


def serve(held: dict[str, Any], server: str, adapters: int, sizes: Sizes, seed: int) -> dict[str, Any]:
    """One server on one trace. Making it (reading deltas, padding, checking the decoder) is not timed; merging is."""
    from dataclasses import replace

    from tunesmith.serve.engine import Engine

    from . import servers, trace

    base, deltas = held["base"], held["deltas"][:adapters]
    vocabulary = int(base.model.config.vocab_size)
    asks = trace.asks(adapters, sizes.shape(), vocabulary, seed)
    options: dict[str, Any] = {"cells": sizes.cells, "requests": sizes.requests}
    if server == "merged":
        merged = held.setdefault("merged", servers.Merged(base, held["deltas"]))
        engine = Engine(merged.own, servers.library_of(merged.own, []), **options)
        return servers.one_adapter_at_a_time(engine, asks, lambda a: None, merged.switch).summary()
    if server != "padded":
        engine = Engine(base, servers.library_of(base, deltas), **options)
        how = servers.all_at_once if server == "together" else servers.one_adapter_at_a_time
        return how(engine, asks, lambda a: f"d{a.adapter}").summary()
    library = servers.library_of(base, deltas)
    widest = max(deltas, key=lambda d: d.nbytes)
    probe = Engine(base, library, **options)
    probe.submit(servers.request(replace(asks[0], id="probe"), widest.name))
    slot = probe._cells[widest.digest]
    servers.padded(library, max(sizes.ranks))
    slots = servers.best_buffer(asks, sizes.cells, slot, sizes.requests, sizes.slots)
    engine = Engine(base, library, **{**options, "cells": sizes.cells - slots * slot})
    engine.limits = replace(engine.limits, resident=slots)
    return {**servers.all_at_once(engine, asks, lambda a: f"d{a.adapter}").summary(), "slots": slots}


def exact(base: Any, sizes: Sizes) -> dict[str, Any]:
    """How many greedy tokens differ between a mixed batch, one request at a time, and merged models, in fp32."""
    from tunesmith.serve.selftest import selftest

    from . import servers, trace

    library = servers.library_of(base, trace.deltas(base, sizes.ranks))
    asks = trace.asks(1, sizes.shape(), int(base.model.config.vocab_size), 99)[:4]
    proof = selftest(base, library, [a.prompt for a in asks], deltas=len(sizes.ranks), new=6)
    return {"tokens": proof.tokens, "alone differs": proof.alone_differs, "merged differs": proof.merged_differs}


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    rows = {arm: sorted(found, key=lambda r: r["seed"]) for arm, found in raw["arms"].items()}

    def ratios(a: str, b: str, what: str = "metric") -> list[float]:
        return [x[what] / y[what] for x, y in zip(rows[a], rows[b], strict=True)]

    pairs = {
        "together / one at a time": ratios("together, 64", "one at a time, 64"),
        "together / merged": ratios("together, 64", "merged, 64"),
        "64 adapters / 4": ratios("together, 64", "together, 4"),
        "batch, together / padded": ratios("together, 64", "padded, 64", "batch"),
        "one adapter, merged / together": ratios("merged, 1", "together, 1"),
        "together / padded": ratios("together, 64", "padded, 64"),
    }
    statistics: dict[str, Any] = {}
    for name, found in pairs.items():
        t = paired_t(found)
        statistics[name] = {"mean": t.mean, "low": t.low, "high": t.high, "n": t.n}
    statistics.update({f"{name}, worst seed": min(found) for name, found in pairs.items()})
    statistics["first token, together, 64, seconds"] = mean(r["first token"] for r in rows["together, 64"])
    statistics["first token, one at a time, 64, seconds"] = mean(r["first token"] for r in rows["one at a time, 64"])
    statistics["tokens that differ in fp32"] = raw["exact"]["alone differs"] + raw["exact"]["merged differs"]
    first = min(pairs["together / one at a time"] + pairs["together / merged"]) >= 2
    second = min(pairs["64 adapters / 4"]) >= 0.8
    third = min(pairs["batch, together / padded"]) > 1
    fails = max(pairs["together / one at a time"]) <= 1
    reasons = [
        f"at 64 adapters {mean(pairs['together / one at a time']):.1f} times one at a time and "
        f"{mean(pairs['together / merged']):.1f} times merging ({'holds' if first else 'not at least 2 on every seed'})",
        f"{mean(pairs['64 adapters / 4']):.2f} of the throughput at 4 adapters "
        f"({'holds' if second else 'not at least 0.8 on every seed'})",
        f"a batch {mean(pairs['batch, together / padded']):.2f} times that of a padded buffer "
        f"({'holds' if third else 'not larger on every seed'})",
        f"with one adapter merging has {mean(pairs['one adapter, merged / together']):.2f} times the throughput",
    ]
    label = "reproduced" if first and second and third else "not reproduced" if fails else "inconclusive"
    return Verdict(label, reasons, statistics)


STUDY = Study(
    id=69,
    slug="s-lora",
    paper="S-LoRA: Serving Thousands of Concurrent LoRA Adapters, arXiv 2311.03285",
    claim="One batch that mixes requests for adapters of different ranks, unmerged and with caches and adapters in one pool of "
    "memory, serves many times what adapter-by-adapter serving does, and hardly less with many adapters than with few.",
    verdict_rule=RULE,
    arms=tuple(ARMS),
    run=run,
    verdict=verdict,
    minutes=20,
    seeds=(0, 1, 2),
    smoke_seeds=(0, 1),
    deviations=(
        "Time is processor time of one thread, not wall time on a GPU, so that other work on the machine does not count; time "
        "in which a server would wait for the next request is skipped.",
        "All deltas are in memory and ready before the clock starts, in every server; merging is timed.",
        "One at a time: an adapter has the engine to itself until its requests are done, also those that come meanwhile.",
        "Merged: weights are rewritten in place from the base's, which is cheaper than merging and unmerging.",
        "Padded: factors of every delta are padded to rank 32 and lie in a buffer of so many slots as give this server the "
        "largest mean batch (by bookkeeping); the rest of the cells is its cache.",
        "16,384 cells and at most 32 rows: a delta of rank 8 takes as many cells as about 3 requests, since it is held in fp32 "
        "as it was read and in the base's precision as it is used.",
    ),
)
