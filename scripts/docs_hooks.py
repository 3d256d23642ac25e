"""Of the docs site: a link to a file outside docs becomes the name of the file, for it has no page there."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of one page."""
    if "/" in page.file.src_uri:
        return markdown
    return _OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2].rstrip('/')}`)", markdown)
