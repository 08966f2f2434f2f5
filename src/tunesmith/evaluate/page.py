# SPDX-License-Identifier: Apache-2.0
"""The shell of a self-contained page: inline style, no script and no address outside the file.

All text is escaped, since prompts and model outputs are hostile, and a content policy in the page forbids scripts and
loading anything even if an escape were missed. Light and dark follow the reader's system.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tunesmith.evaluate.summary import visible

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #6a6f78; --line: #e3e1dc;
  --base: #8a93a3; --tuned: #1f6feb; --good: #1a7f4b; --bad: #c0322b; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e6e7ea; --soft: #9aa1ad;
  --line: #30353e; --base: #8f99aa; --tuned: #6cb0ff; --good: #5fd08f; --bad: #ff8078; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 40px 0 12px; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.proof { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--tuned);
  border-radius: 8px; padding: 12px 16px; margin: 20px 0 0; overflow-wrap: anywhere; }
.proof.bad-edge { border-left-color: var(--bad); } .proof.good-edge { border-left-color: var(--good); }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 1px 10px;
  font-size: 13px; font-weight: 600; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 9px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 500; font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
figcaption { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  margin-bottom: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px; margin-top: 10px; }
.label { color: var(--soft); font-size: 13px; }
pre { margin: 2px 0 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace;
  max-height: 300px; overflow-y: auto; }
.pair > div { border-top: 3px solid var(--base); padding-top: 8px; }
.pair > div.tuned { border-top-color: var(--tuned); }
.next pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
@media print { .sample, figure, tr { break-inside: avoid; } pre { max-height: none; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, body: str) -> str:
    """The whole page. `title` is plain text, `body` markup."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def escaped(value: str, limit: int | None = None) -> str:
    """Escaped text with control and direction-changing characters shown."""
    return escape(visible(value, limit), quote=True)


def section(title: str, content: str) -> str:
    """A titled part of the page; nothing where it has no content. Both are markup."""
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are already escaped."""
    head = "".join(f"<th>{h}</th>" for h in header)
    body = "\n".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def figures(pictures: Iterable[tuple[str, str]]) -> str:
    """(caption, svg) pairs as a grid; nothing for none."""
    made = "\n".join(f"<figure><figcaption>{escaped(c)}</figcaption>\n{svg}\n</figure>" for c, svg in pictures)
    return f'<div class="plots">\n{made}\n</div>' if made else ""
