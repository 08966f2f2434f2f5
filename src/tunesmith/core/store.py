# SPDX-License-Identifier: Apache-2.0
"""Save and load deltas: a folder with `delta.json`, `delta.safetensors` and `README.md` (format in docs/formats.md).

Saving proves itself: the files are read back and compared bit for bit before they take the place of older ones.
Loading trusts nothing: no pickle, no missing, extra or altered tensor, no unknown method or option, no other base.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.core import apply, card, expected, header, replace
from tunesmith.core import method as methods
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta, Part
from tunesmith.core.effect import EffectReport, check_effect, effect
from tunesmith.core.errors import DeltaError, ResourceError, UsageError, nearest
from tunesmith.core.header import CARD, DTYPE_NAMES, DTYPES, FILES, FORMAT, HEADER, TENSORS

__all__ = ["EffectReport", "Saved", "check_effect", "effect", "load", "peek", "proof", "save"]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MAGICS = (b"PK\x03\x04", *(b"\x80" + bytes([v]) for v in range(2, 6)))
Resolver = Callable[[str], methods.MethodInfo]


@dataclass(frozen=True)
class Saved:
    """What a save wrote: folder, number and bytes of tensors, digest of the delta, sha256 of the tensor file.

    `effect` is the largest change on the probe, None where no base was given or it could not be measured.
    """

    path: Path
    tensors: int
    bytes: int
    digest: str
    sha256: str
    effect: float | None = None

    def __str__(self) -> str:
        moved = "" if self.effect is None else f", largest effect {self.effect:.6g}"
        return f"saved {self.tensors} tensors, {self.bytes:,} bytes{moved}, digest {self.digest[:12]} to {self.path}"


def save(delta: Delta, folder: str | Path, *, base: Base | None = None) -> Saved:
    """Write a delta to `folder`, replacing an older delta there in one step; other files in the folder are kept.

    With `base`, the delta is checked against it and its effect on the probe is stored. Raises DeltaError for a delta
    that has no tensors or holds NaN, infinity or a dtype that cannot be stored, UsageError for a folder that holds
    something else or provenance that is no plain data, BaseMismatch for another base, ResourceError for a disk that is
    full or cannot be written. After any failure, a kill included, `load` still finds the older delta.
    """
    target = _as_path(folder)
    with _disk(target, delta.nbytes):
        target = target.resolve()
        _check_target(target)
        tensors = _collect(delta)
        facts = _provenance(delta, base)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace.recover(target, FILES)
        with replace.scratch(target) as fresh:
            sha256, head = _write(delta, tensors, facts, fresh)
            _compare(fresh, tensors)
            replace.publish(fresh, target, FILES)
    moved = (facts.get("effect") or {}).get("max_abs") if base is not None else None
    return Saved(target, len(tensors), delta.nbytes, head["digest"], sha256, moved)


def load(
    folder: str | Path, base: Base | None = None, *, verify: bool = False, resolver: Resolver = methods.get
) -> Delta:
    """Read a delta. Its tensors are exactly the saved ones: nothing is ever initialised.

    Args:
        base: checks fingerprint, sites, ties and tensor names against it and moves the tensors to its device.
        verify: also measures the effect on the base's probe (`check_effect`).
        resolver: finds the record of a method by name; the default knows every method that was imported.
    Raises DeltaError for anything damaged, unsafe or incomplete, BaseMismatch for another base, UsageError for `verify`
    without a base.
    """
    if verify and base is None:
        raise UsageError("verify=True needs a base to measure the effect on", hint="load(folder, base, verify=True)")
    place, head = _open(folder)
    with _disk(place, 0, reading=True):
        if base is not None:
            _check_base(head, base, place)
        parts, complete = _build_parts(head, place, resolver)
        _check_sum(head, place)
        _fill(head, place, parts, base)
    delta = _assemble(head, parts, place)
    if complete and delta.digest != head["digest"]:
        raise DeltaError("the tensors and options do not give the digest in the header", where=str(place / HEADER))
    if base is not None:
        for part in parts:
            expected.check_part(part, base, str(place))
        delta.digest_checked = base
    if verify and base is not None:
        check_effect(base, delta)
    return delta


def peek(folder: str | Path) -> dict[str, Any]:
    """The checked header of a saved delta, without reading its tensors or knowing its methods. Raises DeltaError."""
    return _open(folder)[1]


def proof(delta: Delta, base: Base) -> str:
    """One line: tensors bound to sites of `base`, largest effect on its probe, bytes, digest."""
    entries = [(p, path) for p in delta.parts for path, _, _ in p.items()]
    known = {(s.path, s.kind) for s in base.sites.all()}
    bound = sum(1 for p, path in entries if not path or (path, p.kind_of.get(path, "")) in known)
    moved = effect(base, delta)["max_abs"]
    return (
        f"bound tensors {bound}/{len(entries)}, largest effect {moved:.6g}, {delta.nbytes:,} bytes, "
        f"digest {delta.digest[:12]}"
    )


# Writing


def _as_path(folder: str | Path) -> Path:
    text = os.fspath(folder)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise UsageError(f"{text!r} is no folder name")
    return Path(text)


@contextmanager
def _disk(path: Path, size: int, *, reading: bool = False) -> Iterator[None]:
    """Turn failures of the file system into errors that name the path."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        if reading:
            raise DeltaError(f"cannot be read ({_reason(e)})", where=str(path)) from None
        full = "No space left" in str(e) or "quota" in str(e).lower()
        hint = f"{size:,} bytes of tensors are needed; free some space or choose another folder; nothing was changed"
        other = "check that the folder is yours to write; nothing was changed"
        what = "the disk is full" if full else f"cannot be written ({_reason(e)})"
        raise ResourceError(what, where=str(path), hint=hint if full else other) from None


