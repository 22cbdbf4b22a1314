"""The site: it builds strictly, is whole, and loads nothing from elsewhere. Needs the extra `docs`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the site needs the extra `docs`: pip install -c constraints.txt -e '.[docs]'")
pytest.importorskip(
    "mkdocstrings", reason="the site needs the extra `docs`: pip install -c constraints.txt -e '.[docs]'"
)

import hooks

ROOT = Path(__file__).parent.parent.parent


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=config.parent, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("page", "written", "led"),
    [
        ("index.md", "[a](docs/data.md#sources)", "[a](data.md#sources)"),
        ("index.md", "![a](docs/demo-grid.png)", "![a](demo-grid.png)"),
        ("index.md", "[a](CONTRIBUTING.md) [b](LICENSE)", "[a](contributing.md) [b](LICENSE)"),
        ("operations.md", "[a](../infra/README.md)", "[a](infra.md)"),
        ("how-to/extend.md", "[a](../../CONTRIBUTING.md) [b](../data.md)", "[a](../contributing.md) [b](../data.md)"),
        ("contributing.md", "[a](docs/architecture.md#adding-something)", "[a](architecture.md#adding-something)"),
        ("data.md", "[a](training.md) [b](#sources)", "[a](training.md) [b](#sources)"),
        ("index.md", "[a](https://openmoji.org)", "[a](https://openmoji.org)"),
    ],
)
def test_links_between_files_are_led_to_the_sites_pages(page: str, written: str, led: str) -> None:
    assert hooks.relinked(written, page=page) == led


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=[\"']?(https?:[^\"'\s>]*)", page.read_text()
        )
        assert not loaded, page
    index = json.loads((tmp_path / "search/search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"] if "hang_seconds" in entry["text"]}
    assert "reference/resources.html#Resources" in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[a](absent.md)", "absent.md"),
        ("[a](#absent)", "#absent"),
        ("::: genpipe.api.absent", "genpipe.api.absent"),
        ("[a][genpipe.absent]", "genpipe.absent"),
    ],
)
def test_a_broken_link_or_reference_fails_the_site(tmp_path: Path, text: str, named: str) -> None:
    """With the site's own settings, on a page by itself."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n{text}\n")
    (tmp_path / "mkdocs.yml").write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks: []\nnav: [index.md]\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and named in done.stderr, done.stderr
