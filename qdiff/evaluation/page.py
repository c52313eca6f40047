"""A folder's `index.html`: headings, text, tables and pictures, nothing from elsewhere."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qdiff.utils.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .7em; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
img { max-width: 100%; image-rendering: pixelated } figure { margin: 1.5em 0 } figcaption { color: #555 }
"""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, a line for each row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass
class Page:
    """Parts in order; `write` makes the file."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(line(row, "td") for row in rows)
        self.parts.append(f"<table><thead>{line(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody></table>")

    def picture(self, file: str, caption: str) -> None:
        """A picture in the page's own folder."""
        words = html.escape(caption, quote=True)
        self.parts.append(
            f'<figure><img src="{html.escape(file, quote=True)}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        )

    def write(self, path: Path) -> None:
        title = html.escape(self.title)
        head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        write_text(path, "\n".join([head, f"<body><h1>{title}</h1>", *self.parts, "</body></html>\n"]))
