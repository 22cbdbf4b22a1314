"""Which version this is, in a checkout and outside of one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpipe import __version__
from genpipe.revision import git_revision

if TYPE_CHECKING:
    from conftest import Command

ROOT = Path(__file__).parent.parent


def git(*arguments: str, cwd: Path) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit, in which genpipe is a package two levels down."""
    monkeypatch.delenv("GENPIPE_REVISION", raising=False)
    (tmp_path / "site/genpipe").mkdir(parents=True)
    shutil.copy(ROOT / "genpipe/revision.py", tmp_path / "site/genpipe/revision.py")
    git("init", "-q", cwd=tmp_path)
    git("add", ".", cwd=tmp_path)
    git("commit", "-qm", "one", cwd=tmp_path)
    return tmp_path


def revision(root: Path) -> str:
    """What the copy of the module that lies in `root` says."""
    script = "import runpy; print(runpy.run_path('genpipe/revision.py')['git_revision']())"
    return subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True).stdout


def test_an_environment_within_another_projects_checkout_is_not_that_project(checkout: Path) -> None:
    assert revision(checkout / "site") == "\n"


def test_a_checkout_is_its_commit_and_whether_it_was_changed(checkout: Path) -> None:
    commit = git("rev-parse", "HEAD", cwd=checkout).strip()
    shutil.move(checkout / ".git", checkout / "site/.git")
    git("add", "-A", cwd=checkout / "site")
    assert revision(checkout / "site") == f"{commit}-dirty\n"
    git("commit", "-qm", "two", cwd=checkout / "site")
    assert revision(checkout / "site") == git("rev-parse", "HEAD", cwd=checkout / "site")


def test_version_names_both(genpipe: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENPIPE_REVISION", "0123abcd")
    assert git_revision() == "0123abcd"
    assert genpipe("--version")[:2] == (0, f"genpipe {__version__} (0123abcd)\n")
