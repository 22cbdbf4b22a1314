"""Which version of genpipe this is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_revision() -> str:
    """The commit of genpipe's working tree, with `-dirty` where it was changed; empty outside a checkout.

    GENPIPE_REVISION says it where no `.git` is, as in an image.
    """
    if told := os.environ.get("GENPIPE_REVISION"):
        return told
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # an environment inside of another project's checkout
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
