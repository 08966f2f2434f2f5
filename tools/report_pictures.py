# SPDX-License-Identifier: Apache-2.0
"""Write the pictures of a report page as SVG files of their own, in the page's light colours on white.

    python tools/report_pictures.py runs/demo/diff/diff.html docs/pictures --prefix demo-

Pictures in a page take their colours from it and carry no name space; a file needs both. Each is named after its place and
its caption.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from pathlib import Path

_FIGURE = re.compile(r"<figure><figcaption>(.*?)</figcaption>\s*(<svg.*?</svg>)\s*</figure>", re.S)
_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def pictures(page: str) -> list[tuple[str, str]]:
    """(caption, SVG document) of every figure. Raises ValueError for a colour that the page does not define."""
    root = re.search(r":root\s*\{([^}]*)\}", page)
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", root.group(1) if root else ""))
    made = []
    for caption, svg in _FIGURE.findall(page):
        unknown = set(re.findall(r"var\((--[\w-]+)\)", svg)) - set(colours)
        if unknown:
            raise ValueError(f"the page defines no {sorted(unknown)[0]}")
        svg = re.sub(r"var\((--[\w-]+)\)", lambda m: colours[m.group(1)].strip(), svg)
        svg = svg.replace(' href="#', ' xlink:href="#')
        opened = svg.index(">") + 1
        head = svg[:opened].replace("<svg ", f"<svg {_SPACES} ", 1)
        made.append((html.unescape(caption), f'{head}<rect width="100%" height="100%" fill="white"/>{svg[opened:]}\n'))
    return made


def main(argv: list[str] | None = None) -> int:
    """Write the files and list them; 1 where the page has no picture."""
    parser = argparse.ArgumentParser(description="the pictures of a report page as files")
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prefix", default="")
    given = parser.parse_args(argv)
    found = pictures(given.page.read_text(encoding="utf-8"))
    given.folder.mkdir(parents=True, exist_ok=True)
    for i, (caption, svg) in enumerate(found, 1):
        slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48].strip("-")
        path = given.folder / f"{given.prefix}{i:02d}-{slug}.svg"
        path.write_text(svg, encoding="utf-8")
        print(f"{path}: {caption}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