def _reason(e: Exception) -> str:
    return e.strerror if isinstance(e, OSError) and e.strerror else str(e)[:200]


def _check_target(target: Path) -> None:
    """Refuse to replace anything but a delta or an empty folder."""
    if not target.name:
        raise UsageError("is no folder a delta can be saved to", where=str(target))
    for place in (target, replace.aside(target)):
        if not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise UsageError("is a file, not a folder", where=str(place), hint="choose another name")
        if any(place.iterdir()) and not _is_delta(place):
            raise UsageError(
                "holds something that is not a delta, so it is not overwritten", where=str(place),
                hint="choose another folder, or empty this one",
            )  # fmt: skip


def _is_delta(folder: Path) -> bool:
    try:
        data = _read_limited(_regular(folder, HEADER))
        return str(header.strict_json(data, HEADER).get("format", "")).startswith("tunesmith-delta/")
    except (DeltaError, OSError):
        return False


def _collect(delta: Delta) -> dict[str, Tensor]:
    """The tensors to write, on the CPU and each in its own storage. Raises DeltaError for what must not be saved."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, t in delta.items():
        if t.dtype not in DTYPE_NAMES:
            raise DeltaError(f"dtype {t.dtype} cannot be stored", where=key, hint="one of " + ", ".join(DTYPES))
        if t.device.type == "meta":
            raise DeltaError("has no data (it is on the meta device)", where=key)
        value = t.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        if value.is_floating_point():
            wide = value.float() if value.element_size() == 1 else value
            bad = int((~torch.isfinite(wide)).sum())
            if bad:
                raise DeltaError(
                    f"{bad} of {value.numel()} values are NaN or infinite", where=f"tensor {key}",
                    hint="the training diverged; take the last good checkpoint",
                )  # fmt: skip
        out[key] = value
    if not out:
        raise DeltaError("has no tensors to save", where=f"delta {delta.name!r}")
    return out


def _provenance(delta: Delta, base: Base | None) -> dict[str, Any]:
    """The delta's provenance with base, numeric base, versions and effect filled in; the delta is left as it is."""
    facts = dict(delta.provenance)
    facts.setdefault("versions", _versions())
    if base is not None:
        if facts.get("base"):
            base.fingerprint.require_same(facts["base"], delta.name)
        else:
            facts["base"] = base.fingerprint.to_dict()
    made_for = facts.get("base")
    if isinstance(made_for, Mapping):
        facts.setdefault("numeric_base", {k: made_for.get(k, "") for k in ("dtype", "quantisation")})
    stored = facts.get("effect")
    if isinstance(stored, Mapping) and stored.get("digest") != delta.digest:
        del facts["effect"]  # of an earlier state of the tensors
    if base is not None and _can_measure(delta, base):
        facts["effect"] = effect(base, delta)
    return dict(header.plain(facts, "provenance", lossy=True))


