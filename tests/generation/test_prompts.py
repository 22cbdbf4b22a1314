"""Prompts of every kind: which there are, where they come from, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from genpipe.artifacts import Artifact, fetch
from genpipe.data.order import order
from genpipe.data.shape_scenes import parse, task_of
from genpipe.data.shard_dataset import ShardDataset
from genpipe.generation.prompts import PromptsConfig, check_prompts, open_prompts, prompts_digest

if TYPE_CHECKING:
    from conftest import TinyPipeline

adapter: TypeAdapter[Any] = TypeAdapter(PromptsConfig)


@pytest.fixture(scope="module")
def shard(tiny: TinyPipeline) -> Artifact:
    return tiny.run("shard")


def opened(shard: Artifact | None = None, *, classes: tuple[str, ...] = (), seed: int = 0, **settings: Any) -> Any:
    return open_prompts(adapter.validate_python(settings), shard=shard, classes=classes, seed=seed)


def test_captions_are_chosen_at_random_from_both_splits(shard: Artifact) -> None:
    found = opened(shard, train=10, heldout=1000)
    dataset = ShardDataset(fetch(shard), split="train")
    rows = order(np.arange(10), n=len(dataset), seed=0).tolist()
    assert [prompt.reference for prompt in found["train"]] == [dataset.key(i) for i in rows]
    assert [prompt.text for prompt in found["train"]] == [dataset.captions(i)[0] for i in rows]
    assert len(found["heldout"]) == shard.meta["samples"]["heldout"], "all, as there are fewer than were asked for"
    other = opened(shard, train=10, heldout=0, seed=1)
    assert [p.text for p in other["train"]] != [p.text for p in found["train"]] and len(other["heldout"]) == 0


def test_a_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red  cat\r\n\n a bl\u00fce dog\n".encode())
    found = opened(kind="file", path=str(path))
    assert [prompt.text for prompt in found["heldout"]] == ["a red cat", "a bl\u00fce dog"] and len(found["train"]) == 0
    cfg = adapter.validate_python({"kind": "file", "path": str(path)})
    assert prompts_digest(cfg) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.path: .*prompts\.txt"):
        opened(kind="file", path=str(path))


def test_a_list_is_held_out_unless_it_is_of_captions(shard: Artifact) -> None:
    found = opened(kind="list", texts=["a unicorn"])
    assert [(p.text, p.reference) for p in found["heldout"]] == [("a unicorn", "")] and len(found["train"]) == 0
    dataset = ShardDataset(fetch(shard), split="train")
    texts = [dataset.captions(i)[0] for i in (5, 2)]
    found = opened(shard, kind="list", texts=texts, captions_of="train")
    assert [p.reference for p in found["train"]] == [dataset.key(5), dataset.key(2)] and len(found["heldout"]) == 0


def test_a_caption_that_no_sample_has_is_named_with_the_nearest(shard: Artifact) -> None:
    caption = ShardDataset(fetch(shard), split="train").captions(5)[0]
    with pytest.raises(ValueError) as error:
        opened(shard, kind="list", texts=[caption, caption + "s"], captions_of="train")
    assert all(part in str(error.value) for part in ("prompts.texts", "train", repr(caption + "s"), repr(caption)))


def test_shapes_are_asked_for_by_task_without_repeating() -> None:
    """All of a task that has fewer; others with another seed."""
    tasks = ["single_object", "color_attribution"]
    found = opened(kind="shapes", tasks=tasks, count=30)
    texts = [prompt.text for prompt in found["heldout"]]
    asked = [parse(text) for text in texts]
    assert [task_of(each) for each in asked if each] == ["single_object"] * 4 + ["color_attribution"] * 30
    assert len(set(texts)) == 34 and len(found["train"]) == 0
    other = [prompt.text for prompt in opened(kind="shapes", tasks=tasks, count=30, seed=1)["heldout"]]
    assert set(other) & set(texts) != set(texts)
    assert {prompt.text.split()[0] for prompt in opened(kind="shapes")["heldout"]} == {"a", "two", "three", "four"}


def test_every_class_comes_as_often() -> None:
    found = opened(kind="classes", count=2, classes=("cat", "dog"))["train"]
    assert [(p.text, p.label) for p in found] == [("cat", 0), ("cat", 0), ("dog", 1), ("dog", 1)]
    assert [(p.text, p.label) for p in opened(kind="none", count=3)["train"]] == [("", -1)] * 3


def system(*conditioned_on: str, classes: tuple[str, ...] = ()) -> Artifact:
    meta = {"conditioned_on": list(conditioned_on), "classes": list(classes)}
    return Artifact(kind="system", uri="", fingerprint="f" * 64, meta=meta)


def shards(**meta: Any) -> Artifact:
    return Artifact(kind="shards", uri="", fingerprint="e" * 64, meta=meta)


LIST = {"kind": "list", "texts": ["a red circle"]}
FILE, CLASSES, CAPTIONS = {"kind": "file", "path": "x"}, {"kind": "classes"}, {"kind": "captions"}
LABELED = system("label", classes=("cat",))


@pytest.mark.parametrize(
    ("settings", "of_system", "shard", "fault"),
    [
        (CAPTIONS, system("text"), shards(classes=[]), None),
        (FILE, system("text"), None, None),
        (CLASSES, LABELED, None, None),
        (CAPTIONS, LABELED, shards(classes=["cat"]), None),
        (CAPTIONS, LABELED, shards(), None),  # not known before the shards are made
        ({"kind": "none"}, system(), None, None),
        (CLASSES, system("text"), None, "text"),
        ({"kind": "none"}, LABELED, None, "label"),
        (FILE, LABELED, None, "label"),
        (FILE, system("text", "label"), None, "label"),
        (CAPTIONS, LABELED, shards(classes=[]), "label"),
        (CAPTIONS, LABELED, shards(classes=["dog"]), "other classes"),
        ({**CAPTIONS, "combinations": 1}, system("text"), shards(combinations=True), None),
        ({**CAPTIONS, "combinations": 1}, system("text"), shards(combinations=False), "combinations_fraction"),
        ({**LIST, "captions_of": "combinations"}, system("text"), shards(), "combinations_fraction"),
    ],
)
def test_prompts_say_what_the_system_must_be_told(
    settings: dict[str, Any], of_system: Artifact, shard: Artifact | None, fault: str | None
) -> None:
    cfg = adapter.validate_python(settings)
    if fault is None:
        check_prompts(cfg, system=of_system, shard=shard)
        return
    with pytest.raises(ValueError, match=fault):
        check_prompts(cfg, system=of_system, shard=shard)
