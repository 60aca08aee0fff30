"""Every relative link of every page leads to a file, and every anchor to a heading."""

import os
import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, REPO, name, prose_of

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def headings(page: Path) -> list[str]:
    """The anchors of a page's headings, as both GitHub and mkdocs make them of plain words."""
    titles = re.findall(r"^#{1,6} +(.+?)\s*$", prose_of(page), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", title)).strip().lower() for title in titles]
    return [re.sub(r"\s", "-", text) for text in words]


def links(page: Path) -> list[str]:
    """The targets of a page's links that are not of the web."""
    prose = re.sub(r"`[^`\n]+`", "", prose_of(page))
    return [link for link in _LINK.findall(prose) if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), f"{name(page)}: ({link}): no such file"
        if anchor:
            assert anchor in headings(target), f"{name(page)}: ({link}): {name(target)} has {headings(target)}"


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) != "CHANGELOG.md"], ids=name)
def test_headings_are_told_apart(page: Path):
    found = headings(page)
    assert len(set(found)) == len(found)


def test_every_page_is_in_the_navigation():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        assert not isinstance(values, str)
        return [page for value in values for page in pages(value)]

    nav = yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == sorted(
        path.relative_to(REPO / "docs").as_posix() for path in (REPO / "docs").rglob("*.md")
    )


def test_every_page_can_be_reached_from_the_readme():
    reached: set[Path] = set()
    waiting = [REPO / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in links(page):
            target = Path(os.path.normpath(page.parent / link.partition("#")[0]))
            if target.suffix == ".md" and target not in reached:
                waiting.append(target)
    missed = [name(page) for page in PAGES if page not in reached and not name(page).startswith(".github/")]
    assert sorted(missed) == ["CHANGELOG.md", "docs/index.md"]
