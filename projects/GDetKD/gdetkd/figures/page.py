"""Render one HTML page that needs no other file."""

import base64
from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Sequence

from jinja2 import Environment, FileSystemLoader

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


class Section(NamedTuple):
    """Hold a figure of the page.

    Attributes:
        name: name of the figure's file, without its ending.
        heading: text above the figure.
        image: content of an SVG or PNG file.
        caption: text below the figure.
        kind: image type, "svg+xml" or "png".
    """

    name: str
    heading: str
    image: bytes
    caption: str
    kind: str = "svg+xml"

    @property
    def source(self) -> str:
        """Return the image as a data URL, so that ids in two SVG images cannot collide."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.image).decode()}"


class Cell(NamedTuple):
    """Hold a cell of the table. `kind` lists the CSS classes "best" and "loss"."""

    text: str
    kind: str = ""


class TableRow(NamedTuple):
    """Hold a row of the table. `kind` lists the CSS classes "plain", "configured" and "next"."""

    cells: Sequence[Cell]
    kind: str = ""


class Table(NamedTuple):
    headers: Sequence[str]
    rows: List[TableRow]


def render_page(
    title: str,
    lead: str,
    setting: Mapping[str, str],
    sections: Sequence[Section],
    table: Optional[Table] = None,
    notes: Sequence[str] = (),
    footer: str = "",
) -> str:
    """Return the HTML of a page, with all texts escaped.

    Args:
        lead: the main result in a sentence.
        setting: what was compared or shown, by a short name.
        notes: paragraphs below the table.
    """
    return TEMPLATES.get_template("page.html").render(
        title=title, lead=lead, setting=setting, sections=sections, table=table, notes=notes, footer=footer
    )
