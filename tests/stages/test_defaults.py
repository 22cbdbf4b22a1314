"""The defaults of each VERSION of each stage: settings at their default are no part of a fingerprint.

`defaults.json` holds them as they were when a VERSION was first used. A changed default changes what a fingerprint
means, so it needs a new VERSION; a new setting does not. After raising a VERSION, run this file as a script.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter

from genpipe.config import WHERE
from genpipe.stage_config import UNFINGERPRINTED
from genpipe.stages import load_stage, stage_kinds

RECORD = Path(__file__).parent / "defaults.json"


def blocks(annotation: Any) -> set[type[BaseModel]]:
    """Every configuration block that a setting of this type may hold, with those inside of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = (field.annotation for name, field in annotation.model_fields.items() if name not in UNFINGERPRINTED)
        return {annotation}.union(*(blocks(each) for each in inner))
    if get_origin(annotation) in (Annotated, Union, UnionType, list, tuple, dict):
        return set().union(*(blocks(each) for each in get_args(annotation)))
    return set()


def defaults(kind: str) -> dict[str, Any]:
    """`BLOCK.SETTING` to its default, of every block that a stage's configuration may hold."""
    found = {}
    for block in blocks(load_stage(kind).Config):
        for name, field in block.model_fields.items():
            fingerprinted = name not in UNFINGERPRINTED and WHERE not in field.metadata
            if fingerprinted and not field.is_required():
                value = field.get_default(call_default_factory=True)
                found[f"{block.__name__}.{name}"] = TypeAdapter(Any).dump_python(value, mode="json")
    return dict(sorted(found.items()))


def kept(then: Any, now: Any) -> bool:
    """Whether a default is what it was; a block may have new settings, which have defaults of their own."""
    if isinstance(then, dict) and isinstance(now, dict):
        return all(name in now and kept(value, now[name]) for name, value in then.items())
    return bool(then == now)


@pytest.mark.parametrize("kind", stage_kinds())
def test_a_changed_default_needs_a_new_version(kind: str) -> None:
    version = str(load_stage(kind).VERSION)
    record = json.loads(RECORD.read_text())[kind]
    assert version in record, f"record the defaults of version {version}: python tests/stages/test_defaults.py"
    now = defaults(kind)
    changed = {name: (then, now.get(name)) for name, then in record[version].items() if not kept(then, now.get(name))}
    assert not changed, f"raise VERSION of {kind}, or leave these defaults (then, now): {changed}"


def test_a_changed_default_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load_stage("prior")
    before = defaults("prior")
    monkeypatch.setattr(stage.Config.model_fields["drop_text"], "default", 0.2)
    after = defaults("prior")
    assert {name for name in before if before[name] != after[name]} == {"Config.drop_text"}


def test_a_block_may_grow_and_not_change() -> None:
    block = {"kind": "captions", "train": 256}
    assert kept(block, {**block, "new": 0}) and kept([1], [1])
    assert not any(kept(block, other) for other in ({"kind": "captions"}, {**block, "train": 1}, None, 256))


def test_every_block_of_a_union_is_looked_at() -> None:
    names = {name.split(".")[0] for name in defaults("decoder")}
    assert {"DiTConfig", "UNetConfig", "AdamW", "Muon", "DiffusionConfig", "TrainConfig"} <= names
    assert not any(name.startswith(("Resources", "Observe")) for name in defaults("decoder"))


if __name__ == "__main__":
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for kind in stage_kinds():
        record.setdefault(kind, {}).setdefault(str(load_stage(kind).VERSION), defaults(kind))
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