def _can_measure(delta: Delta, base: Base) -> bool:
    """Whether there is a probe and everything the delta was trained on is in use."""
    if base.probe() is None:
        return False
    parents = delta.provenance.get("lineage") or []
    app = apply.current(base) if parents else None
    in_use = {v.delta.digest for v in app.stack} if app else set()
    return all(p["digest"] in in_use for p in parents)


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version(), "torch": str(torch.__version__)}
    out["tunesmith"] = str(getattr(sys.modules.get("tunesmith"), "__version__", "unknown"))
    out["safetensors"] = _version("safetensors")
    if "transformers" in sys.modules:
        out["transformers"] = _version("transformers")
    return out


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _describe(part: Part) -> dict[str, Any]:
    """The header's entry of one part, its options proven to survive JSON."""
    where = f"part {part.name!r} options"
    options = methods.config(part.method)
    stored = header.plain(options, where)
    if expected.retyped(part.info.cls, stored) != options:
        raise UsageError(
            "an option changes when stored as JSON", where=where, hint="use numbers, text, lists or tuples"
        )
    return {
        "name": part.name, "method": part.info.name, "options": stored, "carrier": part.info.carrier,
        "paper": part.info.paper, "scope": part.scope, "auto": bool(part.auto), "tied": part.tied, "alias": part.alias,
        "sites": [[path, kind] for path, kind in part.kind_of.items()],
    }  # fmt: skip


def _write(
    delta: Delta, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], fresh: Path
) -> tuple[str, dict[str, Any]]:
    """Write the three files; returns the sha256 of the tensor file and the header."""
    trains = {key: t.requires_grad for key, t in delta.items()}
    head: dict[str, Any] = {
        "format": FORMAT, "name": delta.name, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "written_by": _versions(), "parts": [_describe(p) for p in delta.parts],
        "tensors": {
            k: {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "trainable": trains[k]}
            for k, t in tensors.items()
        },
        "file": {"name": TENSORS, "bytes": 0, "sha256": ""}, "digest": delta.digest,
        "layout": header.plain(delta.layout, "layout"), "provenance": dict(facts),
    }  # fmt: skip
    header.check({**head, "header_sha256": ""}, f"delta {delta.name!r}", sealed=False)
    path = fresh / TENSORS
    save_file(dict(tensors), path, metadata={"format": "pt", "tunesmith": FORMAT})
    sha256 = _file_sha256(path)
    head["file"] = {"name": TENSORS, "bytes": path.stat().st_size, "sha256": sha256}
    data = header.encode(head)
    header.check(header.strict_json(data, HEADER), HEADER)
    (fresh / HEADER).write_bytes(data)
    (fresh / CARD).write_text(card.text(head), encoding="utf-8")
    os.chmod(path, stat.S_IMODE((fresh / HEADER).stat().st_mode))  # safetensors writes for the owner alone
    return sha256, head


