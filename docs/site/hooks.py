"""What MkDocs does beside its own: pages that lie elsewhere in the repository, and the reference that the code gives.

The README is the first page of the site, and every file is written once: links are written for the repository, and
led to the pages of the site here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from commands import command_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from settings import setting_pages

from genpipe.stages import stage_kinds

ROOT = Path(__file__).parent.parent.parent

ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "infra/README.md": "infra.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
}
"""Files outside of docs/, and where they are in the site."""

LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
STAGES = "reference/stages/"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every stage into the navigation, where it names their folder."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for path, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    reference = {**setting_pages(), "commands.md": command_page()}
    for path, text in reference.items():
        files.append(File.generated(config, f"reference/{path}", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their places in the site."""
    return relinked(markdown, page=page.file.src_uri)


def relinked(markdown: str, *, page: str) -> str:
    """The text of a `page` of the site with its links between files of the repository led to the site's."""
    written_in = {place: path for path, place in ELSEWHERE.items()}.get(page, f"docs/{page}")

    def led(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), link[2]))
        place = ELSEWHERE.get(path, path.removeprefix("docs/"))
        return f"{link[1]}{posixpath.relpath(place, posixpath.dirname(page) or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(led, markdown)


def _filled(nav: object) -> object:
    """`nav` with the page of each stage in the place of their folder."""
    if isinstance(nav, list):
        return [_filled(each) for each in nav]
    if isinstance(nav, dict):
        return {title: _filled(each) for title, each in nav.items()}
    return [f"{STAGES}{kind}.md" for kind in stage_kinds()] if nav == STAGES else nav
