# SPDX-License-Identifier: Apache-2.0
"""Deltas by name: registered from their headers, read on first use, let go again when memory is short.

Registering reads no tensor, so a library of thousands starts in seconds and its size costs nothing at run time. A delta
is read, checked against the base and prepared when a request first names it; the least recently used that nobody needs
goes first. A folder that was written anew is noticed and takes effect for the next request; requests under way finish
with the delta they began with. Entries may be read from any thread; everything else is one thread's.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core import decoding, replace, store
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, View
from tunesmith.core.errors import DeltaError, ResourceError, TunesmithError, UsageError, nearest
from tunesmith.core.header import HEADER
from tunesmith.serve import guided
from tunesmith.serve.mixed import Resident, resident

AHEAD = 4  # deltas read before their request joins


@dataclass(frozen=True)
class Entry:
    """A registered delta: where it is, what its header says, and the stamp of its file.

    A token of its rows takes `caches` cells, and a row at most `longest` tokens; both are of decoders only.
    """

    name: str
    folder: Path
    digest: str
    nbytes: int
    methods: tuple[str, ...]
    provenance: dict[str, Any]
    layout: dict[str, Any]
    stamp: tuple[int, int]
    caches: int = 1
    longest: int = 1 << 30


class Library:
    """The deltas a server knows, and those it holds.

    Args:
        budget: bytes of prepared deltas to keep; one that is in use or pinned is never let go, so use may exceed it.
        served: says whether a prepared delta can be served, raising UsageError if not (the engine's business).
    """

    def __init__(self, base: Base, budget: int, served: Callable[[Resident], None] | None = None) -> None:
        self.base, self.budget, self.served = base, budget, served
        self.entries: dict[str, Entry] = {}
        self.loads = self.evictions = 0
        self._held: OrderedDict[str, Resident] = OrderedDict()  # by digest, least recently used first
        self._users: Counter[str] = Counter()
        self._pinned: set[str] = set()  # names
        self._ahead: dict[str, Future[Resident]] = {}  # by digest, being read by another thread
        self._reader: ThreadPoolExecutor | None = None

    def scan(self, root: str | Path) -> list[tuple[Path, TunesmithError]]:
        """Register every delta in the folders below `root` (`NAME/` or `NAME/delta/`), then every decoder (see `guided`).

        Gives those refused, with why.
        """
        refused = []
        for folder in _folders(Path(root)):
            place = folder if (replace.whole(folder) / HEADER).is_file() else folder / "delta"
            if not (replace.whole(place) / HEADER).is_file():
                continue
            try:
                self.register(place, folder.name)
            except TunesmithError as error:
                refused.append((place, error))
        for place in sorted(Path(root).glob(f"*/{guided.FILE}")):  # they name deltas, which are known by now
            try:
                self.guide(guided.read(place, self), place.parent.name)
            except TunesmithError as error:
                refused.append((place.parent, error))
        return refused

    def register(self, folder: str | Path, name: str | None = None) -> Entry:
        """Make a saved delta known. Reads its header only.

        Raises DeltaError for a damaged one, BaseMismatch for one of another base or with parents, UsageError for a name
        that is taken by another folder.
        """
        place = Path(folder)
        head = store.peek(place)
        label = name or head["name"]
        known = self.entries.get(label)
        if known is not None and known.folder != place:
            raise UsageError(
                f"the name {label!r} is taken by {known.folder}", where=str(place), hint="give another name"
            )
        facts = head["provenance"]
        if facts.get("base"):
            self.base.fingerprint.require_same(facts["base"], label)
        if facts.get("lineage"):
            parents = ", ".join(p["name"] for p in facts["lineage"])
            raise UsageError(f"it is valid on top of {parents} only, and a request names one delta", where=label,
                             hint="bake or merge the stack into one delta")  # fmt: skip
        entry = Entry(
            label, place, head["digest"], head["file"]["bytes"], tuple(p["method"] for p in head["parts"]), facts,
            head["layout"], _stamp(place),
        )  # fmt: skip
        self.entries[label] = entry
        return entry

    def add(self, delta: Delta, name: str | None = None) -> Entry:
        """Make a delta in memory known; it is held for good."""
        ready = self._checked(resident(self.base, delta, name))
        entry = Entry(
            ready.name, Path(), delta.digest, delta.nbytes, tuple(p.info.name for p in delta.parts), delta.provenance,
            delta.layout, (0, 0),
        )  # fmt: skip
        self.entries[ready.name] = entry
        self._held[entry.digest] = ready
        self._pinned.add(ready.name)
        return entry

    def guide(self, made: decoding.Decoder, name: str) -> Entry:
        """Make a decoder known under a name; it is held for good, with the deltas of its members.

        Raises UsageError for a name that is taken.
        """
        if name in self.entries:
            raise UsageError(f"the name {name!r} is taken", hint="give another name")
        key = decoding.digest(made)
        views = [v for m in made.members for v in m.deltas]
        entry = Entry(
            name, Path(), key, sum(v.delta.nbytes for v in views), (type(made).__name__.lower(),),
            {"members": [[m.base.name, *(v.delta.name for v in m.deltas)] for m in made.members]},
            guided.layout_of(made), (0, 0), guided.caches(made, self.base), guided.longest(made),
        )  # fmt: skip
        self.entries[name] = entry
        self._held[key] = Resident(name, View(Delta(name, [])), digest=key, decoder=made)
        self._pinned.add(name)
        return entry

    def view(self, name: str) -> View:
        """The delta of a name as it is now. Raises UsageError for a decoder, and what `acquire` raises."""
        ready = self.acquire(name)
        self.release(ready)
        if ready.decoder is not None:
            raise UsageError("is a decoder and no delta", where=name)
        return ready.view

    def remove(self, name: str) -> None:
        """Forget a name; requests under way keep what they hold. Raises UsageError for an unknown one."""
        if self.entries.pop(name, None) is None:
            raise self._unknown(name)
        self._pinned.discard(name)
        self._shrink()

    def find(self, name: str) -> Entry:
        """The entry of a name, its header read anew if its file changed. Raises UsageError naming the nearest."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._unknown(name)
        if entry.folder != Path() and entry.stamp != _stamp(entry.folder):
            return self.register(entry.folder, name)
        return entry

    def pin(self, name: str, on: bool = True) -> None:
        """Keep a delta in memory whatever else is used (or no longer)."""
        self.find(name)
        (self._pinned.add if on else self._pinned.discard)(name)
        self._shrink()

    def _unknown(self, name: str) -> UsageError:
        return UsageError(f"there is no delta {name!r}", hint=nearest(name, self.entries))

    def acquire(self, name: str) -> Resident:
        """The prepared delta, held until `release`.

        Raises DeltaError for one that is damaged or has no effect, ResourceError where memory is short.
        """
        entry = self.find(name)
        ahead = self._ahead.pop(entry.digest, None)
        ready = self._held.get(entry.digest)
        if ready is None:
            if ahead is None:
                entry, ready = self._prepared(entry, name)
            else:  # of the file that is there now: a new one has another digest
                ready = self._checked(ahead.result())
            self._held[entry.digest] = ready
            self.loads += 1
        self._held.move_to_end(entry.digest)
        self._users[entry.digest] += 1
        ready.digest = entry.digest
        self._shrink()
        return ready

    def release(self, ready: Resident) -> None:
        """The holder is done with it."""
        self._users[ready.digest] -= 1
        if self._users[ready.digest] <= 0:
            del self._users[ready.digest]
        self._shrink()

    def prefetch(self, names: Iterable[str]) -> None:
        """Have another thread read these deltas, AHEAD at most, so that they are there when they are acquired.

        Unknown names are passed over; an error shows when the delta is acquired.
        """
        wanted = {self.entries[n].digest: self.entries[n] for n in names if n in self.entries}
        for digest in [d for d, f in self._ahead.items() if d not in wanted and (f.done() or f.cancel())]:
            del self._ahead[digest]
        for digest, entry in wanted.items():
            if len(self._ahead) >= AHEAD or self.held_bytes >= self.budget:
                return
            if digest not in self._ahead and digest not in self._held:
                self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="tunesmith-read")
                self._ahead[digest] = self._reader.submit(self._read, entry, entry.name)

    def _prepared(self, entry: Entry, name: str) -> tuple[Entry, Resident]:
        """Read and prepare a delta, again if it was written anew meanwhile."""
        for _ in range(3):
            ready = self._checked(self._read(entry, name))
            if _stamp(entry.folder) == entry.stamp:
                return entry, ready
            entry = self.find(name)
        raise DeltaError("it is written all the time", where=name, hint="ask again later")

    def _read(self, entry: Entry, name: str) -> Resident:
        """Read and prepare a delta as it is on disk. Of the library nothing changes: any thread may do this."""
        try:
            return resident(self.base, store.load(entry.folder, self.base), name)
        except TunesmithError:
            raise
        except MemoryError:
            raise ResourceError("there is no memory to read it", where=name) from None
        except Exception as error:  # whatever a delta's own code raises: it is refused, and the server goes on
            raise DeltaError(f"it cannot be prepared ({error!r})", where=name) from error

    def _checked(self, ready: Resident) -> Resident:
        if not ready.paths:
            raise DeltaError("it changes nothing", where=ready.name, hint="train it first")
        if ready.silent():
            raise DeltaError("every change it makes is zero", where=ready.name, hint="train it first")
        if self.served is not None:
            self.served(ready)
        return ready

    @property
    def held_bytes(self) -> int:
        return sum(r.nbytes for r in self._held.copy().values())

    @property
    def held(self) -> list[str]:
        """Digests of the deltas in memory, least recently used first."""
        return list(self._held)

    def _shrink(self) -> None:
        total = self.held_bytes
        if total <= self.budget:
            return
        pinned = {self.entries[n].digest for n in self._pinned if n in self.entries}
        for digest in list(self._held):
            if total <= self.budget:
                return
            if digest in self._users or digest in pinned:
                continue
            total -= self._held.pop(digest).nbytes
            self.evictions += 1


def _folders(root: Path) -> list[Path]:
    """The folders in `root` by name, also one that a writer that was killed left under its aside name only."""
    names = {p.name for p in root.iterdir() if p.is_dir()}
    left = {n.removeprefix(".").removesuffix(".aside") for n in names if n.startswith(".") and n.endswith(".aside")}
    return [root / n for n in sorted({n for n in names if not n.startswith(".")} | left) if n]


def _stamp(folder: Path) -> tuple[int, int]:
    try:
        stat = (replace.whole(folder) / HEADER).stat()
    except OSError as error:
        raise DeltaError(f"it is gone ({error.strerror})", where=str(folder)) from None
    return stat.st_mtime_ns, stat.st_size
