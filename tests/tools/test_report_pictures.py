# SPDX-License-Identifier: Apache-2.0
"""Pictures out of a report page are whole documents with colours of their own."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tunesmith.evaluate.page import figures, page
from tunesmith.evaluate.svg import TUNED, svg


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location(
        "report_pictures", Path(__file__).parents[2] / "tools" / "report_pictures.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_figure_is_a_file_that_parses(tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = svg(lambda axes: axes.plot([1, 2], [3, 4], color=TUNED, marker="o"), "p")
    place = tmp_path / "report.html"
    place.write_text(page("report", figures([("size & rank, by depth", drawn), ("second", drawn)])))
    assert tool.main([str(place), str(tmp_path / "out"), "--prefix", "x-"]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == ["x-01-size-rank-by-depth.svg", "x-02-second.svg"]
    assert "size & rank, by depth" in capsys.readouterr().out
    for f in files:
        text = f.read_text()
        assert "var(" not in text and "#1f6feb" in text
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_page_without_pictures_or_colours_is_told(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "none.html").write_text(page("report", "<p>nothing</p>"))
    assert tool.main([str(tmp_path / "none.html"), str(tmp_path / "out")]) == 1
    with pytest.raises(ValueError, match="--ink"):
        tool.pictures('<figure><figcaption>c</figcaption><svg style="fill: var(--ink)"></svg></figure>')
