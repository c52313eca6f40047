"""Pages in HTML with headings, text, tables and the pictures of their own folder."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qdiff.utils.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .7em; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
img { max-width: 100%; image-rendering: pixelated } figure { margin: 1.5em 0 } figcaption { color: #555 }
"""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass
class Page:
    """A page that is assembled part by part and then written.

    Attributes:
        title: the page's title and first heading.
        parts: the body in HTML, in order.
    """

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Append a heading of the second level."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Append a paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Append a table."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(line(row, "td") for row in rows)
        self.parts.append(f"<table><thead>{line(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table>")

    def picture(self, file: str, caption: str) -> None:
        """Append a picture from the page's own folder."""
        source, caption = html.escape(file, quote=True), html.escape(caption, quote=True)
        self.parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')

    def write(self, path: Path) -> None:
        """Write the page."""
        title = html.escape(self.title)
        head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        start = f'<!doctype html>\n<html lang="en">{head}'
        write_text(path, "\n".join([start, f"<body><h1>{title}</h1>", *self.parts, "</body></html>\n"]))
