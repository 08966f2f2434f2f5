# SPDX-License-Identifier: Apache-2.0
"""Serving many deltas from one base: Tunesmith's engine against PEFT and transformers, in one run.

    python benchmarks/serve.py --json --out benchmarks/serve.json --picture docs/serve-load.svg      everything
    python benchmarks/serve.py --rows decode,single                                                   some rows
    python benchmarks/serve.py --quick                          a smoke of every row: tiny sizes, no result is written

Rows {work, ours, peer, speed_ratio, memory_ratio, goal, met}; ratios are ours over the peer's for speed (above 1 is
faster) and for memory (below 1 is leaner), of medians over the repeats. `met` is None where there is no goal.

decode      32 rows, 32 distinct LoRA (r=8 on q, k, v, o), tokens/s of decoding; peer: PEFT `adapter_names`
own-base    the same against this engine without a delta
base        this engine without a delta; peer: the transformers model alone, as PEFT's base runs
single      five plain requests (`serve_prompts.py`), one at a time under one delta that changes the model a little, the
            reading of the prompt included; peer: transformers generate with the delta merged. Ours guesses, as it does by
            default; the row also has ours without guesses and the peer with its prompt lookup
library     2,000 registered and 64 in use, every request waiting from the start, cold reads included; against 5 and 5
register    2,000 deltas from their headers; peer: PEFT load_adapter of 32
activation  making a cold delta ready, 64 of them; flat: the same with 100 and with 10,000 registered
load        requests arriving at shares of the engine's own rate: first token p50 / p95, attainment of early abort
            against first come first served; `failures` counts requests that ended in any other error

Each side is a process of its own, sides in turn, with all cores. Speeds of `decode` are those of the steps after the
prompts are read and a few tokens are written. Ranks of `library`, `load`: 4, 8, 16, 32 in turn, as in the study of the
trace. Model: smollm2-135m-instruct in bf16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import Goal, Result, Results, chosen, facts, in_turn, judged, medians, options, say, worker

SIDES = Path(__file__).with_name("serve_sides.py")
ROWS = ("decode", "own-base", "base", "single", "library", "register", "activation", "load")
LOOKUP = 5  # guesses of the peer's prompt lookup at a time, as many as ours in a step
DECODE = ("decode", "own-base", "base")
GOALS: dict[str, list[Goal]] = {
    "decode": [Goal("speed_ratio", at_least=10.0)],
    "own-base": [Goal("speed_ratio", at_least=0.8)],
    "base": [],
    "single": [Goal("speed_ratio", at_least=3.0)],
    "library": [Goal("speed_ratio", at_least=0.9)],
    "register": [Goal("seconds", at_most=10.0)],
    "activation": [Goal("cold_ms", at_most=50.0), Goal("flatness", at_most=1.25)],
    "load": [Goal("failures", at_most=0)],
}
MANY: dict[str, Any] = {"rows": 32, "prompt": 64, "warm": 4, "steps": 48}
FULL: dict[str, Any] = {
    "decode": MANY, "single": {"new": 96, "turns": 5},
    "trace": {"requests": 192, "registered": 2000, "used": 64, "few": 5, "seed": 0},
    "register": {"deltas": 2000, "real": 64, "known": 100, "all": 10000, "peer": 32},
    "load": {"shares": [0.5, 0.8, 1.0, 1.5, 2.0], "seconds": 12.0, "target": 2.0, "used": 16, "seed": 0},
}  # fmt: skip
QUICK: dict[str, Any] = {
    "decode": {"rows": 4, "prompt": 8, "warm": 1, "steps": 3}, "single": {"new": 6, "turns": 1},
    "trace": {"requests": 8, "registered": 24, "used": 4, "few": 2, "seed": 0},
    "register": {"deltas": 20, "real": 2, "known": 5, "all": 40, "peer": 2},
    "load": {"shares": [0.5, 2.0], "seconds": 2.0, "target": 1.0, "used": 2, "seed": 0},
}  # fmt: skip


class Bench:
    """The rows asked for, at the sizes of a full or a quick run."""

    def __init__(self, args: argparse.Namespace, place: Path) -> None:
        self.repeats, self.place = args.repeats, place
        self.sizes = QUICK if args.quick else FULL
        self.common = {"model": args.model, "dtype": args.dtype, "threads": args.threads}
        self.runs: dict[str, Any] = {}

    def run(self, job: str, side: str, **more: Any) -> Result:
        threads = self.common["threads"]
        return worker(SIDES, {**self.common, "job": job, "side": side, **more}, threads=threads)

    def turns(self, name: str, jobs: Mapping[str, tuple[str, str, dict[str, Any]]]) -> dict[str, Result]:
        """Medians of the jobs `{label: (job, side, settings)}`, run in turn; every run is kept for the file."""
        say(name)

        def one(label: str, _: int) -> Result:
            job, side, more = jobs[label]
            return self.run(job, side, **more)

        runs = in_turn(tuple(jobs), one, self.repeats, say=say)
        self.runs[name] = {k: [{a: b for a, b in r.items() if a != "answers"} for r in rs] for k, rs in runs.items()}
        if "loras" in runs and "peft" in runs:
            self.runs[name]["agreement"] = agreement(runs["loras"][0]["answers"], runs["peft"][0]["answers"])
        return {label: medians(rs) for label, rs in runs.items()}

    def stock(self, name: str, count: int, ranks: list[int], fillers: int = 0, size: float = 0.02) -> str:
        folder = self.place / name
        if not folder.is_dir():
            folder.mkdir()
            self.run("stock", "ours", folder=str(folder), count=count, ranks=ranks, fillers=fillers, size=size)
        return str(folder)

    def decode(self, wanted: list[str]) -> list[Result]:
        size = self.sizes["decode"]
        loras = {**size, "folder": self.stock("alike", size["rows"], [8]), "deltas": True}
        plain = {**size, "folder": "", "deltas": False}
        jobs = {"loras": ("decode", "ours", loras)}
        jobs |= {"base": ("decode", "ours", plain)} if {"own-base", "base"} & set(wanted) else {}
        jobs |= {"peft": ("decode", "peer", loras)} if "decode" in wanted else {}
        jobs |= {"transformers": ("decode", "peer", plain)} if "base" in wanted else {}
        m = self.turns("decode", jobs)
        n = size["rows"]
        works = {
            "decode": (f"decode, {n} rows of {n} LoRA r=8 qkvo; peer PEFT adapter_names", "loras", "peft"),
            "own-base": (f"decode, {n} rows of {n} LoRA r=8 qkvo; against our own base", "loras", "base"),
            "base": (f"decode, {n} rows without a delta; peer transformers", "base", "transformers"),
        }
        runs = self.runs["decode"]
        return [
            {**row(w, what, m[a], m[b]), "runs": {k: runs[k] for k in (a, b)}}
            | ({"agreement": runs["agreement"]} if w == "decode" else {})
            for w, (what, a, b) in works.items()
            if w in wanted
        ]

    def single(self) -> Result:
        more = {**self.sizes["single"], "folder": self.stock("slight", 1, [8], size=0.002)}
        sides = {"ours": ("ours", {"guess": None}), "peer": ("peer", {"lookup": 0}), "ours, no guesses": ("ours", {"guess": 0}),
                 "peer, prompt lookup": ("peer", {"lookup": LOOKUP})}  # fmt: skip
        m = self.turns("single", {k: ("single", side, {**more, **how}) for k, (side, how) in sides.items()})
        found = row("single", "single stream, one delta; peer transformers generate, merged", m["ours"], m["peer"])
        return {**found, "others": {k: m[k] for k in list(sides)[2:]}}

    def library(self) -> Result:
        size = self.sizes["trace"]
        folder = self.stock("mixed", size["used"], [4, 8, 16, 32], size["registered"] - size["used"])
        few = {**size, "folder": folder, "registered": size["few"], "used": size["few"]}
        m = self.turns(
            "library", {"many": ("trace", "ours", {**size, "folder": folder}), "few": ("trace", "ours", few)}
        )
        return row("library", f"trace, {size['registered']} registered, {size['used']} in use; against {size['few']}",
                   m["many"], m["few"])  # fmt: skip

    def register(self) -> Result:
        size = self.sizes["register"]
        folder = self.stock("many", size["real"], [8], size["deltas"] - size["real"])
        peer = {"folder": self.stock("alike", self.sizes["decode"]["rows"], [8]), "count": size["peer"]}
        ours = {"folder": folder, "few": size["known"]}
        m = self.turns("register", {"ours": ("register", "ours", ours), "peer": ("register", "peer", peer)})
        what = f"registering {size['deltas']} deltas; peer PEFT load_adapter of {size['peer']}"
        return row("register", what, m["ours"], m["peer"], "per_second")

    def activation(self) -> Result:
        size = self.sizes["register"]
        folder = self.stock("most", size["real"], [8], size["all"] - size["real"])
        peer = {"folder": self.stock("alike", self.sizes["decode"]["rows"], [8]), "count": size["peer"]}
        ours = {"folder": folder, "few": size["known"]}
        m = self.turns("activation", {"ours": ("register", "ours", ours), "peer": ("register", "peer", peer)})
        for side in m.values():
            side["per_second"] = 1000 / side["cold_ms"]
        what = f"cold activation, {size['all']} registered; peer PEFT's last load_adapter of {size['peer']}"
        return row("activation", what, m["ours"], m["peer"], "per_second")

    def load(self) -> Result:
        size = self.sizes["load"]
        folder = self.stock("mixed-few", size["used"], [4, 8, 16, 32])
        full = {"folder": folder, "requests": 96 if self.sizes is FULL else 4, "registered": size["used"], **{
            k: size[k] for k in ("used", "seed")
        }}  # fmt: skip
        capacity = self.run("trace", "ours", **full)["requests_per_second"]
        points: dict[str, list[dict[str, Any]]] = {"fcfs": [], "abort": []}
        for share in size["shares"]:
            more = {k: size[k] for k in ("seconds", "target", "used", "seed")}
            more |= {"folder": folder, "rate": share * capacity}
            jobs = {p: ("load", "ours", {**more, "policy": p}) for p in points}
            for policy, found in self.turns(f"load x{share}", jobs).items():
                points[policy].append({"share": share, **found})
        self.runs["load"] = {
            "capacity_requests_per_second": capacity,
            "target_seconds": size["target"],
            "points": points,
        }
        ours, peer = ({**points[p][-1], "failures": sum(x["failures"] for x in points[p])} for p in ("abort", "fcfs"))
        ours["points"], peer["points"] = points["abort"], points["fcfs"]
        return row("load", f"arrivals at {size['shares'][-1]} times what is served; early abort against FCFS",
                   ours, peer, "attainment")  # fmt: skip


def row(name: str, work: str, ours: Result, peer: Result, key: str = "tokens_per_second") -> Result:
    """One row, held against its goals: on the ratios, or on our own numbers."""
    found: Result = {
        "work": work, "row": name, "ours": ours, "peer": peer,
        "speed_ratio": round(ours[key] / peer[key], 3) if peer[key] else None,
        "memory_ratio": round(ours["peak_memory"] / peer["peak_memory"], 3),
    }  # fmt: skip
    verdict = judged({**ours, **found}, GOALS[name])
    return {**found, "goal": verdict["goals"], "met": verdict["met"] if GOALS[name] else None}


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of first tokens on which two sides agree, counted up to each row's first difference (bf16 rounds apart)."""
    same = 0
    for x, y in zip(a, b, strict=True):
        for s, t in zip(x, y, strict=True):
            if s != t:
                break
            same += 1
    return same / max(1, sum(len(x) for x in a))


