# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile input ends in a DataError that says where and what to do, or is skipped and counted."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, UsageError
from tunesmith.data import Limits, read

GOOD = b'{"text": "fine"}\n'


def _write(folder: Path, content: bytes, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


WHOLE_FILE = [
    ("x.jsonl", b"", "the file is empty"),
    ("x.csv", b"", "the file is empty"),
    ("x.jsonl.gz", gzip.compress(b"", mtime=0), "the file is empty"),
    ("x.jsonl", b"\n \n\n", "there are no rows"),
    ("x.csv", b"text,label\n", "there are no rows"),
    ("x.json", b"[]", "there are no rows"),
    ("x.jsonl", b"\x00\x01\x02" * 50, "the file is binary"),
    ("x.jsonl", gzip.compress(GOOD, mtime=0), r"the file is binary, not text\n.*gzip data; name it with .gz"),
    ("x.csv", b"PK\x03\x04rest", "zip archive"),
    ("x.txt", "text".encode("utf-16"), r"UTF-16, not UTF-8\n.*iconv"),
    ("x.jsonl.gz", GOOD, "gzip data is damaged"),
    ("x.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], "gzip data is damaged"),
    ("x.json", b'{"a": ', r"not JSON .*\n.*json.tool"),
    ("x.json", b"3", "not a list of objects"),
    ("x.csv", b"a,a\n1,2\n", "column 'a' appears twice"),
    ("x.npz", b"not a zip", "not a readable .npz"),
    ("x.npz", b"", "the file is empty"),
    ("x.parquet", b"nonsense", "Parquet data cannot be read"),
    ("x.jsnol", GOOD, "did you mean '.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), WHOLE_FILE)
def test_unusable_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = _write(tmp_path, content, name)
    for mode in ("raise", "skip"):
        with pytest.raises(DataError, match=message) as err:
            read(path, on_error=mode)  # type: ignore[arg-type]
        assert str(path) in str(err.value)


BAD_LINES = [
    (b"{broken", "not JSON"),
    (b'{"text": "caf\xe9"}', r"not UTF-8 \(byte 0xe9 at 13\)"),
    (b"[1, 2]", "a row must be an object with named columns, this is a list"),
    (b'{"text": 3}', "text is a int, not text"),
    (b'{"text": null}', "text is missing"),
    (b'{"text": "  "}', "text is empty"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
    (b"[" * 100_000, "nested too deeply|not JSON"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not usable JSON"),
    (b'{"prompt": "q", "response": "a"}', "has the form prompt/response .chat., the first row had text"),
    (b'{"text": "a", "label": 1}', "has the form text/label"),
    (b'{"txet": "a"}', "'txet': did you mean 'text'"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_names_file_line_and_reason_or_is_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    path = _write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=reason) as err:
        read(path)
    assert f"{path}:3: " in str(err.value)
    got = read(path, on_error="skip")
    assert len(got) == 2
    assert got.report.seen == 3
    (skipped,) = got.report.skipped
    assert (skipped.file, skipped.line) == (str(path), 3)
    assert skipped.reason in str(err.value)


def test_half_broken_file_keeps_the_good_half(tmp_path: Path) -> None:
    path = _write(tmp_path, b"".join(GOOD if i % 2 else b'{"text": "cut off\n' for i in range(100)))
    report = read(path, on_error="skip").report
    assert (report.rows, len(report.skipped)) == (50, 50)
    assert "50 skipped, first at 1" in report.summary()
    with pytest.raises(DataError, match=r"none of the 3 rows can be used\n.*line 1: not JSON"):
        read(_write(tmp_path, b"x\ny\nz\n"), on_error="skip")


CHAT_FAULTS: list[tuple[Any, str]] = [
    ([], "messages is an empty list"),
    ("hello", "messages is a str, not a list"),
    (["hello"], "message 1 is a str"),
    ([{"content": "x"}], "message 1 has no role"),
    ([{"role": "asistant", "content": "x"}], "unknown role 'asistant'; did you mean 'assistant'"),
    ([{"role": "user", "content": [1]}], r"message 1 \(user\) is a list, not text"),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], r"message 2 \(assistant\) is empty"),
    ([{"role": "assistant", "content": None, "tool_calls": [1]}], "tool calls without content"),
]


@pytest.mark.parametrize(("messages", "reason"), CHAT_FAULTS)
def test_faulty_conversations(messages: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as err:
        read([{"messages": messages}])
    assert "<list>, row 1" in str(err.value)


LABEL_FAULTS: list[tuple[list[Any], dict[str, Any], str]] = [
    ([1, float("nan")], {}, "the label is nan"),
    ([0.5, float("inf")], {}, "the label is inf"),
    (["a", None], {}, r"the label is missing \(null\)"),
    (["a", ""], {}, "the label is empty"),
    (["a", 3], {}, "the label is a number, the first label was a name"),
    ([True, "a"], {}, "the label is a name, the first label was a truth value"),
    ([0, -1], {}, "the label -1 is negative"),
    ([0, 10**6], {}, "the label 1000000 does not exist"),
    ([0, 10**5000], {}, "more than 18 digits"),
    ([0.5, 10**5000], {}, "more than 18 digits is not a number that regression can use"),
    (["a", ["b"]], {}, "the label is a list"),
    (["yes", "noo"], {"labels": ["yes", "no"]}, "the label 'noo' does not exist; did you mean 'no'"),
    ([1, 2], {"labels": ["yes", "no"]}, "the label 2 does not exist; classes are 0 to 1"),
    (["1", "x"], {"format": "regression"}, "'1' is not a number that regression can use"),
    ([1, 1.5], {"format": "classification"}, "the label 1.5 is not a whole number"),
]


@pytest.mark.parametrize(("values", "extra", "reason"), LABEL_FAULTS)
def test_faulty_labels(values: list[Any], extra: dict[str, Any], reason: str) -> None:
    rows = [{"text": "t", "label": v} for v in values]
    with pytest.raises(DataError, match=reason):
        read(rows, **extra)
    report = (
        read([{"text": "t", "label": values[0]}, *rows], on_error="skip", **extra).report if values[0] != "1" else None
    )
    assert report is None or report.skipped[-1].line == 3


def test_csv_nan_and_ragged_rows(tmp_path: Path) -> None:
    path = _write(tmp_path, b'text,label\na,1\nb,NaN\nc\nd,1,2\n"e\ne",2\nf,\n\xe9,1\ng,0\n', "x.csv")
    report = read(path, on_error="skip").report
    assert {s.line: s.reason for s in report.skipped} == {
        3: "the label is NaN",
        4: "ragged row: 1 cells where the header has 2",
        5: "ragged row: 3 cells where the header has 2",
        8: "the label is empty",
        9: "not UTF-8",
    }
    assert report.rows == 3
    with pytest.raises(DataError, match=r"x\.csv:4: ragged row"):
        read(path)


def test_tags_must_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 tokens but 1 tags"):
        read([{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(DataError, match="the tag 'B-PRE' does not exist; did you mean 'B-PER'"):
        read([{"tokens": ["a"], "tags": ["B-PRE"]}], labels=["O", "B-PER"])


def test_missing_paths_offer_the_nearest(tmp_path: Path) -> None:
    _write(tmp_path, GOOD, "train.jsonl")
    with pytest.raises(DataError, match=r"no such file\n.*did you mean 'train.jsonl'"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="did you mean"):
        read(tmp_path.parent / (tmp_path.name + "x") / "train.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read(str(tmp_path) + "/a\0b.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read(str(tmp_path / ("a" * 5000)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data"):
        read(tmp_path / "empty")


def test_devices_and_pipes_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "x.jsonl")


def test_wrong_arguments_name_the_nearest() -> None:
    rows = [{"text": "t", "label": "a"}]
    for kw, message in [
        ({"format": "clasification"}, "did you mean 'classification'"),
        ({"columns": {"promt": "text"}}, "did you mean 'prompt'"),
        ({"on_error": "skp"}, "did you mean 'skip'"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"labels": ["a", "a"]}, "names a label twice"),
        ({"labels": ["1"], "format": "regression"}, "regression has no label list"),
        ({"labels": ["1"], "format": "text"}, "the data is of kind text"),
    ]:
        with pytest.raises(UsageError, match=message):
            read(rows, **kw)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        read(rows, columns={"text": "txt"})
    with pytest.raises(UsageError, match="cannot read data from a int"):
        read(3)


def test_huge_line_is_passed_over_without_being_held(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD + b'{"text": "' + b"a" * 3_000_000 + b'"}\n' + GOOD)
    limits = Limits(line=1000)
    with pytest.raises(DataError, match=r"x\.jsonl:2: the line is longer than 1000 bytes"):
        read(path, limits=limits)
    got = read(path, limits=limits, on_error="skip")
    assert [s.line for s in got.report.skipped] == [2]
    assert len(got) == 2
    exact = _write(tmp_path, GOOD.ljust(1000).replace(b"\n", b" ") + b"\n", "y.jsonl")
    assert len(read(exact, limits=limits)) == 1
    assert read(_write(tmp_path, b"a " * 900, "z.txt")).kind == "text"
    with pytest.raises(DataError, match="longer than 1000 bytes"):
        read(tmp_path / "z.txt", limits=limits)
    many_lines = _write(tmp_path, b"word word word\n" * 100, "p.txt")
    with pytest.raises(DataError, match="the paragraph is longer than 1000 bytes"):
        read(many_lines, limits=limits)


def test_gz_bomb_stops_at_the_bound(tmp_path: Path) -> None:
    bomb = _write(tmp_path, gzip.compress(GOOD * 100_000), "x.jsonl.gz")
    assert bomb.stat().st_size < 10_000
    for mode in ("raise", "skip"):
        with pytest.raises(DataError, match="expands to more than 100000 bytes"):
            read(bomb, limits=Limits(expanded=100_000), on_error=mode)  # type: ignore[arg-type]
    assert Limits().expanded == 2 * 2**30
    assert Limits().line == 32 * 2**20


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_npz_with_pickles_is_refused_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", X=np.array([_Evil()], dtype=object), y=np.zeros(1))
    with pytest.raises(DataError, match="array 'X' holds pickled Python objects"):
        read("x.npz")
    with zipfile.ZipFile("y.npz", "w") as z:
        z.writestr("X.npy", pickle.dumps(_Evil()))
    with pytest.raises(DataError, match="not a readable .npz"):
        read("y.npz")
    assert not (tmp_path / "pwned").exists()


def test_npz_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 8, 8), }"
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as z:
        z.writestr("X.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(DataError, match="claims more data than the file holds"):
        read(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "y.npz", X=np.zeros((100, 100, 100)), y=np.zeros(100))
    with pytest.raises(DataError, match="expands to more than 1000 bytes"):
        read(tmp_path / "y.npz", limits=Limits(expanded=1000))


def test_npz_shapes_and_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, A=np.zeros(3))
    with pytest.raises(DataError, match=r"has no X_train/y_train.*\n.*it holds: A"):
        read(path)
    np.savez(path, X=np.zeros((3, 2, 2)), y=np.zeros(2))
    with pytest.raises(DataError, match="has 3 items but 'y' has shape"):
        read(path)
    x = np.zeros((3, 2, 2))
    x[1, 0, 0] = np.nan
    np.savez(path, X=x, y=np.array([0, 1, 1]))
    with pytest.raises(DataError, match="row 2: image holds NaN"):
        read(path)
    assert len(read(path, on_error="skip")) == 2


ROWS = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "messages", "role",
                "content", "tokens", "tags", "prompt", "chosen", "rejected", "response", "image", "q"]), v, max_size=4),
            max_leaves=12,
        ).map(lambda v: json.dumps(v).encode()),
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=ROWS, name=st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.txt", "x.jsonl.gz", "x.npz", "x.parquet"]))
def test_arbitrary_bytes_never_raise_anything_but_data_error(tmp_path: Path, lines: list[bytes], name: str) -> None:
    path = _write(tmp_path, b"\n".join(lines), name)
    for mode in ("raise", "skip"):
        try:
            got = read(path, on_error=mode)  # type: ignore[arg-type]
        except DataError:
            continue
        assert len(got) > 0
        assert len(got.digest) == 64
        assert got.report.seen == len(got) + len(got.report.skipped)


@settings(max_examples=100, deadline=None)
@given(
    value=st.dictionaries(
        st.sampled_from(["text", "label", "tokens", "tags", "image", "audio", "messages", "text_pair"]),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=8),
            lambda v: (
                st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(["bytes", "array", "role"]), v, max_size=2)
            ),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_arbitrary_values_never_raise_anything_but_data_error(value: dict[str, Any]) -> None:
    try:
        got = read([value])
    except DataError:
        return
    assert len(got.digest) == 64
