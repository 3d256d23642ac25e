"""No page of the repository links to a file or a heading that is not there. ``make docs`` holds the site to it too."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FOLDERS = [f for f in ROOT.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name != "site"]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(page for folder in _FOLDERS for page in folder.rglob("*.md")))
    if not {"templates", "build", ".pytest_cache", ".hypothesis"} & set(path.parts)
)


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "code", _FENCE.sub("", path.read_text()))


@cache
def headings(path: Path) -> set[str]:
    """What a link to a heading of a page may end in."""
    lines = _FENCE.sub("", path.read_text()).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#{1,6} ", line)]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title)) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (heading and heading not in headings(path)):
            dead.append(target)
    assert not dead
