"""A Ray head that is another machine for all that it sees: other code, another home, another working folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import genpipe
from genpipe.launch.jobs import Cluster, connect
from genpipe.launch.local_ray import TUNING, Head, local_head


class Node(NamedTuple):
    """A head with a folder of its own, where its genpipe is installed; it has no toys."""

    head: Head
    folder: Path

    def cluster(self, **settings: Any) -> Cluster:
        """It as a cluster that takes jobs. (Of tokens in the environment Ray keeps a process's first.)"""
        return Cluster(connect(self.head.address, token=self.head.token), runtime_env={}, capacity={}, **settings)


@contextmanager
def other_node(folder: Path) -> Iterator[Node]:
    """Start it in an empty folder."""
    installed = folder / "installed" / "genpipe"
    shutil.copytree(Path(genpipe.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__"))
    told = (installed / "__init__.py").read_text()
    (installed / "__init__.py").write_text(told.replace(genpipe.__version__, "0.0.9"))
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(installed.parent),
        "GENPIPE_REVISION": "of-the-image",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "RAY_OVERRIDE_RESOURCES": json.dumps({"scratch": 2, "accelerator_type:H100": 1}),
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.chdir(installed.parent)
        head = stack.enter_context(local_head(os.environ | TUNING | environment))
        patch.undo()
        yield Node(head, folder)