def picture(load: Mapping[str, Any]) -> str:
    """Attainment and first-token times against the arrival rate, as SVG."""
    import io

    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "serve", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        for policy, name, colour in (
            ("fcfs", "first come first served", "#2c5f8a"),
            ("abort", "early abort", "#b4462c"),
        ):
            points = load["points"][policy]
            x = [p["share"] for p in points]
            left.plot(x, [p["attainment"] for p in points], "o-", color=colour, label=name)
            right.plot(x, [p["p50"] for p in points], "o-", color=colour, label=f"{name}, p50")
            right.plot(x, [p["p95"] for p in points], "x--", color=colour, label=f"{name}, p95")
        left.set_ylabel(f"share with a first token within {load['target_seconds']:g} s")
        left.set_ylim(0, 1.05)
        right.set_ylabel("seconds to the first token (of those served)")
        for axes in (left, right):
            axes.set_xlabel(f"arrivals / {load['capacity_requests_per_second']:.1f} requests a second")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main() -> None:
    parser = options(__doc__, ROWS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dir", help="where deltas are written: 2 GB")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the load row here (SVG)")
    args = parser.parse_args()
    wanted = chosen(parser, args.rows, ROWS)
    args.repeats = 1 if args.quick else args.repeats
    with tempfile.TemporaryDirectory(prefix="tunesmith-serve-", dir=args.dir) as folder:
        bench = Bench(args, Path(folder))
        results = Results(args, facts(("transformers", "peft", "tunesmith")))
        if set(DECODE) & set(wanted):
            results.add(*bench.decode(wanted))
        for name in wanted:
            if name not in DECODE:
                results.add({**getattr(bench, name)(), "runs": bench.runs[name]})
    if args.picture and "load" in bench.runs and not args.quick:
        args.picture.write_text(picture(bench.runs["load"]))
    lines = []
    for r in results.rows:
        verdict = {None: "no goal", True: "met", False: "NOT met"}[r["met"]]
        lines.append(f"{r['work']:76}  speed x{r['speed_ratio'] or 0:.2f}  memory x{r['memory_ratio']:.2f}  "
                     f"{', '.join(r['goal'])}  {verdict}")  # fmt: skip
    results.finish("\n".join(lines))


if __name__ == "__main__":
    main()
