"""No page of the repository links to a file or a heading that is not there. ``make docs`` holds the site to it too."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@cache
def hooks() -> Any:
    """What the site's build calls."""
    found = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "said", "on_the_site"),
    [
        ("index.md", "[a](../conformance/README.md#waivers)", "[a](repository/conformance/README.md#waivers)"),
        ("index.md", "[a](../backends/rocm)", "[a](repository/backends/rocm/README.md)"),
        ("api/backends.md", "[a](../simulator.md) [b](https://x.y)", "[a](../simulator.md) [b](https://x.y)"),
        ("simulator.md", "[a](../hal/portable/sim)", "[a](repository/hal/portable/sim.md)"),
        ("simulator.md", "[a](../hal/portable/sim/words.h)", "[a](repository/hal/portable/sim/words.h.md)"),
        (
            "repository/CONTRIBUTING.md",
            "[a](docs/spec.md) [b](conftest.py)",
            "[a](../spec.md) [b](conftest.py.md)",
        ),
        ("repository/hal/portable/sim.md", "[a](words.h)", "[a](sim/words.h.md)"),
        ("index.md", "`[a](../hal)` [b](../nothing) [c](#d)", "`[a](../hal)` [b](../nothing) [c](#d)"),
        ("index.md", "```text\n[a](../hal)\n```", "```text\n[a](../hal)\n```"),
        ("repository/tests/seeds.py.md", "[a](test_docs.py)", "[a](test_docs.py)"),
    ],
)
def test_the_site_has_a_page_for_what_lies_outside_docs(page: str, said: str, on_the_site: str) -> None:
    assert hooks().on_page_markdown(said, SimpleNamespace(file=SimpleNamespace(src_uri=page))) == on_the_site


def test_a_command_breaks_between_words_alone() -> None:
    cell, block = "<td><code>hal bench --quick</code></td>", "<pre><span></span><code>a b\n</code></pre>"
    assert hooks().on_page_content(cell + block) == cell.replace(" ", " <wbr>") + block


def test_the_site_is_built_so_that_a_dead_link_fails() -> None:
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "mkdocs build" in line)
    assert line.split()[1:] == ["build", "--strict"], "mkdocs counts no warning that it does not print"
