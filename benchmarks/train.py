# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning through Tunesmith and through its peers, in turn, on the same rows in the same order.

    python benchmarks/train.py                          every row and both growth curves, a table
    python benchmarks/train.py --rows lora-packed,full  some of them
    python benchmarks/train.py --out FILE --json        rows {work, ours, peer, peers, speed_ratio, memory_ratio, ...}
    python benchmarks/train.py --quick                  see that it works

Ours goes through `tunesmith.tune`. The peers are PEFT with the transformers Trainer, TRL's SFTTrainer (the faster one is
the row's peer), and a plain torch loop where neither has the method; they are in `train_peers.py`. Both sides compute in
the same number format, with the same optimiser, learning rate, batches and order. Repeat i uses seed i on both sides for
the order of the rows and for the first values of what trains; these are drawn from the same distribution, not equal.
Full fine-tuning is two rows, as a model in bf16 throughout is another thing: at small rates most of its steps round to
nothing. In one both sides train fp32 numbers and multiply in bf16, in the other all that trains is bf16.

Speed is counted from the end of the first step, which allocates, to the end of the last, tokens or examples of the data
(padding does not count). `cpu_rate` is the same over seconds of processor time, for machines that do other work as well.
Memory is the peak resident size of the process while it trains. `final_loss` is the mean over the last fifth of the
steps; a row's losses are the same when the median gap of the paired runs is at most the spread of the peer's own final
losses over the seeds, or one per cent of the loss if that is more. `share` is the arithmetic that the work needs, counted
by formula (`tunesmith plan`), over the fastest matrix product measured on this machine in the same format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
from measure import Goal, Result

TARGETS = "re:(_expand_conv|_project_conv|_conv_head)$"  # the 1x1 convolutions: what PEFT can adapt as well
LOSS = Goal("loss_same", at_least=1)


