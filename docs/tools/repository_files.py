"""Put files of the repository that pages link to, such as SPEC.md and result rows, on the site, and turn the links.

A page links them as they lie in the repository (``../compress_tools/format/SPEC.md``), which works in a file browser.
The site holds ``docs/`` alone, so there they go to ``repository/``.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

FOLDER = "repository"
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


def repository_file(page: Path, link: str, docs: Path) -> Path | None:
    """The file outside of ``docs`` that a relative link of a page names, from the repository's root."""
    target = Path(os.path.normpath(page.parent / link))
    if target.is_relative_to(docs) or not target.is_file():
        return None
    return target.relative_to(docs.parent)


def on_files(files: Files, config: Any) -> Files:
    """Add every such file once."""
    docs = Path(config["docs_dir"])
    for file in list(files.documentation_pages()):
        page = docs / file.src_uri
        for link in _LINK.findall(page.read_text(encoding="utf-8")):
            name = repository_file(page, link, docs)
            uri = f"{FOLDER}/{name}"
            if name is not None and files.get_file_from_path(uri) is None:
                file = File.generated(
                    config, uri, abs_src_path=str(docs.parent / name), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn links that leave ``docs`` to where the files are on the site."""
    docs = Path(config["docs_dir"])
    source = docs / page.file.src_uri
    if not source.is_file():
        return markdown

    def turned(match: re.Match[str]) -> str:
        name = repository_file(source, match[1], docs)
        if name is None:
            return match[0]
        return "](" + os.path.relpath(f"{FOLDER}/{name}", Path(page.file.src_uri).parent)

    return _LINK.sub(turned, markdown)
