# SPDX-License-Identifier: Apache-2.0
"""The header of a saved delta (`delta.json`): strict reading, checking, and the rules for every name in it.

Nothing in a header is trusted. It is read with limits on size and depth, duplicate keys and non-finite numbers are
refused, and every field has one type, so that what comes out of `check` can be used without looking again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tunesmith.core.errors import DeltaError, UsageError, nearest
from tunesmith.core.fingerprint import Fingerprint
from tunesmith.core.method import CARRIERS
from tunesmith.core.sites import KINDS

FORMAT = "tunesmith-delta/1"
HEADER, TENSORS, CARD = "delta.json", "delta.safetensors", "README.md"
FILES = (HEADER, TENSORS, CARD)
JSON_LIMIT = 64 << 20
DEPTH_LIMIT = 32
NAME_LIMIT = 512
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}

_TOP: dict[str, type] = {
    "format": str, "name": str, "created": str, "written_by": dict, "parts": list, "tensors": dict, "file": dict,
    "digest": str, "layout": dict, "provenance": dict, "header_sha256": str,
}  # fmt: skip
_PART: dict[str, type] = {
    "name": str, "method": str, "options": dict, "carrier": str, "paper": str, "scope": str, "auto": bool, "tied": str,
    "alias": dict, "sites": list,
}  # fmt: skip
_ENTRY: dict[str, type] = {"dtype": str, "shape": list, "trainable": bool}
_FILE: dict[str, type] = {"name": str, "bytes": int, "sha256": str}
_TIED = ("both", "untie", "error")


def strict_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises DeltaError for anything odd: size, depth, duplicates, NaN, bad text."""
    if len(data) > JSON_LIMIT:
        raise DeltaError(f"larger than the {JSON_LIMIT >> 20} MiB a header may have", where=where)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise DeltaError(f"the key {twice!r} stands there twice", where=where)
        return out

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise DeltaError(f"{text[:40]} is not a finite number", where=where)
        return value

    try:
        root = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_float=number, parse_constant=lambda t: number(t)
        )
    except RecursionError:
        raise DeltaError(f"nested deeper than {DEPTH_LIMIT} levels", where=where) from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as e:
        raise DeltaError(f"is not JSON: {e}", where=where, hint="the file is damaged; fetch or save it again") from None
    if not isinstance(root, dict):
        raise DeltaError(f"holds a {type(root).__name__} where an object belongs", where=where)
    _check_depth(root, where)
    if b"\\u" in data:  # in valid UTF-8 only an escape can make half a pair
        _check_text(root, where)
    return root


def _check_depth(root: Any, where: str) -> None:
    """Refuse deep nesting, level by level."""
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise DeltaError(f"nested deeper than {DEPTH_LIMIT} levels", where=where)
        members = (m for v in level for m in (v.values() if type(v) is dict else v))
        level = [m for m in members if type(m) is dict or type(m) is list]


def _check_text(root: Any, where: str) -> None:
    """Refuse text that is no Unicode, in keys and values."""
    below = [root]
    while below:
        value = below.pop()
        if isinstance(value, dict | list):
            below += value
            below += value.values() if isinstance(value, dict) else ()
        elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise DeltaError("holds text that is not Unicode (a lone surrogate)", where=where)