@dataclass(frozen=True)
class Work:
    """One row: what is trained on what, which peers do the same, and the goals. `batch` and `rows` count examples."""

    name: str
    about: str
    model: str
    data: str
    method: str
    batch: int
    rows: int
    lr: float
    peers: tuple[str, ...]
    unit: str = "tokens"
    epochs: int = 1
    length: int = 1024
    goals: tuple[Goal, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def quick(self) -> Work:
        length = 48 if self.data == "text" else self.length
        return dataclasses.replace(self, batch=2, rows=6, length=length, epochs=min(self.epochs, 3))


def goals(speed: float, memory: float | None = None) -> tuple[Goal, ...]:
    bounds = [Goal("speed_ratio", at_least=speed)]
    if memory is not None:
        bounds.append(Goal("memory_ratio", at_most=memory))
    return (*bounds, LOSS)


LM, BOTH = "smollm2-135m-instruct", ("trainer", "trl")
WORKS = {
    w.name: w
    for w in (
        Work("lora-packed", "LoRA r=8 all linear, SmolLM2-135M, 4x256, every token supervised", LM, "text",
             "lora:rank=8,alpha=16", 4, 32, 5e-4, BOTH, length=256, goals=goals(2.5, 0.6)),
        Work("lora-gsm8k", "LoRA r=8 all linear, SmolLM2-135M, GSM8K answers only, real lengths, batch 16", LM, "gsm8k",
             "lora:rank=8,alpha=16", 16, 80, 5e-4, BOTH, unit="examples", goals=goals(6.0, 0.2)),
        Work("full", "full fine-tuning, SmolLM2-135M, 4x256", LM, "text", "full", 4, 24, 2e-5, ("trainer",), length=256,
             goals=goals(1.8)),
        Work("full-half", "the same, all that trains and its moments in bf16", LM, "text", "full", 4, 24, 2e-5,
             ("trainer-half",), length=256, goals=goals(1.8), extra={"state": "bf16"}),
        Work("minilm", "LoRA r=8 all linear and a head, MiniLM-L6, Banking77 16-shot, batch 32", "minilm-l6", "banking",
             "lora:rank=8,alpha=16", 32, 1216, 1e-3, ("trainer",), unit="examples", length=128, goals=goals(2.0)),
        Work("conv-lora", "LoRA r=8 on 1x1 convolutions and a head, EfficientNet-Lite0, batch 64 at 96x96",
             "efficientnet-lite0", "cifar", f'lora:rank=8,alpha=16,targets="{TARGETS}"', 64, 640, 1e-3, ("trainer",),
             unit="examples", goals=goals(1.3)),
        Work("conv-ssf", "SSF and a head, EfficientNet-Lite0, batch 64 at 96x96", "efficientnet-lite0", "cifar",
             "ssf:start=identity", 64, 640, 1e-3, ("loop",), unit="examples", goals=goals(1.3)),
        Work("head", "a head on frozen EfficientNet-Lite0, batch 64 at 96x96, 10 epochs", "efficientnet-lite0", "cifar",
             "head:classes=10", 64, 640, 1e-3, ("trainer",), unit="examples", epochs=10, goals=goals(5.0)),
    )
}  # fmt: skip
LENGTHS, RANKS = (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32, 64, 128, 256)
CURVES = {"growth-length": LENGTHS, "growth-rank": RANKS}
ROWS = (*WORKS, *CURVES)


def point(curve: str, at: int, quick: bool) -> Work:
    """One point of a growth curve: steps of 2,048 tokens, or of one row where a row is longer."""
    length, rank = (at, 8) if curve == "growth-length" else (256, at)
    batch = max(1, (512 if quick else 2048) // length)
    return dataclasses.replace(
        WORKS["lora-packed"], name=f"{curve}-{at}", about=f"LoRA r={rank}, {batch}x{length}", length=length, batch=batch,
        method=f"lora:rank={rank},alpha={2 * rank}", rows=batch * (2 if quick else 4), peers=("trainer",), goals=(),
    )  # fmt: skip


# Workers: each in a process of its own


def settings(work: Work, seed: int, dtype: str) -> dict[str, Any]:
    """What `tune` and `plan` are told beside base, data and method."""
    return {
        "epochs": float(work.epochs), "batch_size": work.batch, "lr": work.lr, "schedule": "constant", "warmup": 0.0,
        "precision": dtype, "seed": seed, "max_length": work.length, "overflow": "truncate", **work.extra,
    }  # fmt: skip


def opened(work: Work, skeleton: bool, dtype: str) -> Any:
    """The base, for pictures of 96 pixels; a skeleton has no weights."""
    import torch

    import tunesmith as ts
    from tunesmith.models.skeleton import skeleton as outline

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype] if work.model == LM else torch.float32
    base = outline(work.model, dtype=kind) if skeleton else ts.load(work.model, dtype=kind)
    if work.data == "cifar":
        base.source["image"]["size"] = 96
    return base


def prepare(job: Result) -> Result:
    """Write a row's data for ours, the same rows encoded for the peers, and the order of both."""
    import train_data

    from tunesmith.data import read
    from tunesmith.train.config import TrainConfig
    from tunesmith.train.prepare import prepare as prepared

    work, seed, folder = Work(**job["work"]), job["seed"], Path(job["folder"])
    base = opened(work, True, job["dtype"])
    path = train_data.write(work.data, folder, work.rows, work.length, seed)
    config = TrainConfig.build(settings(work, seed, job["dtype"]))
    ready = prepared(base, read(path), config)
    task, head = ready.task, ready.head or {}
    order = [task.plan(work.batch, seed, epoch) for epoch in range(work.epochs)]
    flat = [i for epoch in order for batch in epoch for i in batch]
    units = {"tokens": sum(task.tokens(b) for b in order[0]), "examples": len(task)}[work.unit]
    train_data.write_encoded(task, folder, flat, base.tokenizer.pad_token_id if base.tokenizer else 0)
    if job.get("weights") and not Path(job["weights"]).exists():
        import tunesmith as ts

        ts.load(work.model, dtype="bfloat16").model.save_pretrained(job["weights"])
    first = order[0][0]
    return {
        "path": str(path), "units": units * work.epochs, "classes": head.get("classes"),
        "first_units": task.tokens(first) if work.unit == "tokens" else len(first),
    }  # fmt: skip


def planned(job: Result) -> Result:
    """What `tunesmith.plan` says of a row before it runs."""
    from tunesmith.train.plan import plan

    work = Work(**job["work"])
    made = plan(opened(work, True, job["dtype"]), job["path"], method=work.method, **settings(work, 0, job["dtype"]))
    return {"peak_memory": made.memory["train"], "minutes": made.minutes, "flops": made.flops}


def ours(job: Result) -> Result:
    import tempfile

    import train_peers

    import tunesmith as ts

    work = Work(**job["work"])
    base = opened(work, False, job["dtype"])
    marks = train_peers.Marks()
    with tempfile.TemporaryDirectory(dir=job["folder"]) as out, marks:
        run = ts.tune(
            base, job["path"], method=work.method, out=f"{out}/run", receipt=False, progress=False,
            **settings(work, job["seed"], job["dtype"]),
        )  # fmt: skip
    done = run.trained
    return marks.result(done.losses, done.peak_memory_bytes, job) | {"seconds": done.seconds}


def peer(job: Result) -> Result:
    import train_peers

    return train_peers.run(job, Work(**job["work"]))


def number_format(job: Result) -> Result:
    from tunesmith.models.precision import cpu_has_bf16

    return {"dtype": "bf16" if cpu_has_bf16() else "fp32"}


DO = {"prepare": prepare, "plan": planned, "ours": ours, "peer": peer, "dtype": number_format}


# Rows


@dataclass(frozen=True)
class Session:
    """What all rows of one call share."""

    folder: Path
    dtype: str
    threads: int
    repeats: int
    limit: float

    def start(self, do: str, work: Work, **more: Any) -> Result:
        plain = {**dataclasses.asdict(work), "goals": ()}
        weights = str(self.folder / "weights") if work.model == LM else None
        job = {"do": do, "work": plain, "dtype": self.dtype, "threads": self.threads, "weights": weights, **more}
        return measure.worker(__file__, job, threads=self.threads)

    def compare(self, work: Work) -> Result:
        """One row: data for each seed, the plan, then all sides in turn."""
        measure.say(f"{work.name}: {work.about}")
        made = []
        for seed in range(self.repeats):
            place = self.folder / f"{work.name}-{seed}"
            place.mkdir()
            made.append({"folder": str(place), **self.start("prepare", work, seed=seed, folder=str(place))})
        plan = self.start("plan", work, path=made[0]["path"])

        def run(side: str, i: int) -> Result:
            return self.start("ours" if side == "ours" else "peer", work, peer=side, seed=i, **made[i])

        runs = measure.in_turn(("ours", *work.peers), run, self.repeats, say=measure.say)
        for found in runs.values():
            for r in found:
                r["share"] = plan["flops"] * r["of_run"] * r["rate"] / self.limit if plan["flops"] else None
        return summary(work, runs, plan)


def summary(work: Work, runs: dict[str, list[Result]], plan: Result) -> Result:
    """Medians, ratios to the fastest peer, the comparison of losses, and how good the plan was."""
    sides = {s: measure.medians(r) for s, r in runs.items()}
    best = max(work.peers, key=lambda p: sides[p]["rate"])
    mine, other = sides["ours"], sides[best]
    finals = [r["final_loss"] for r in runs[best]]
    gap = statistics.median(a["final_loss"] - b for a, b in zip(runs["ours"], finals, strict=True))
    noise = max(max(finals) - min(finals), 0.01 * abs(statistics.median(finals)))
    row = {
        "work": work.name, "about": work.about, "unit": work.unit, "ours": mine, "peer": {"name": best, **other},
        "peers": {p: sides[p] for p in work.peers}, "speed_ratio": mine["rate"] / other["rate"],
        "cpu_speed_ratio": mine["cpu_rate"] / other["cpu_rate"], "memory_ratio": mine["peak_memory"] / other["peak_memory"],
        "loss_gap": gap, "loss_noise": noise, "loss_same": int(abs(gap) <= noise),
        "plan": {
            **plan, "peak_error": plan["peak_memory"] / mine["peak_memory"] - 1,
            "minutes_error": None if plan["minutes"] is None else plan["minutes"] * 60 / mine["seconds"] - 1,
        },
        "runs": runs,
    }  # fmt: skip
    return measure.judged(row, work.goals)


def growth(session: Session, curve: str, quick: bool, picture: Path | None) -> Result:
    """Tokens per second at every point of a curve, ours and the peer's."""
    values = [v for v in CURVES[curve] if not quick or v in (128, 512, 1, 64)]
    points = []
    for at in values:
        row = session.compare(point(curve, at, quick))
        both = {s: {k: row[s][k] for k in ("rate", "cpu_rate", "peak_memory", "share")} for s in ("ours", "peer")}
        points.append({"at": at, **both, "speed_ratio": row["speed_ratio"], "memory_ratio": row["memory_ratio"]})
    if picture is not None:
        draw(curve, points, picture)
    return {"work": curve, "unit": "tokens", "points": points, "picture": picture.name if picture else None}


def draw(curve: str, points: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    what = {"growth-length": "tokens in a row", "growth-rank": "rank"}[curve]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, label, scale in (
        (axes[0], "rate", "tokens per second", 1.0), (axes[1], "peak_memory", "peak memory, GiB", 2.0**30),
    ):  # fmt: skip
        for side, colour, name in (("ours", "#1f5fa8", "Tunesmith"), ("peer", "#b5541c", "PEFT + Trainer")):
            axis.plot([p["at"] for p in points], [p[side][key] / scale for p in points], "o-", color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([p["at"] for p in points], [str(p["at"]) for p in points])
        axis.set_ylim(bottom=0)
        axis.set_xlabel(what)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle("LoRA on all linear layers of SmolLM2-135M")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Printing


def table(rows: list[Result], limit: float, dtype: str) -> str:
    lines = [f"arithmetic limit of this machine in {dtype}: {limit / 1e9:.0f} GFLOP/s"]
    for r in rows:
        if "points" in r:
            lines.append(f"\n{r['work']}")
            lines += [
                f"  {p['at']:5}  ours {p['ours']['rate']:8.1f}   peer {p['peer']['rate']:8.1f} tokens/s   "
                f"speed x{p['speed_ratio']:.2f}  memory x{p['memory_ratio']:.2f}"
                for p in r["points"]
            ]
            continue
        lines.append(f"\n{r['work']}: {r['about']}")
        for side in ("ours", *r["peers"]):
            s = r["ours"] if side == "ours" else r["peers"][side]
            share = "" if s.get("share") is None else f"  {s['share']:6.1%} of the limit"
            lines.append(
                f"  {side:13} {s['rate']:9.2f} {r['unit']}/s  {s['peak_memory'] / 2**20:7.0f} MiB  "
                f"loss {s['final_loss']:.4f}{share}"
            )
        p = r["plan"]
        minutes = "time not known" if p["minutes_error"] is None else f"minutes {p['minutes_error']:+.0%}"
        lines.append(
            f"  speed x{r['speed_ratio']:.2f} (processor time x{r['cpu_speed_ratio']:.2f})  memory x{r['memory_ratio']:.2f}  "
            f"loss gap {r['loss_gap']:+.4f} (noise {r['loss_noise']:.4f})  plan: peak {p['peak_error']:+.0%}, {minutes}"
        )
        lines.append(f"  {'met' if r['met'] else 'NOT met: ' + '; '.join(r['missed'])}")
    return "\n".join(lines)


def main() -> None:
    parser = measure.options(__doc__, ROWS)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")
    args: argparse.Namespace = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        measure.answer(DO[job["do"]](job))
        return
    names = measure.chosen(parser, args.rows, ROWS)
    about = measure.facts(("transformers", "peft", "trl", "accelerate"))
    dtype = args.dtype
    if dtype == "auto":
        dtype = measure.worker(__file__, {"do": "dtype"}, threads=1)["dtype"]
    limit = measure.matrix_rate(dtype, args.threads)
    results = measure.Results(args, {**about, "dtype": dtype, "limit_flops": limit})
    with tempfile.TemporaryDirectory(prefix="tunesmith-train-") as place:
        session = Session(Path(place), dtype, args.threads, 1 if args.quick else args.repeats, limit)
        for name in names:
            if name in WORKS:
                results.add(session.compare(WORKS[name].quick() if args.quick else WORKS[name]))
            else:
                picture = args.out.with_name(f"{args.out.stem}-{name}.png") if args.out and not args.quick else None
                results.add(growth(dataclasses.replace(session, repeats=1), name, args.quick, picture))
    results.finish(table(results.rows, limit, dtype))
    sys.exit(0)


if __name__ == "__main__":
    main()
