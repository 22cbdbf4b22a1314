from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import genpipe
from genpipe.data.reasons import REMEDIES, remedy

ROOT = Path(genpipe.__path__[0])
RAISED = {"ImageError": 0, "Filtered": 0, "Failure": 0, "Reject": 2}  # the place of the reason among the arguments


def reasons() -> Iterator[str]:
    """Every reason that stands in the code where a sample is rejected."""
    for path in [*ROOT.glob("data/**/*.py"), ROOT / "stages/shard.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED:
                found = node.args[RAISED[node.func.id] :][:1]
                if found and isinstance(found[0], ast.Constant):
                    yield str(found[0].value)


def test_every_reason_has_a_remedy() -> None:
    found = set(reasons())
    assert len(found) > 30 and {reason for reason in found if not remedy(reason)} == set()
    assert remedy("http_404") and not remedy("nothing of ours")


def test_no_remedy_is_for_a_reason_of_the_past() -> None:
    text = "".join(path.read_text("utf-8") for path in ROOT.glob("data/**/*.py") if path.name != "reasons.py")
    text += (ROOT / "stages/shard.py").read_text("utf-8")
    assert [reason for reason in REMEDIES if f'"{reason}"' not in text] == []
