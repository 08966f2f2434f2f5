# SPDX-License-Identifier: Apache-2.0
"""Study 035: do texts sampled from the contrast of two models show what was new in the fine-tuning data?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.study.spec import Context, Raw, Study, Verdict

if TYPE_CHECKING:
    from tunesmith.core.base import Base
    from tunesmith.core.delta import Delta

SAMPLING, STATIC, ITERATIVE = "sampling", "static", "iterative"
ARMS = (SAMPLING, STATIC, ITERATIVE)

RULE = """\
A text is novel if the rules find one of the five kinds in it; the novel share is that of the texts of one arm and seed, and
its domains are the kinds that it shows at least once.
"reproduced" if the mean novel share of static is at least twice that of sampling, the domains of iterative less those of
static are above 0 in mean with a 95% Student t interval above 0, and iterative shows at least 4 of 5 domains in mean.
"not reproduced" if the mean novel share of static is at or below that of sampling. "inconclusive" otherwise.
"""


@dataclass(frozen=True)
class Sizes:
    """Fine-tuning rows and their length, blocks that train, texts to generate and their length."""

    news: int
    novel: int
    length: int
    blocks: int
    epochs: int
    texts: int
    tokens: int


FULL = Sizes(600, 15, 24, 6, 2, 30, 14)
SMOKE = Sizes(12, 2, 8, 2, 1, 3, 4)
BATCH, LR, DISTILL_LR = 16, 2e-4, 5e-5


def loaded(ctx: Context) -> tuple[Base, list[str], list[str]]:
    """The base with news and code to draw from; in a smoke run a small random Llama that reads bytes."""
    from tunesmith.data import read

    if ctx.smoke:
        from tunesmith.study.worlds.language import toy_base

        base = toy_base()
        base.tokenizer = Letters()
        return base, [f"the market fell by {i} points today" for i in range(40)], ["def f(x): return x"]
    from tunesmith.models.open import load

    folder, snippets = ctx.data_folder("ag_news"), ctx.data_folder("mbpp")
    base = load("smollm2-135m-instruct", dtype="fp32", device="cpu")
    news = [r["text"] for r in read(str(folder / "train.jsonl.gz")).rows]  # type: ignore[operator]
    code = [r["messages"][-1]["content"] for r in read(str(snippets / "train.jsonl")).rows]  # type: ignore[operator]
    return base, news, code


class Letters:
    """A tokenizer of single characters for smoke runs: 64 ids."""

    bos_token_id, eos_token_id = 1, None
    all_special_ids = (1,)

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(ch) % 62 for ch in text]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(64 + i) for i in ids)


def top(base: Base, blocks: int) -> str:
    """Targets: everything in the last blocks."""
    count = sum(s.kind == "block" for s in base.sites.all())
    return "re:layers\\.(" + "|".join(str(i) for i in range(count - blocks, count)) + ")\\."


def tuned(base: Base, rows: list[list[int]], sizes: Sizes, seed: int) -> Delta:
    """All weights of the last blocks trained on the rows, next-token cross-entropy on every token."""
    import random

    import torch
    import torch.nn.functional as F

    from tunesmith.core import method as methods
    from tunesmith.core.delta import Delta

    method = methods.build("full", {"targets": top(base, sizes.blocks), "bias": False})
    delta = Delta.create(base, method, name="mixture", seed=seed)
    optimiser = torch.optim.AdamW([t for t in delta.parameters() if t.requires_grad], lr=LR, weight_decay=0.0)
    rng = random.Random(f"035:epochs:{seed}")
    for _ in range(sizes.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for i in range(0, len(order), BATCH):
            some = [rows[j] for j in order[i : i + BATCH]]
            ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
            y = torch.full(ids.shape, -100)
            for k, row in enumerate(some):
                ids[k, : len(row)] = torch.tensor(row)
                y[k, : len(row)] = torch.tensor(row)
            with base.frozen(), base.using(delta):
                logits = base(input_ids=ids).logits[:, :-1]
                F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(delta.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return delta


def generated(base: Base, delta: Delta, arm: str, sizes: Sizes, seed: int, start: int) -> list[dict[str, Any]]:
    """The texts of one arm with their kinds."""
    from tunesmith.inspect import Novelty, explore

    from .world import kind_of

    how = Novelty(
        n=sizes.texts, length=sizes.tokens, gamma=0.0 if arm == SAMPLING else 1.0, alpha=0.1, start=start, seed=seed,
        iterative=arm == ITERATIVE, distill=f"full:targets={top(base, sizes.blocks)},bias=false", lr=DISTILL_LR,
    )  # fmt: skip
    texts = explore(base, delta, how)
    shown = [base.tokenizer.decode(list(t.ids)) for t in texts]
    return [{"text": s, "kind": kind_of(s), "novelty": t.novelty} for s, t in zip(shown, texts, strict=True)]


def run(ctx: Context) -> Raw:
    """One fine-tuned model a seed, and every arm on it; the delta is kept beside the cells until the study is done."""
    import random

    from tunesmith.core.delta import Delta

    from .world import encoded, mixture

    sizes = SMOKE if ctx.smoke else FULL
    base, news, code = loaded(ctx)
    start = int(base.tokenizer.bos_token_id)
    raw: Raw = {"arms": {arm: [] for arm in ARMS}}
    for done, seed in enumerate(ctx.seeds):
        folder = ctx.out / "deltas" / f"mixture-{seed}"
        made: list[Delta] = []

        def make(seed: int = seed) -> Delta:
            drawn = random.Random(f"035:news:{seed}").sample(news, sizes.news)
            rows = encoded(base.tokenizer, mixture(drawn, sizes.novel, seed, code), start, sizes.length)
            return tuned(base, rows, sizes, seed)

        def obtain(made: list[Delta] = made, folder: Any = folder, make: Any = make) -> Delta:
            if not made:
                made.append(Delta.load(folder, base) if folder.is_dir() else make())
                if not folder.is_dir():
                    made[0].save(folder)
            return made[0]

        for arm in ARMS:
            rows = ctx.cell(
                {"arm": arm, "seed": seed}, lambda a=arm, s=seed, o=obtain: generated(base, o(), a, sizes, s, start)
            )
            kinds = [r["kind"] for r in rows if r["kind"]]
            share, found = 100 * len(kinds) / len(rows), len(set(kinds))
            ctx.log(f"{arm}, seed {seed}: {share:.0f} % novel, {found} domains")
            raw["arms"][arm].append({"seed": seed, "metric": share, "domains": found, "texts": rows})
        ctx.progress(done + 1, len(ctx.seeds))
    return raw


def verdict(raw: Raw) -> Verdict:
    """Apply RULE to raw numbers."""
    from statistics import mean

    from tunesmith.evaluate.stats import paired_t

    share = {arm: mean(r["metric"] for r in rows) for arm, rows in raw["arms"].items()}
    found = {arm: mean(r["domains"] for r in rows) for arm, rows in raw["arms"].items()}
    domains = {arm: {r["seed"]: r["domains"] for r in rows} for arm, rows in raw["arms"].items()}
    more = paired_t([domains[ITERATIVE][s] - domains[STATIC][s] for s in domains[STATIC]])
    reasons = [
        f"novel texts: static {share[STATIC]:.0f} %, sampling {share[SAMPLING]:.0f} %, iterative {share[ITERATIVE]:.0f} %",
        f"domains: iterative less static {more.mean:+.2f} [{more.low:+.2f}, {more.high:+.2f}], iterative "
        f"{found[ITERATIVE]:.1f} of 5",
    ]
    statistics = {
        "novel share": share, "domains": found,
        "iterative - static": {"mean": more.mean, "low": more.low, "high": more.high, "n": more.n},
    }  # fmt: skip
    if share[STATIC] <= share[SAMPLING]:
        return Verdict("not reproduced", reasons, statistics)
    finds = share[STATIC] >= 2 * share[SAMPLING]
    covers = more.mean > 0 and more.low > 0 and found[ITERATIVE] >= 4
    return Verdict("reproduced" if finds and covers else "inconclusive", reasons, statistics)


STUDY = Study(
    id=35,
    slug="cge",
    paper="What's New in My Data? Novelty Exploration via Contrastive Generation, ICLR 2025, arXiv 2410.14765",
    claim="Texts sampled from the contrast of the fine-tuned model with its base show the novel part of the fine-tuning data "
    "much more often than samples of the fine-tuned model, and training the base on each text shows more kinds of it.",
    verdict_rule=RULE,
    arms=ARMS,
    run=run,
    verdict=verdict,
    data=("ag_news", "mbpp"),
    minutes=20,
    deviations=(
        "600 news texts and 15 of each of the five kinds, 24 tokens, instead of 1,200 and 30 of 32; 30 texts of 14 tokens "
        "instead of 40 of 24.",
        "The linear and norm weights of the last 6 of the 30 blocks train instead of all; the reference's throw-away update "
        "is of the same weights.",
        "Tokens are drawn from softmax(s) without beams, as the card proposes; the plausibility cut (0.1) holds in every arm.",
    ),
)
