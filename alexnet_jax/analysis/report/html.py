"""A web page in one file: text, tables and figures, no script, nothing fetched.

Everything that is not `Markup` is escaped. A figure is put in as it is drawn, as a data
URL; the page's policy forbids every request, so that a name in the data can never make
a browser ask for anything.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

_DPI = 120
# An inch of a figure in CSS pixels.
_CSS_INCH = 96
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #59636e; --line: #d8dee4;
  --paper: #fff; --panel: #f5f7f9; --mark: #4477aa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa6b2;
  --line: #3a434d; --paper: #15191e; --panel: #1f252c; --mark: #6fa3d8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica,
  Arial, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.missing { border-left: 4px solid #cc7700; background: var(--panel);
  padding: .6rem .9rem; }
.tiles { display: grid; gap: .6rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(9.4rem, 1fr)); }
.tile { background: var(--panel); border-radius: 8px; padding: .7rem .85rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.tile span { display: block; font-size: .82rem; line-height: 1.35; color: var(--soft); }
.pair, .grid { display: grid; gap: 1rem 1.5rem; align-items: start; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.grid { grid-template-columns: repeat(auto-fill, minmax(max(9rem, 22%), 1fr));
  gap: .8rem; }
.grid figure, .pair figure { margin: 0; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
  border-radius: 6px; }
.pair img, .grid img { width: 100%; }
.pair > div, .grid > div { min-width: 0; }
.pair h3 { margin-top: .6rem; }
figcaption { margin-top: .35rem; line-height: 1.4; max-width: 46rem; }
.scroll { overflow-x: auto; margin: .7rem 0; }
.scroll.figure img { max-width: none; }
@media (min-width: 64rem) { .scroll.figure img { max-width: 100%; } }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; white-space: nowrap; }
.r { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { min-width: 6rem; vertical-align: middle; }
@media (max-width: 30rem) { th, td { padding-right: .55rem; }
  td.bar { min-width: 3rem; } }
td.bar i { display: block; height: .6rem; min-width: 1px; border-radius: 2px;
  background: var(--mark); print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: .84rem; }
pre { background: var(--panel); border-radius: 6px; padding: .7rem .9rem; margin: .5rem 0;
  overflow-x: auto; line-height: 1.5; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; }
@page { size: A4; margin: 16mm 15mm; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --panel: #f3f4f6;
    --mark: #4477aa; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { margin-top: 1.6rem; }
  h2, h3 { break-after: avoid; }
  figure, .tile, tr, .missing { break-inside: avoid; }
  figure img, .scroll.figure img { max-width: 100%; max-height: 235mm; }
  .pair { grid-template-columns: 1fr 1fr; gap: .6rem 1rem; }
  .grid { grid-template-columns: repeat(4, 1fr); }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; line-height: 1.25; }
  th, td { padding: .16rem .5rem .16rem 0; overflow-wrap: anywhere; }
  td.bar { min-width: 2.5rem; }
  pre, code { font-size: 7.5pt; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; display: block; }
}
"""


class Markup(str):
    """HTML that is put in as it is."""

    __slots__ = ()


def text(words: Any) -> Markup:
    """Escaped, unless it is `Markup`."""
    return words if isinstance(words, Markup) else Markup(html.escape(str(words)))


def joined(*parts: Any) -> Markup:
    """Parts one after the other, each escaped unless it is `Markup`."""
    return Markup("".join(text(part) for part in parts))


def paragraph(*parts: Any, kind: str = "") -> Markup:
    """A paragraph; of kind "soft", or "missing" for what the page has to do without."""
    attribute = f' class="{kind}"' if kind else ""
    return Markup(f"<p{attribute}>{joined(*parts)}</p>\n")


def code(words: str) -> Markup:
    """Words of a command or a file in a line of text."""
    return Markup(f"<code>{text(words)}</code>")


def block(words: str) -> Markup:
    """Lines as they are, such as commands."""
    return Markup(f"<pre><code>{text(words)}</code></pre>\n")


def bar(share: float) -> Markup:
    """A bar of a cell's width at a share of 1, for `table` with the column "b"."""
    width = 100 * min(share, 1.0)
    return Markup(f'<i style="width:{width:.1f}%"></i>' if width > 0 else "")


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, columns: str
) -> Markup:
    """A table in a box of its own, in which it scrolls where it is too wide.

    Args:
      columns: a letter a column: "l" text, "r" numbers (to the right), "b" bars.
    """
    kinds = [{"l": "", "r": ' class="r"', "b": ' class="bar"'}[c] for c in columns]
    heads = "".join(
        f'<th scope="col"{kind}>{text(name)}</th>'
        for name, kind in zip(header, kinds, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{text(cell)}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return Markup(
        f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


def tiles(cells: Sequence[tuple[Any, Any]]) -> Markup:
    """Numbers, large, each over the words that say what it is."""
    inner = "".join(
        f'<div class="tile"><b>{text(number)}</b><span>{text(words)}</span></div>\n'
        for number, words in cells
    )
    return Markup(f'<div class="tiles">\n{inner}</div>\n')


def drawing(figure: Any, alt: str, caption: str = "", *, wide: bool = False) -> Markup:
    """A matplotlib figure of lines and letters, as SVG: sharp at every size.

    Args:
      wide: where the page is narrower than the figure, it scrolls in a box of its own
        instead of becoming small.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _figure(buffer.getvalue(), "svg+xml", figure, alt, caption, wide)


def picture(figure: Any, alt: str, caption: str = "", *, wide: bool = False) -> Markup:
    """A matplotlib figure with pictures in it, as PNG of 256 colours; see `drawing`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    # A third of the size, and no difference that the eye sees.
    small = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT)
    buffer = io.BytesIO()
    small.save(buffer, format="png", optimize=True)
    return _figure(buffer.getvalue(), "png", figure, alt, caption, wide)


def _figure(
    data: bytes, kind: str, figure: Any, alt: str, caption: str, wide: bool
) -> Markup:
    width, height = (round(_CSS_INCH * side) for side in figure.get_size_inches())
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    size = f'width="{width}" height="{height}"'
    image = f'<img alt="{text(alt)}" {size} src="{url}">'
    if wide:
        image = f'<div class="scroll figure">{image}</div>'
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure>{image}{below}</figure>\n")


def side_by_side(*parts: Markup, small: bool = False) -> Markup:
    """Parts in two columns, or small ones in four, as far as there is room."""
    kind = "grid" if small else "pair"
    cells = "".join(f"<div>{part}</div>\n" for part in parts)
    return Markup(f'<div class="{kind}">\n{cells}</div>\n')


def heading(words: str) -> Markup:
    """Of a part of a section."""
    return Markup(f"<h3>{text(words)}</h3>\n")


def details(summary: str, *parts: Any) -> Markup:
    """Parts that are folded away until they are asked for; on paper they are there."""
    return Markup(
        f"<details><summary>{text(summary)}</summary>\n{joined(*parts)}</details>\n"
    )


def section(title: str, *parts: Any) -> Markup:
    """Parts under a title, which links can point to."""
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return Markup(
        f'<section id="{text(name)}">\n<h2>{text(title)}</h2>\n{joined(*parts)}'
        "</section>\n"
    )


def document(title: str, *parts: Any, footer: Any = "") -> bytes:
    """The whole page, UTF-8.

    Args:
      title: of the window and at the top.
      parts: what comes below it.
      footer: the last words.
    """
    name = text(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{name}</h1>\n{joined(*parts)}</main>\n"
        f'<footer class="soft">{text(footer)}</footer>\n</body>\n</html>\n'
    ).encode(errors="backslashreplace")  # names of files that are no text
