"""Links and file names in the pages lead to files and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Matches a file of the repository in a command or a sentence. A name in capitals is a placeholder, such as
# configs/quickstart/PAIR.yaml.
NAMED = re.compile(r"(?<![\w/.-])(?:tools|benchmarks|tests|configs)/[\w./-]+\.(?:py|yaml|pth)\b")
PLACEHOLDER = re.compile(r"/[A-Z]+\.")


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """Yield the links of a page that lead to no file or to no heading."""
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = {name for name in NAMED.findall(page.read_text()) if not PLACEHOLDER.search(name)}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert sorted(name for name in pages if f"({name})" not in index) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[good](#a-heading-here) [bad](#another) [missing](no.md) [web](https://a.b)")
    assert list(broken_links(page)) == ["#another", "no.md"]