def plain(value: Any, where: str, *, lossy: bool = False) -> Any:
    """`value` as JSON data. Raises UsageError naming what cannot be stored.

    Non-finite numbers become null where `lossy` (a metric may be undefined), and are refused elsewhere.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if lossy:
            return None
        raise UsageError(f"{value} cannot be stored: it is not finite", where=where)
    if isinstance(value, Mapping):
        wrong = [k for k in value if not isinstance(k, str)]
        if wrong:
            raise UsageError(f"the key {wrong[0]!r} is not text", where=where, hint="use string keys")
        return {k: plain(v, f"{where}.{k}", lossy=lossy) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", lossy=lossy) for i, v in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of torch or numpy
        return plain(value.item(), where, lossy=lossy)
    raise UsageError(
        f"a {type(value).__name__} cannot be stored", where=where, hint="store text, numbers, booleans, lists or dicts"
    )


def encode(header: Mapping[str, Any]) -> bytes:
    """The bytes of `delta.json`, with its own checksum filled in."""
    full = {**header, "header_sha256": checksum(header)}
    return (json.dumps(full, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def checksum(header: Mapping[str, Any]) -> str:
    """sha256 of the header without its checksum, in canonical form."""
    body = {k: v for k, v in header.items() if k != "header_sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_name(value: str, what: str, where: str, *, forbid: str = "/\\:") -> None:
    """Refuse names that could leave a folder, hide or break a line. Raises DeltaError."""
    why = None
    if not value or len(value) > NAME_LIMIT:
        why = f"must have 1 to {NAME_LIMIT} characters"
    elif not value.isprintable():
        why = "holds characters that cannot be shown"
    elif any(c in value for c in forbid):
        why = "may not hold " + " or ".join(repr(c) for c in forbid if c in value)
    elif ".." in value or value.startswith(".") or value.endswith("."):
        why = "may not hold '..' nor begin or end with '.'"
    if why:
        raise DeltaError(f"{what} {value[:80]!r} {why}", where=where)


def check_delta_name(value: str, where: str) -> None:
    """The name of a delta may have `/` within (`bundle/scope`), but is no absolute or climbing path."""
    check_name(value, "the delta name", where, forbid="\\")
    if re.match(r"[A-Za-z]:/", value) or not all(value.split("/")) or any(s.startswith(".") for s in value.split("/")):
        raise DeltaError(f"the delta name {value[:80]!r} looks like a file path", where=where)


def check(header: Mapping[str, Any], where: str, *, sealed: bool = True) -> None:
    """Check every field of a header. `sealed` also compares its checksum. Raises DeltaError naming the field."""
    version = header.get("format")
    if version != FORMAT:
        known = isinstance(version, str) and version.startswith("tunesmith-delta/")
        what = f"format {version!r} is not one this version reads" if known else "this is not the header of a delta"
        raise DeltaError(
            what, where=where, hint=f"readable: {FORMAT!r}" + ("; a newer tunesmith may do" if known else "")
        )
    _fields(header, _TOP, where)
    check_delta_name(header["name"], where)
    for key, value in (("digest", header["digest"]), ("sha256", header["file"].get("sha256", ""))):
        if sealed and not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
            raise DeltaError(f"{key!r} is no sha256", where=where)
    _fields(header["file"], _FILE, f"{where} file")
    if header["file"]["name"] != TENSORS:
        raise DeltaError(f"the tensor file must be {TENSORS!r}, not {header['file']['name'][:80]!r}", where=where)
    sites: dict[str, set[str]] = {}
    for i, part in enumerate(header["parts"]):
        _fields(part, _PART, f"{where} parts[{i}]")
        if part["name"] in sites:
            raise DeltaError(f"two parts are called {part['name']!r}", where=where)
        sites[part["name"]] = _check_part(part, where)
    for key, entry in header["tensors"].items():
        _check_entry(key, entry, sites, where)
    if not header["tensors"]:
        raise DeltaError("lists no tensors", where=where, hint="a delta without tensors changes nothing")
    _check_provenance(header["provenance"], where)
    if sealed and header["header_sha256"] != checksum(header):
        raise DeltaError(
            "was altered after it was saved (its checksum differs)", where=where, hint="fetch or save the delta again"
        )


def _fields(value: Any, spec: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise DeltaError(f"must be an object, not {type(value).__name__}", where=where)
    for key in value:
        if key not in spec:
            raise DeltaError(f"unknown field {key[:80]!r}", where=where, hint=nearest(key[:80], spec))
    for key, kind in spec.items():
        if key not in value:
            raise DeltaError(f"the field {key!r} is missing", where=where, hint="the header is incomplete")
        if type(value[key]) is not kind:
            raise DeltaError(f"{key!r} must be {kind.__name__}, not {type(value[key]).__name__}", where=where)


def _check_part(part: Mapping[str, Any], where: str) -> set[str]:
    """Check one part and return its site paths."""
    here = f"{where} part {part['name'][:80]!r}"
    check_name(part["name"], "the part name", where)
    check_name(part["method"], "the method name", here)
    if part["scope"]:
        check_name(part["scope"], "the scope", here)
    _choice(part["carrier"], CARRIERS, "carrier", here)
    _choice(part["tied"], _TIED, "tied", here)
    paths: set[str] = set()
    for item in part["sites"]:
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(v, str) for v in item)):
            raise DeltaError(f"a site must be [path, kind], not {str(item)[:80]}", where=here)
        path, kind = item
        _check_site(path, here)
        _choice(kind, KINDS, "site kind", f"{here} site {path!r}")
        if path in paths:
            raise DeltaError(f"the site {path!r} is listed twice", where=here)
        paths.add(path)
    if not paths:
        raise DeltaError("has no sites", where=here, hint="it would change nothing")
    for other, path in part["alias"].items():
        _check_site(other, here)
        if not isinstance(path, str) or path not in paths or other in paths:
            raise DeltaError(f"the alias {other!r} must name one of the part's sites", where=here)
    return paths


def _check_site(path: str, where: str) -> None:
    if path:  # the empty path is the model itself
        check_name(path, "the site", where, forbid="/\\")


def _choice(value: str, choices: Iterable[str], what: str, where: str) -> None:
    if value not in choices:
        raise DeltaError(f"unknown {what} {value[:80]!r}", where=where, hint=nearest(value[:80], choices))


def split_key(key: str) -> tuple[str, str, str]:
    """(part, site path, tensor name) of a tensor key. Raises DeltaError for another shape."""
    pieces = key.split("/")
    if len(pieces) != 3:
        raise DeltaError(f"the tensor key {key[:120]!r} is not part/site/name")
    return pieces[0], pieces[1], pieces[2]


def _check_entry(key: str, entry: Any, sites: Mapping[str, set[str]], where: str) -> None:
    here = f"{where} tensor {key[:120]!r}"
    part, path, name = split_key(key)
    if part not in sites:
        raise DeltaError(f"belongs to no part: {part[:80]!r}", where=here, hint=nearest(part[:80], sites))
    if path and path not in sites[part]:
        raise DeltaError(f"part {part!r} has no site {path[:80]!r}", where=here, hint=nearest(path[:80], sites[part]))
    check_name(name, "the tensor name", here)
    _fields(entry, _ENTRY, here)
    _choice(entry["dtype"], DTYPES, "dtype", here)
    if not all(type(n) is int and 0 <= n < 2**48 for n in entry["shape"]) or len(entry["shape"]) > 16:
        raise DeltaError(f"has the impossible shape {str(entry['shape'])[:80]}", where=here)
    if math.prod(entry["shape"]) >= 2**48:
        raise DeltaError(f"has the impossible shape {str(entry['shape'])[:80]}", where=here)


def _check_provenance(provenance: Mapping[str, Any], where: str) -> None:
    """The fields that code relies on: the base's fingerprint, the lineage, the effect."""
    here = f"{where} provenance"
    if "base" in provenance:
        if not isinstance(provenance["base"], dict) or not isinstance(provenance["base"].get("digest"), str):
            raise DeltaError("the base fingerprint in the delta is damaged", where=here)
        Fingerprint.from_dict(provenance["base"])
    lineage = provenance.get("lineage")
    if lineage is not None:
        good = isinstance(lineage, list) and all(
            isinstance(p, dict) and isinstance(p.get("digest"), str) and isinstance(p.get("name"), str) for p in lineage
        )
        if not good:
            raise DeltaError("the lineage must list {digest, name} of the parents", where=here)
    if "untrained" in provenance and not isinstance(provenance["untrained"], bool):
        raise DeltaError("'untrained' must be true or false", where=here)
    if provenance.get("effect") is not None and not isinstance(provenance["effect"], dict):
        raise DeltaError("the stored effect is damaged", where=here)
