"""Held-out combinations: which samples they are, whatever order and parts they come in, and the shards made of them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_files import commit, configured, jpeg, ledger, make, stored

from genpipe import artifacts
from genpipe.data.combinations import Member, leaving
from genpipe.data.shard_dataset import ShardDataset, open_splits
from genpipe.data.shards import SPLITS, Split, split_of
from genpipe.data.takedown import check_shards, plan_removal, remove
from genpipe.stages import shard
from genpipe.storage import open_storage

names = st.text("abc", min_size=1, max_size=2)


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    """Samples of distinct keys, each in one of three parts."""
    found = draw(st.dictionaries(names, st.tuples(names, st.integers(0, 2)), max_size=20))
    return [Member(group, key, f"train-{part}", f"combinations-{part}") for key, (group, part) in found.items()]


@given(of=members(), data=st.data(), seed=st.integers(0, 3))
def test_every_sample_stays_once_and_a_group_gives_up_one_of_several(
    of: list[Member], data: st.DataObject, seed: int
) -> None:
    gone = data.draw(st.sets(st.sampled_from(of))) if of else set()
    left = set(leaving(of, without={(member.train, member.key) for member in gone}, seed=seed))
    held_out, trained_on = defaultdict(set), defaultdict(set)
    for member in of:
        copies = {(member.train, member.key), (member.combinations, member.key)}
        if member in gone:
            assert left & copies == {(member.combinations, member.key)}
            continue
        [leaves] = left & copies
        (held_out if leaves[0] == member.train else trained_on)[member.group].add(member.key)
    for group in held_out | trained_on:
        assert trained_on[group], "no group is held out whole"
        assert len(held_out[group]) == (len(trained_on[group]) > 0 and len(trained_on[group] | held_out[group]) > 1)
    assert len(left) == len(of)


@given(of=members(), data=st.data())
def test_neither_order_nor_parts_matter(of: list[Member], data: st.DataObject) -> None:
    def chosen(some: list[Member]) -> set[str]:
        return {key for name, key in leaving(some, without=(), seed=0) if name.startswith("train")}

    moved = [member._replace(train="train-9", combinations="combinations-9") for member in of]
    assert chosen(of) == chosen(data.draw(st.permutations(moved)))
    group = data.draw(names)
    assert chosen([member for member in of if member.group == group]) <= chosen(of), "other groups do not matter"


@given(group=st.text(), seed=st.integers(0, 5), heldout=st.floats(0, 1), share=st.floats(0, 1))
def test_combinations_are_taken_from_what_would_be_trained_on(
    group: str, seed: int, heldout: float, share: float
) -> None:
    alone = split_of(group, heldout_fraction=heldout, seed=seed)
    assert (
        split_of(group, heldout_fraction=heldout, combinations_fraction=share, seed=seed)
        in {
            "heldout": {"heldout"},
            "train": {"train", "combinations"},
        }[alone]
    )


def test_the_fraction_is_met() -> None:
    drawn = Counter(split_of(str(n), heldout_fraction=0.1, combinations_fraction=0.2, seed=0) for n in range(10_000))
    assert abs(drawn["heldout"] - 1000) < 4 * 30 and abs(drawn["combinations"] - 2000) < 4 * 40


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Forty subjects in two styles, ten in one; the last of them repeats a picture of another."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    named = [(f"{number:02d}", style) for number in range(50) for style in "xy" if style == "x" or number < 40]
    rows = []
    for number, (subject, style) in enumerate(named):
        (folder / f"{subject}{style}.jpg").write_bytes(jpeg(number if subject != "49" else 0))
        rows.append(
            json.dumps({"file_name": f"{subject}{style}.jpg", "text": f"{subject} as {style}", "group": subject})
        )
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def of_split(folder: Path, split: Split) -> dict[str, str]:
    """The subject of each sample."""
    dataset = ShardDataset(folder, split=split)
    return {dataset.key(i): dataset.group(i) for i in range(len(dataset))}


FRACTIONS: dict[str, Any] = {"heldout_fraction": 0.2, "combinations_fraction": 0.4}


def test_a_subject_is_known_by_its_other_samples(drawings: Path, tmp_path: Path) -> None:
    found = {}
    for name, part_size in (("a", 7), ("b", 100)):
        manifest = make(configured(drawings, part_size=part_size, **FRACTIONS), tmp_path / name)
        found[name] = {split: of_split(tmp_path / name, split) for split in SPLITS}
        samples = {split: len(keys) for split, keys in found[name].items()}
        assert manifest.artifact.meta["samples"] == samples and sum(samples.values()) == 90
        assert manifest.artifact.meta["combinations"] and list(check_shards(str(tmp_path / name))) == []
        assert {f"samples_{split}": count for split, count in samples.items()}.items() <= manifest.metrics.items()
        for split, dataset in open_splits(manifest.artifact).items():
            assert dataset.shards() == manifest.artifact.meta["shards"][split]
            assert [dataset.captions(i) for i in range(len(dataset))] == [
                [f"{key[:2]} as {key[2]}"] for key in (dataset.key(i) for i in range(len(dataset)))
            ]
    assert found["a"] == found["b"], "whatever the parts are"
    train, combinations, heldout = (found["a"][split] for split in SPLITS)
    assert set(combinations.values()) <= set(train.values()), "each subject is trained on"
    assert len(set(combinations.values())) == len(combinations) > 5 and not set(heldout.values()) & set(train.values())
    assert {key[2] for key in combinations} == {"x", "y"}
    make(configured(drawings, heldout_fraction=0.2), tmp_path / "without")
    assert of_split(tmp_path / "without", "heldout") == heldout, "the same subjects are unseen"
    assert of_split(tmp_path / "without", "train") == train | combinations


def test_duplicates_do_not_leak(drawings: Path, tmp_path: Path) -> None:
    """A copy under another subject goes to the ledger; a partner that is one does not make a subject known."""
    for number in range(20, 40):
        (drawings / f"{number}y.jpg").write_bytes((drawings / "00x.jpg").read_bytes())
    cfg = configured(drawings, **FRACTIONS, filters={"exact_duplicates": True})
    manifest = make(cfg, tmp_path / "out")
    copies = {f"{number}y" for number in range(20, 40)} | {"49x"}
    assert {row["key"] for row in ledger(tmp_path / "out")} == copies and manifest.metrics["rejected"] == len(copies)
    assert not stored(tmp_path / "out").keys() & copies and len(stored(tmp_path / "out")) == 90 - len(copies)
    combinations = of_split(tmp_path / "out", "combinations")
    assert combinations and set(combinations.values()) <= {f"{number:02d}" for number in range(20)}


def test_merging_again_after_a_cut_gives_the_same(drawings: Path, tmp_path: Path, store_uri: str) -> None:
    cfg = configured(drawings, **FRACTIONS, filters={"exact_duplicates": True})
    straight = make(cfg, tmp_path / "straight")
    parts = shard.parts(cfg, {})
    for part in parts:
        with tempfile.TemporaryDirectory() as out:
            artifacts.add_part(store_uri, part, Path(out), shard.Worker(cfg, {})(part, Path(out)))
    done = artifacts.finished_parts(store_uri)
    with tempfile.TemporaryDirectory() as out:
        shard.merge_parts(cfg, {}, open_storage(store_uri), [done[part]["stats"] for part in parts], Path(out))
        for path in sorted(Path(out).iterdir())[::2]:
            open_storage(store_uri).upload(path.name, path)
    again = commit(cfg, store_uri)
    assert [file for file in again.files if not file.path.startswith("parts/")] == [
        file for file in straight.files if not file.path.startswith("parts/")
    ]


def test_what_is_taken_out_is_gone_from_both_tars(drawings: Path, tmp_path: Path) -> None:
    manifest = make(configured(drawings, **FRACTIONS), tmp_path / "store/artifacts/shards/0123456789abcdef")
    key = next(iter(of_split(Path(manifest.artifact.uri), "combinations")))
    new = remove(plan_removal(manifest.artifact.uri, {key}))
    assert stored(Path(new.uri)).keys() == stored(Path(manifest.artifact.uri)).keys() - {key}
    assert all(f"{key}.jpg".encode() not in tar.read_bytes() for tar in Path(new.uri).glob("*.tar"))
    assert new.meta["samples"]["combinations"] == manifest.artifact.meta["samples"]["combinations"] - 1
    assert list(check_shards(new.uri)) == [] and artifacts.verify(new.uri)


def test_settings_that_hold_nothing_out(drawings: Path, tmp_path: Path) -> None:
    rows = (drawings / "metadata.jsonl").read_text().splitlines()
    alone = [json.dumps({**json.loads(row), "group": str(number)}) for number, row in enumerate(rows)]
    (drawings / "metadata.jsonl").write_text("\n".join(alone))
    with pytest.raises(ValueError, match=r"combinations_fraction 0\.4 of 90 samples held none out; raise it, or leave"):
        make(configured(drawings, **FRACTIONS), tmp_path / "out")
    with pytest.raises(ValueError, match="lower one, so that their sum is at most 1"):
        configured(drawings, heldout_fraction=0.7, combinations_fraction=0.4)
