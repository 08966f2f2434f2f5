# SPDX-License-Identifier: Apache-2.0
"""The engine: requests for many deltas in one running batch, a token for each at every step.

`step` does one round: it lets waiting requests join (see `admission`), reads a chunk of the prompts that are not read
yet together with one token of every request that writes and what may follow it (see `guess`), and draws the next tokens. A delta that acts on layers the
decoder runs is served in the shared batch, whatever its kind; one that acts elsewhere (prompts, whole blocks), or any
delta on a model that is no Llama, runs by itself on the model's own forward pass, slower, to the same tokens.

Not thread-safe: one thread steps it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.base import Base
from tunesmith.core.decoding import Joint
from tunesmith.core.errors import ResourceError, TunesmithError, UsageError
from tunesmith.core.trace import primary
from tunesmith.serve.admission import Batch, Counters, EarlyAbort, Limits, Running, Waiting, admit
from tunesmith.serve.cache import Span
from tunesmith.serve.decoder import Decoder
from tunesmith.serve.dominant import Dominant, Merged
from tunesmith.serve.library import Library
from tunesmith.serve.mixed import Mixture, Resident, few
from tunesmith.serve.pages import Pages
from tunesmith.serve.pool import Pool
from tunesmith.serve.requests import Event, Live, Request
from tunesmith.serve.sampling import Chosen, Row, Sampling, choose_each
from tunesmith.serve.stacks import Stacks

GREEDY = Sampling(temperature=0)
LOOK_AHEAD = 16  # waiting requests whose deltas are read before they join
GUESS = {"cpu": 6, "cuda": 32}  # tokens of a step that take little more time than one
KEPT = 4  # layouts whose stacked factors are kept between steps


class Engine:
    """Serves one base.

    Args:
        cells: of the pool; a cached token takes one, and a resident delta as many as its numbers fill.
        requests: the most in the running batch.
        chunk: prompt tokens read in one step, so that long prompts do not hold up those who write.
        policy: who joins first, see `admission.admit`.
        first_token: seconds within which the first token must come; a request that would miss them is given up at once,
            and under overload the newest are served first (see `admission.EarlyAbort`). None: nobody is given up.
        prefixes: keep what was read in pages that later requests with the same delta and beginning need not read again.
        guess: tokens up to which a step with fewer is filled with guesses of what requests write next (0: none; None: as
            many as the device computes at little cost).
        dominant: share of the tokens from which on a delta is merged for a while (`dominant`; fp32 bases); None: never.
        clock: the time in seconds that `Request.arrived` is told in.
    """

    def __init__(
        self,
        base: Base,
        library: Library,
        *,
        cells: int = 16384,
        requests: int = 64,
        chunk: int = 256,
        policy: str = "fcfs",
        first_token: float | None = None,
        prefixes: bool = True,
        guess: int | None = None,
        dominant: float | None = 0.75,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        guess = GUESS.get(base.device.type, GUESS["cpu"]) if guess is None else guess
        for name, value, least in (("chunk", chunk, 1), ("guess", guess, 0)):
            if value < least:
                raise UsageError(f"must be at least {least}, got {value}", where=name)
        self.base, self.library, self.chunk, self.policy = base, library, chunk, policy
        self.limits = Limits(cells, requests)
        self.pool, self.counters, self.prefixes, self.guess = Pool(cells), Counters(), prefixes, guess
        self.guessed = self.right = 0  # tokens that were guessed, and guesses that were right
        self.pages = Pages(self.pool)
        self.abort = None if first_token is None else EarlyAbort(first_token)
        self.clock = clock
        self._arrived = self._seen = self._admitted = 0
        self.waiting: list[Request] = []
        self.live: dict[str, Live] = {}
        self.why_slow: str | None = None
        try:
            self.decoder: Decoder | None = Decoder.find(base)
        except UsageError as error:
            self.decoder, self.why_slow = None, str(error)
        config = getattr(base.model, "config", None)
        self.longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        width = 1
        if self.decoder is not None:
            d = self.decoder
            width = len(d.layers) * 2 * d.kv_heads * d.head_dim
            self.cache = d.cache(cells)
            self.stacks = Stacks(d.groups)
            wide = base.dtype in (torch.float32, torch.float64)
            self.dominant = Dominant(d, share=dominant) if wide and dominant is not None else None
            self._merged: Merged | None = None
        self._numbers = width  # in a cell, over both buffers and all layers
        self._cells: dict[str, int] = {}  # of deltas, by digest
        self._mixtures: OrderedDict[tuple[Any, ...], Mixture] = OrderedDict()
        self.vocabulary = int(getattr(config, "vocab_size", None) or 1 << 60)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UsageError for one that can never be served: unknown delta, too long, id in use."""
        n = len(request.prompt)
        if request.id in self.live or any(w.id == request.id for w in self.waiting):
            raise UsageError(f"the id {request.id!r} is in use")
        if n < 1 or request.new < 1:
            raise UsageError(f"a request has a prompt and writes something; got {n} and {request.new} tokens")
        longest = min(self.longest, self.longest if request.delta is None else self.library.find(request.delta).longest)
        if n + request.new > longest:
            raise UsageError(f"{n} + {request.new} tokens are more than the model's {longest}", where="prompt")
        if not all(0 <= t < self.vocabulary for t in request.prompt):
            raise UsageError(f"a prompt holds token numbers from 0 to {self.vocabulary - 1}", where="prompt")
        one = self._waiting(request)
        if not Batch(self.limits, self._cells).could_ever(one):
            raise ResourceError(
                f"{n} + {request.new} tokens and their delta do not fit into {self.limits.cells} cells", where=request.id,
                hint="ask for fewer tokens, or start the server with more cells",
            )  # fmt: skip
        known = self.library.entries
        waiting = {None if w.delta is None else known[w.delta].digest if w.delta in known else "" for w in self.waiting}
        if one.delta not in waiting:
            self.counters.arrived(one.delta, waiting - {""})  # a delta that was removed has no turn any more
        self.waiting.append(request)
        self._arrived += 1

    def cancel(self, id: str) -> bool:
        """Take a request out, wherever it is; its cells are free at once. False for a stranger."""
        before = len(self.waiting)
        self.waiting = [w for w in self.waiting if w.id != id]
        live = self.live.pop(id, None)
        if live is not None:
            self._leave(live)
        return live is not None or len(self.waiting) < before

    def under_way(self) -> list[str]:
        """Requests in the batch."""
        return list(self.live)

    def queued(self) -> list[str]:
        """Requests that wait."""
        return [w.id for w in self.waiting]

    @property
    def free(self) -> int:
        """Cells that a request may have: free ones, and those of cached prefixes nobody reads."""
        return self.pool.free + self.pages.unused

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.live

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One round; what happened, in the order of the batch. A request that fails does not disturb the others."""
        events = self._join()
        shared = [r for r in self.live.values() if r.shared]
        events += self._shared(shared) if shared else []
        for r in [r for r in self.live.values() if not r.shared]:
            events += self._apart(r)
        return events

    def generate(self, requests: Iterable[Request]) -> dict[str, list[int]]:
        """Serve requests to their end; the tokens of each answer (a stop token is not among them). Raises their errors."""
        answers: dict[str, list[int]] = {}
        for r in requests:
            self.submit(r)
            answers[r.id] = []
        while not self.idle:
            for event in self.step():
                if event.error is not None:
                    raise event.error
                if event.chosen is not None:
                    answers[event.id].append(event.chosen.token)
        return answers

    # joining and leaving

    def _join(self) -> list[Event]:
        running = self._running()
        events: list[Event] = []
        requests, queue = {w.id: w for w in self.waiting}, []
        if len(self._cells) > 2 * len(self.library.entries) + len(self.live):  # versions that are no more
            known = {e.digest for e in self.library.entries.copy().values()} | {r.digest for r in self.live.values()}
            self._cells = {digest: n for digest, n in self._cells.items() if digest in known}
        for w in self.waiting:
            try:
                queue.append(self._waiting(w))
            except TunesmithError as error:  # its delta was removed or damaged while it waited
                events.append(Event(w.id, reason="error", error=error))
                del requests[w.id]
        if self.abort is not None:
            new = self._arrived - self._seen
            queue, late = self.abort.turn(queue, self.clock(), new, self._admitted)
            self._seen = self._arrived
            for one in late:
                error = ResourceError(
                    "the first token would come too late", hint="the server is overloaded; come again"
                )
                events.append(Event(one.id, reason="error", error=error))
                del requests[one.id]
        joined = admit(
            queue, running, self.limits, self._cells, policy=self.policy, counters=self.counters, held=self.pages.in_use
        )
        self._admitted = len(joined)
        for one in joined:
            request = requests.pop(one.id)
            try:
                caches = 1 if request.delta is None else self.library.find(request.delta).caches
                held = None if request.delta is None else self.library.acquire(request.delta)
            except TunesmithError as error:
                events.append(Event(request.id, reason="error", error=error))
                continue
            if held is not None and held.digest != one.delta:  # written anew since it was counted: count again
                self.library.release(held)
                requests[request.id] = request
                continue
            if held is not None and ("delta", held.digest) not in self.pool.owners():
                self.pages.make_room(self._cells[held.digest])
                self.pool.take(("delta", held.digest), self._cells[held.digest])
            guide = None if request.rule is None else request.rule.start(request.stop)
            self.live[request.id] = live = Live(request, held, self._shareable(held), guide, caches=caches)
            if live.shared and self.prefixes:
                self._resume(live)
        self.waiting = [w for w in self.waiting if w.id in requests]
        self.library.prefetch(w.delta for w in self.waiting[:LOOK_AHEAD] if w.delta is not None)
        return events

    def _running(self) -> list[Running]:
        """The batch as admission sees it, with this step's guesses for tokens that were written.

        Tokens that are known but not read yet count as read: a prompt may be read faster than a token a step.
        """
        out = []
        for r in self.live.values():
            used, left = r.alone(self.pages.size) + len(r.guessed), r.request.new - len(r.answer) - len(r.guessed)
            out.append(Running(r.request.id, *_worst(used, left, r.caches), r.digest))
        return out

    def _resume(self, r: Live) -> None:
        """Begin behind what is cached of its prompt."""
        r.pages = self.pages.find(r.digest, r.request.prompt)
        self.pages.hold(r.pages)
        for page in r.pages:
            r.grow(page.cells)
            r.cached += len(page.cells)
        self.pages.found += r.cached

    def _waiting(self, r: Request) -> Waiting:
        """The request as admission sees it; a delta goes by its digest, so that two versions count as two."""
        if r.delta is None:
            return Waiting(r.id, len(r.prompt), r.new, None, r.arrived, self._in_common(r, None))
        entry = self.library.find(r.delta)
        # The delta as read and its factors beside it; on a model that keeps no cells, a token's worth.
        numbers = entry.nbytes // 2 if self.decoder is not None else 1
        self._cells[entry.digest] = max(1, -(-numbers // self._numbers))
        used, left = _worst(len(r.prompt), r.new, entry.caches)
        return Waiting(r.id, used, left, entry.digest, r.arrived, self._in_common(r, entry.digest))

    def _in_common(self, r: Request, digest: str | None) -> int:
        """Tokens of its prompt in pages that are read now; those in unused pages cost it what others would."""
        return self.pages.size * sum(p.refs > 0 for p in self.pages.find(digest, r.prompt))

    def _shareable(self, held: Resident | None) -> bool:
        if self.decoder is None or (held is not None and held.decoder is not None):
            return False
        if held is None:
            return True
        carriers = {a.carrier for actions in held.other.values() for a in actions}
        return held.paths <= self.decoder.paths and carriers <= {"weight", "hidden"}

    def _leave(self, r: Live) -> None:
        self.pool.give_back(("cache", r.request.id))
        self.pages.release(r.pages)
        if r.resident is None:
            return
        self.library.release(r.resident)
        if not any(o.resident is r.resident for o in self.live.values() if o is not r):
            self.pool.give_back(("delta", r.resident.digest))

    # computing

    @torch.inference_mode()
    def _shared(self, batch: Sequence[Live]) -> list[Event]:
        """One pass for every request of the shared batch, those of one delta beside each other."""
        assert self.decoder is not None
        room, taking = self.chunk, []
        for r in batch:
            n = 1 if r.due == 1 else min(r.due, room)
            if n:
                room -= n if r.due > 1 else 0
                taking.append((r, n))
        self._look_ahead(taking)
        taking = self._in_order([(r, n + len(r.guessed)) for r, n in taking])
        self._give_cells(taking)
        spans, flat, mix, drawing, at = [], [], [], [], 0
        wanted: list[int] = []  # the places of tokens after which one is drawn
        for r, n in taking:
            known = n - len(r.guessed)
            spans.append(Span(r.cells[: r.cached + n], r.cached, n))
            flat += [*r.next(known), *r.guessed]
            mix.append((r.resident, at, at + n))
            if known == r.due:
                drawing.append((r, len(wanted)))
                wanted += range(at + known - 1, at + n)
            at += n
            r.cached += known
        tokens = torch.tensor(flat, device=self.base.device)
        h = self.decoder(tokens, self.cache.view(spans), self._mixture(mix))
        if self.prefixes:
            for r, _ in taking:
                self._keep_pages(r)
        if not wanted:
            return []
        if len(wanted) < at:
            h = h[torch.tensor(wanted, device=h.device)]
        mix = [(r.resident, i, i + 1 + len(r.guessed)) for r, i in drawing]
        return self._draw_ahead(drawing, self.decoder.logits(h, self._mixture(mix)))

    def _look_ahead(self, taking: Sequence[tuple[Live, int]]) -> None:
        """Guess what requests write next, as far as the step has room for it and the pool for all of them to end."""
        assert self.decoder is not None
        for r, _ in taking:
            r.guessed = []
        room = self.guess - sum(n for _, n in taking)
        if room < 1:
            return
        for i, (r, _) in enumerate(taking):
            r.guessed = r.guess(room // (len(taking) - i))
            room -= len(r.guessed)
        if not Batch(self.limits, self._cells, self._running(), self.pages.in_use).can_end():
            for r, _ in taking:
                r.guessed = []

    def _draw_ahead(self, drawing: Sequence[tuple[Live, int]], z: Tensor) -> list[Event]:
        """The next tokens of requests: logits in `z` lie from their number on, one row more than each has guessed."""
        events = self._draw([r for r, _ in drawing], z if len(z) == len(drawing) else z[[i for _, i in drawing]])
        guessing, step = [(r, i) for r, i in drawing if r.guessed], 0
        while True:  # those whose guess is what they wrote draw once more
            more = [(r, i) for r, i in guessing if step < len(r.guessed) and r.request.id in self.live
                    and r.answer[-1] == r.guessed[step]]  # fmt: skip
            if not more:
                break
            step += 1
            for r, _ in more:
                r.cached += 1
            events += self._draw([r for r, _ in more], z[[i + step for _, i in more]])
            guessing = more
        for r, _ in drawing:
            if r.guessed:
                self._settle(r)
        return events

    def _settle(self, r: Live) -> None:
        """Give back the cells of guesses that were wrong."""
        wrong, made = r.held - r.cached, len(r.guessed)
        if r.request.id in self.live and wrong:
            self.pool.hand_over(("cache", r.request.id), r.cells[r.cached : r.held], None)
        r.held, r.guessed = r.cached, []
        if r.guesses is not None:
            r.guesses.told(made, made - wrong)
        self.guessed, self.right = self.guessed + made, self.right + made - wrong

    def _give_cells(self, taking: Sequence[tuple[Live, int]]) -> None:
        """Cells for the next tokens of each request."""
        self.pages.make_room(sum(n for _, n in taking))
        single = [r for r, n in taking if n == 1]
        last = [int(r.cells[r.cached - 1]) if r.cached else -1 for r in single]
        for r, cell in zip(single, self.pool.take_each([("cache", r.request.id) for r in single], last), strict=True):
            r.grow(cell[None])
        for r, n in taking:
            if n > 1:
                behind = int(r.cells[r.cached - 1]) if r.cached else None
                r.grow(self.pool.take(("cache", r.request.id), n, behind=behind))

    def _keep_pages(self, r: Live) -> None:
        """Make pages of what is in its cache; where there is one already, read that one instead."""
        size = self.pages.size
        while (done := size * len(r.pages)) + size <= r.cached:
            mine = r.cells[done : done + size]
            page = self.pages.add(
                ("cache", r.request.id), r.digest, r.pages, r.tokens[done : done + size], mine.clone()
            )
            mine.copy_(page.cells)
            r.pages.append(page)

    def _in_order(self, taking: list[tuple[Live, int]]) -> list[tuple[Live, int]]:
        """Requests of one delta beside each other, deltas in the order in which their factors lie."""
        sizes: dict[int, int] = {}
        for r, n in taking:
            sizes[id(r.resident)] = sizes.get(id(r.resident), 0) + n
        spans = [(r.resident, 0, sizes[id(r.resident)]) for r, _ in taking]
        if self.dominant is not None:
            self._merged = self.dominant.turn({id(r): (r, n) for r, _, n in spans})
            spans = [s for s in spans if self._merged is None or s[0] is not self._merged.resident]
        self.stacks.settle(few(spans), [r.resident for r in self.live.values() if r.resident is not None])
        return sorted(taking, key=lambda t: self.stacks.place(t[0].resident))

    def _mixture(self, spans: list[tuple[Resident | None, int, int]]) -> Mixture:
        """The mixture of these spans; the last few are kept, as a batch that only writes has the same at every step."""
        key = (self.stacks.version, id(self._merged), *((id(r), a, b) for r, a, b in spans if r is not None))
        found = self._mixtures.pop(key, None) or Mixture(spans, self.stacks, self._merged)
        self._mixtures[key] = found
        while len(self._mixtures) > KEPT:
            self._mixtures.popitem(last=False)
        return found

    def _apart(self, r: Live) -> list[Event]:
        """The next token of one request by its decoder, or by the model's own forward pass over all its tokens."""
        try:
            z = self._guided(r) if r.resident is not None and r.resident.decoder is not None else self._whole(r)
        except TunesmithError as error:
            return [self._end(r, "error", error)]
        self.pages.make_room(r.due * r.caches)
        self.pool.take(("cache", r.request.id), r.due * r.caches)
        r.cached = len(r.tokens)
        return self._draw([r], z[None])

    def _whole(self, r: Live) -> Tensor:
        """Logits [V] after all tokens of a request, read anew."""
        ids = torch.tensor([r.tokens], device=self.base.device)
        with self.base.evaluating(), self.base.using(r.resident.view if r.resident is not None else None):
            z = primary(self.base.model(input_ids=ids))
        if z is None:
            raise UsageError("the model gave no logits", where=self.base.name)
        return z[0, -1]

    def _guided(self, r: Live) -> Tensor:
        """Log-probabilities [V] of a request's decoder, whose members keep caches of their own."""
        if r.joint is None:
            assert r.resident is not None and r.resident.decoder is not None
            r.joint = Joint(r.resident.decoder)
            return r.joint.start([r.request.prompt])[0]
        return r.joint.more([r.answer[-1]])[0]

    def _draw(self, rows: Sequence[Live], z: Tensor) -> list[Event]:
        """The next token of each request from logits [n, V], and who ends with it."""
        given: list[Row | TunesmithError] = [_row(r, z) for r in rows]
        drawn = choose_each(z, [g if isinstance(g, Row) else Row(GREEDY) for g in given])
        events = []
        for r, row, chosen in zip(rows, given, drawn, strict=True):
            error = next((e for e in (row, chosen) if isinstance(e, TunesmithError)), None)
            events.append(
                self._end(r, "error", error) if isinstance(chosen, TunesmithError) or error else self._wrote(r, chosen)
            )
        return events

    def _wrote(self, r: Live, chosen: Chosen) -> Event:
        ends = chosen.token in r.request.stop
        try:
            if r.guide is not None and not ends:
                r.guide.take(chosen.token)
        except TunesmithError as error:
            return self._end(r, "error", error)
        self.counters.wrote(r.digest)
        if ends:
            return self._end(r, "stop")
        r.answer.append(chosen.token)
        over = r.guide is not None and r.guide.over
        if not over and len(r.answer) < r.request.new:
            return Event(r.request.id, chosen)
        self.live.pop(r.request.id)
        self._leave(r)
        return Event(r.request.id, chosen, "stop" if over else "length")

    def _end(self, r: Live, reason: str, error: TunesmithError | None = None) -> Event:
        self.live.pop(r.request.id)
        self._leave(r)
        return Event(r.request.id, None, reason, error)


def _row(r: Live, z: Tensor) -> Row | TunesmithError:
    """What a request's next token is drawn by, or why it cannot be."""
    try:
        allowed = None if r.guide is None else r.guide.allowed(z.shape[1]).to(z.device)
    except TunesmithError as error:
        return error
    return Row(r.request.sampling, r.request.prompt, r.answer, allowed)


def _worst(tokens: int, left: int, caches: int) -> tuple[int, int]:
    """(used, left) that never takes fewer cells than `caches` rows of (tokens, left) do, see `admission.need`."""
    return caches * (tokens + left) - left, left
