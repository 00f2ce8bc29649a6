"""One HTML page that needs nothing beside it."""

import base64
from html import escape
from typing import Dict, Sequence

CSS = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #22262b; background: #fbfbf9; margin: 0; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; font-weight: 600; }
h2 { font-size: 19px; margin: 40px 0 8px; font-weight: 600; }
p, figcaption { max-width: 46em; color: #4b525a; margin: 4px 0 12px; }
p.lead { font-size: 18px; color: #22262b; margin: 16px 0 20px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; font-size: 14px; margin: 16px 0; }
dt { color: #6b727a; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-bottom: 14px; background: white; border: 1px solid #e2e2dd; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #ecece7; }
th { color: #4b525a; font-weight: 600; background: #f4f4f0; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; } tr.next td { border-top: 2px solid #c9c9c2; }
tr.plain td { color: #6b727a; } tr.ours td { background: #fdf1f2; }
td.best { font-weight: 700; color: #22262b; } td.loss { color: #a3323f; }
figure { margin: 0; background: white; border: 1px solid #e2e2dd; border-radius: 6px; padding: 16px; }
figure img { display: block; width: 100%; height: auto; } figcaption { font-size: 14px; margin: 12px 0 0; }
code { font-size: 13px; background: #f0f0eb; padding: 1px 4px; border-radius: 3px; }
footer { margin-top: 48px; font-size: 13px; color: #6b727a; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """The page of parts that are HTML already."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n'
        f"<body><main>\n{chr(10).join(parts)}\n</main></body>\n</html>\n"
    )


def html_list(entries: Dict[str, str]) -> str:
    """Names and what they are."""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f"<dl>{listed}</dl>"


def html_figure(heading: str, image: bytes, caption: str, kind: str = "svg+xml") -> str:
    """
    Args:
        image: a file's content.
        kind: "svg+xml", or "png" for photographs.
    """
    # SVG as an image, too, so that names within one figure do not meet those of another.
    data = base64.b64encode(image).decode()
    html = f'<img alt="{escape(heading)}" src="data:image/{kind};base64,{data}">'
    return f"<h2>{escape(heading)}</h2>\n<figure>{html}<figcaption>{escape(caption)}</figcaption></figure>"
