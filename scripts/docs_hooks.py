"""Of the docs site: what its pages link to outside docs gets a page too, and commands in tables break between words.

The site has no repository to point to. A page of Markdown is taken as it is, a file of code is shown, a folder without
a README lists its files; they are found below ``repository/``, by their path, and so is whatever they link to.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

_ROOT: Final = Path(__file__).resolve().parent.parent
_DOCS: Final = _ROOT / "docs"
_BELOW: Final = "repository"
_CODE_OR_LINK: Final = re.compile(
    r"^( *)```.*?^\1```|`[^`\n]+`|\]\((?P<path>[^)\s#:]+)(?P<rest>#[^)\s]*)?\)", re.M | re.S
)
_INLINE_CODE: Final = re.compile(r"(?<!</span>)<code>[^<]+</code>")
_LANGUAGES: Final = {".cpp": "cpp", ".h": "cpp", ".py": "python"}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for whatever is linked to, directly or not."""
    from mkdocs.structure.files import File

    known = {_DOCS / file.src_uri for file in files}
    waiting = list(known)
    while waiting:
        path = waiting.pop()
        for found in _CODE_OR_LINK.finditer(_text(path)) if _has_links(path) else ():
            target = _target(path, found["path"])
            if target is not None and target not in known:
                known.add(target)
                waiting.append(target)
                files.append(File.generated(config, _uri(target), content=_text(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of one page to pages of the site."""
    here = page.file.src_uri
    path = _path(here)
    if not _has_links(path):
        return markdown

    def pointed(found: re.Match[str]) -> str:
        target = _target(path, found["path"])
        if target is None:
            return found[0]
        return f"]({posixpath.relpath(_uri(target), posixpath.dirname(here))}{found['rest'] or ''})"

    return _CODE_OR_LINK.sub(pointed, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let code in a line break where it has spaces and nowhere else: in tables ``site.css`` keeps it from any break."""
    return _INLINE_CODE.sub(lambda found: found[0].replace(" ", " <wbr>"), html)


def _has_links(path: Path) -> bool:
    """Whether there are links of Markdown in the page of a file: it is one of prose, or lists a folder."""
    return path.suffix == ".md" or path.is_dir()


def _target(page: Path, link: str | None) -> Path | None:
    """What a link leads to; None where that is nothing, which the build then says by itself."""
    if link is None:
        return None
    path = (page.parent if page.is_file() else page).joinpath(link).resolve()
    if (path / "README.md").is_file():
        path /= "README.md"
    return path if path.exists() and path.is_relative_to(_ROOT) else None


def _uri(path: Path) -> str:
    """Where the page of a file is kept."""
    if path.is_relative_to(_DOCS):
        return path.relative_to(_DOCS).as_posix()
    uri = f"{_BELOW}/{path.relative_to(_ROOT).as_posix()}"
    return uri if path.suffix == ".md" else f"{uri}.md"


def _path(uri: str) -> Path:
    """The file a page was made of."""
    if not uri.startswith(f"{_BELOW}/"):
        return _DOCS / uri
    path = _ROOT / uri.removeprefix(f"{_BELOW}/")
    return path if path.exists() else path.with_suffix("")


def _text(path: Path) -> str:
    """What the page of a file says."""
    name = path.relative_to(_ROOT).as_posix()
    if path.is_dir():
        links = (f"* [{one.name}]({one.name})\n" for one in sorted(path.iterdir()) if one.name != "__pycache__")
        return f"# {name}\n\n{''.join(links)}"
    text = path.read_text()
    if path.suffix == ".md":
        return text
    return (
        f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n``````{_LANGUAGES.get(path.suffix, 'text')}\n{text}``````\n"
    )
