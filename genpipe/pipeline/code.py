"""Which code plans a stage and which runs it: a fingerprint says what was made only if the two are the same.

The digest decides. A git revision, which is for people, says too little of a checkout that was changed, and too much
where a commit touched nothing that runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import genpipe
from genpipe.revision import git_revision

if TYPE_CHECKING:
    from genpipe.pipeline.spec import StageSpec


def packages_of(kind: str) -> dict[str, Path]:
    """The packages that a stage of this kind runs: genpipe, and the user's for `package.module`; name to folder.

    Raises ValueError for one that is not a plain folder.
    """
    names = ["genpipe", *([kind.partition(".")[0]] if "." in kind else [])]
    return {name: _folder(name) for name in names}


@cache
def code_digest(kind: str) -> str:
    """The sha256 (hex) over the Python files of the packages of a stage: their names and contents."""
    digest = hashlib.sha256()
    for name, folder in packages_of(kind).items():
        for path in sorted(folder.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{name}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def check_code(spec: StageSpec) -> None:
    """Raise ValueError if what runs here is other code than the spec was planned with."""
    here = code_digest(spec.stage)
    if spec.code not in ("", here):
        raise ValueError(
            f"stages.{spec.name}: planned with {_named(spec.version, spec.git_revision, spec.code)}, but this node "
            f"runs {_named(genpipe.__version__, git_revision(), here)}: the artifact would not be what its fingerprint "
            "says. Put the same revision on the nodes and where you run genpipe (an edited checkout is -dirty, and no "
            "image has it), set ray.code to checkout to send yours along, or run it again if files were edited since"
        )


def _named(version: str, revision: str, digest: str) -> str:
    return f"genpipe {version} at revision {revision or 'unknown'} (code {digest[:12]})"


def _folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    folders = list(found.submodule_search_locations or ()) if found else []
    if len(folders) != 1:
        what = "is not installed here" if found is None else "is no plain folder of Python files"
        raise ValueError(f"the package {name} {what}; install it on every node, or set ray.code to checkout")
    return Path(folders[0])
