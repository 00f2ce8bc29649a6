"""Render one HTML page that needs no other file."""

import base64
from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Sequence

from jinja2 import Environment, FileSystemLoader

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


class Section(NamedTuple):
    """A figure of the page.

    Attributes:
        name: name of the figure's own file, without its ending.
        heading: text above the figure.
        image: content of an SVG or PNG file.
        caption: text below the figure.
        kind: "svg+xml", or "png" for photographs.
    """

    name: str
    heading: str
    image: bytes
    caption: str
    kind: str = "svg+xml"

    @property
    def source(self) -> str:
        """Return the image as a data URL. Names inside one SVG image cannot collide with those of another."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.image).decode()}"


class Cell(NamedTuple):
    """A cell of the table. `kind` is its CSS classes: "best", "loss"."""

    text: str
    kind: str = ""


class TableRow(NamedTuple):
    """A row of the table. `kind` is its CSS classes: "plain", "ours", "next"."""

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
    """Return the HTML of a page. All texts are escaped.

    Args:
        lead: the sentence that says the main result.
        setting: what was compared or looked at, by a short name.
        notes: paragraphs below the table.
    """
    return TEMPLATES.get_template("page.html").render(
        title=title, lead=lead, setting=setting, sections=sections, table=table, notes=notes, footer=footer
    )