def _compare(fresh: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the written folder back and compare every tensor bit for bit. Raises ResourceError for any difference."""
    place, head = _open(fresh)
    _check_sum(head, place)
    read = 0
    for key, value in _stored(head, place):
        want = tensors[key]
        if value.shape != want.shape or value.dtype != want.dtype or not _same_bits(value, want):
            raise ResourceError("was read back otherwise than written", where=f"{place}: {key}", hint="check the disk")
        read += 1
    if read != len(tensors):
        raise ResourceError(f"{read} of {len(tensors)} tensors were read back", where=str(place), hint="check the disk")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# Reading


def _open(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder to read and its checked header; the tensor file's own header agrees with it."""
    given = _as_path(folder)
    with _disk(given, 0, reading=True):
        place = replace.whole(given)
        if not place.exists():
            raise _nothing_here(given)
        _refuse_pickles(place)
        if not place.is_dir():
            raise DeltaError("is a file; a delta is a folder", where=str(place), hint=f"give the folder with {HEADER}")
        data = _read_limited(_regular(place, HEADER))
        where = str(place / HEADER)
        head = header.strict_json(data, where)
        header.check(head, where)
        expected.check_tensor_file(head, _regular(place, TENSORS))
    return place, head


def _nothing_here(path: Path) -> DeltaError:
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return DeltaError("there is no delta here", where=str(path), hint=nearest(path.name, siblings))


def _refuse_pickles(place: Path) -> None:
    """Pickle files run code when they are read, so their presence alone is refused."""
    for file in [place] if place.is_file() else sorted(place.iterdir()):
        if file.suffix.lower() in PICKLES:
            raise DeltaError(
                "is a pickle file, which is never loaded: it could run any code", where=str(file),
                hint=f"deltas are {HEADER} and {TENSORS}; remove the file or convert it to safetensors elsewhere",
            )  # fmt: skip


def _regular(folder: Path, name: str) -> Path:
    """The path of a plain file within the folder. Raises DeltaError for a missing file or a link that leaves it."""
    path = folder / name
    if not os.path.lexists(path):
        raise DeltaError(f"{name} is missing", where=str(folder), hint=f"a delta folder holds {', '.join(FILES)}")
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise DeltaError("is a link that leaves the folder", where=str(path), hint="copy the file into the folder")
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise DeltaError("is not a plain file", where=str(path))
    with open(real, "rb") as f:
        start = f.read(9)
    if start.startswith(_MAGICS) and start[8:9] != b"{":
        raise DeltaError("is a pickle or zip file, which is never loaded: it could run any code", where=str(path))
    return real


def _read_limited(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(header.JSON_LIMIT + 1)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_sum(head: Mapping[str, Any], place: Path) -> None:
    if _file_sha256(_regular(place, TENSORS)) != head["file"]["sha256"]:
        raise DeltaError(
            "was altered or damaged after it was saved (sha256 differs)", where=str(place / TENSORS),
            hint="fetch or save the delta again",
        )  # fmt: skip


def _check_base(head: Mapping[str, Any], base: Base, place: Path) -> None:
    made_for = head["provenance"].get("base")
    if not made_for:
        raise DeltaError(
            "does not say which base it was made for", where=str(place / HEADER),
            hint="load it without a base, and save it with save(delta, folder, base=base)",
        )  # fmt: skip
    base.fingerprint.require_same(made_for, head["name"])


def _build_parts(head: Mapping[str, Any], place: Path, resolver: Resolver) -> tuple[list[Part], bool]:
    """The parts without tensors, and whether the file names every option of its methods."""
    parts, complete = [], True
    for entry in head["parts"]:
        where = f"{place / HEADER} part {entry['name']!r}"
        info, method = expected.build_method(entry, where, resolver)
        complete = complete and len(methods.config(method)) == len(entry["options"])
        for path, kind in entry["sites"]:
            if kind not in info.kinds:
                raise DeltaError(f"{info.name} does not attach to a {kind}", where=f"{where} site {path!r}")
        parts.append(
            Part(
                method, [(path, kind) for path, kind in entry["sites"]], name=entry["name"], scope=entry["scope"],
                auto=entry["auto"], alias=entry["alias"], tied=entry["tied"],
            )
        )  # fmt: skip
    return parts, complete


def _stored(head: Mapping[str, Any], place: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file in the order of the manifest, in memory of its own."""
    path = _regular(place, TENSORS)
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            for key, entry in head["tensors"].items():
                value = f.get_tensor(key).clone()  # the file may be replaced while the delta is in use
                if value.dtype != DTYPES[entry["dtype"]] or list(value.shape) != entry["shape"]:
                    raise DeltaError("has not the dtype and shape of the manifest", where=f"{place / TENSORS}: {key}")
                yield key, value
    except SafetensorError as e:
        raise DeltaError(f"was altered or cut off: {str(e)[:200]}", where=str(place / TENSORS)) from None


def _fill(head: Mapping[str, Any], place: Path, parts: list[Part], base: Base | None) -> None:
    by_name = {p.name: p for p in parts}
    device = None if base is None else base.device
    for key, value in _stored(head, place):
        part, path, name = header.split_key(key)
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise DeltaError("holds NaN or infinity", where=f"{place / TENSORS}: {key}")
        moved = value if device is None else value.to(device)
        by_name[part].put(path, name, moved, trainable=head["tensors"][key]["trainable"])


def _assemble(head: Mapping[str, Any], parts: list[Part], place: Path) -> Delta:
    delta = Delta(head["name"], parts, provenance=head["provenance"])
    delta.layout = dict(head["layout"])
    return delta
