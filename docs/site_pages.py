"""Hooks of MkDocs: add the pages and files of the repository that lie outside docs/ to the site.

The links in README.md and in docs/*.md are relative to their file, so that they work in the repository. The hooks rewrite them for the
site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Markdown file of the repository → page of the site."""
LINK = re.compile(r"""(?:(?<=\]\()|(?<=\bsrc=")|(?<=\bsrcset="))(?!https?:|mailto:|#)([^)"#\s]+)(#[^)"\s]+)?(?=[)"])""")
"""The target of a Markdown link, or of the images in a `<picture>`, which has one for light and one for dark."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and similar files as pages, and each file outside docs/ that a page links to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    sources = [_source(file.src_uri) for file in files.documentation_pages()]
    for source in sources:
        for link in LINK.finditer((ROOT / source).read_text("utf-8")):
            target = _target(source, link[1])
            page = _page(target)
            if page.startswith("files/") and (ROOT / target).is_file() and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page from the repository's paths to those of the site."""
    here = posixpath.dirname(page.file.src_uri)

    def on_site(link: re.Match[str]) -> str:
        target = _page(_target(_source(page.file.src_uri), link[1]))
        return posixpath.relpath(target, here or ".") + (link[2] or "")

    return LINK.sub(on_site, markdown)


def _source(page: str) -> str:
    """The file of a page, relative to the repository's root."""
    return next((name for name, generated in PAGES.items() if generated == page), f"docs/{page}")


def _target(source: str, link: str) -> str:
    """The file that a link refers to, relative to the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _page(target: str) -> str:
    """The place of a file of the repository in the site."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"
