"""`genpipe data ...` on real shards: a pipeline's, with artifacts made from them beside, in a folder and under S3."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Command
from PIL import Image

from genpipe import artifacts
from genpipe.artifacts import Artifact
from genpipe.config import changed
from genpipe.data.shard_dataset import open_shards
from genpipe.data.shards import INDEX_SCHEMA, INDEX_SUFFIX
from genpipe.data.takedown import affected, plan_removal, remove
from genpipe.stage_config import UNFINGERPRINTED
from genpipe.stages import shard
from genpipe.storage import join, open_storage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))


def picture(seed: int, size: tuple[int, int] = (90, 60), quality: int = 90) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty pictures, three copies of some in the last parts, and two files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    content = {f"p{n:02d}": picture(n) for n in range(20)} | {f"q{n:02d}": picture(n) for n in (1, 2, 3)}
    for name, data in {**content, "x-empty": b"", "x-page": b"<html>[/b]"}.items():
        (folder / f"{name}.jpg").write_bytes(data)
        (folder / f"{name}.txt").write_text(f"a picture called {name}\nanother caption")
    return folder


def made(store: str, kind: str, inputs: dict[str, Artifact]) -> Artifact:
    """A committed artifact of another stage."""
    identity = artifacts.identity(kind, version=1, settings={}, inputs=inputs)
    fingerprint = artifacts.fingerprint(identity)
    target = Artifact(kind=kind, uri=artifacts.artifact_uri(store, kind, fingerprint), fingerprint=fingerprint)
    return artifacts.commit(target, identity=identity, config={}, inputs=inputs, metrics={})


def sharded(pictures: Path, store: str, **options: Any) -> Artifact:
    cfg = shard.Config.model_validate(
        {
            "source": {"kind": "folder", "path": str(pictures)},
            **{"image_size": 32, "part_size": 6, "heldout_fraction": 0.2, "filters": {"exact_duplicates": True}},
            **options,
        }
    )
    config = cfg.model_dump(mode="json", exclude={"resources"})
    settings = changed(cfg, without=UNFINGERPRINTED)
    source = shard.source_digest(cfg)
    identity = artifacts.identity("shard", version=shard.VERSION, settings=settings, inputs={}, source=source)
    fingerprint = artifacts.fingerprint(identity)
    uri = artifacts.artifact_uri(store, "shards", fingerprint)
    parts = shard.parts(cfg, {})
    worker = shard.Worker(cfg, {})
    for part in parts:
        with tempfile.TemporaryDirectory() as out:
            artifacts.add_part(uri, part, Path(out), worker(part, Path(out)))
    done = artifacts.finished_parts(uri)
    with tempfile.TemporaryDirectory() as out:
        results = shard.merge_parts(cfg, {}, open_storage(uri), [done[part]["stats"] for part in parts], Path(out))
        meta, metrics = shard.finalize(cfg, {}, results, Path(out))
        target = Artifact(kind="shards", uri=uri, fingerprint=fingerprint, meta=meta)
        needs: dict[str, Any] = {"identity": identity, "config": config, "inputs": {}, "metrics": metrics}
        return artifacts.commit(target, folder=Path(out), parts=parts, run_id="7c1e", **needs)


def keys_of(artifact: Artifact) -> dict[str, str]:
    """Key and image hash of every sample that the indexes name."""
    found = {}
    for split in ("train", "heldout"):
        dataset = open_shards(artifact, split=split)  # type: ignore[arg-type]
        found |= {dataset.key(i): hashlib.sha256(dataset.image_bytes(i)).hexdigest() for i in range(len(dataset))}
    return found


def everything(artifact: Artifact) -> bytes:
    storage = open_storage(artifact.uri)
    return b"".join(storage.read(entry.key) for entry in storage.list())


def test_rejects_are_counted_and_listed(genpipe: Command, pictures: Path, tmp_path: Path) -> None:
    shards = sharded(pictures, str(tmp_path / "store"))
    code, out, err = genpipe("data", "rejects", shards.uri)
    assert code == 0, err
    words = [line.split()[:2] for line in out.splitlines()]
    assert ["duplicate_image", "3"] in words and ["empty", "1"] in words and ["not_an_image", "1"] in words
    assert "replace the file with an intact copy" in out, "what to do about it"
    assert "q02.jpg" in out and "the image is that of p02" in out and "starts with b'<html>[/b]'" in out
    code, out, _ = genpipe("data", "rejects", shards.uri, "--reason", "duplicate_image", "--limit", "2")
    assert "x-empty" not in out and "... and 1 more; --limit shows more, --csv all" in out
    code, out, _ = genpipe("data", "rejects", shards.uri, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["key"] for row in rows] == ["x-empty", "x-page", "q01", "q02", "q03"]
    assert rows[0] == {"key": "x-empty", "source": "x-empty.jpg", "reason": "empty", "detail": "the file has no bytes"}
    code, _, err = genpipe("data", "rejects", shards.uri, "--reason", "trunkated")
    assert code == 2 and "no sample was rejected for it; there are duplicate_image, empty, not_an_image" in err


def test_names_are_printed_as_they_are(genpipe: Command, pictures: Path, tmp_path: Path) -> None:
    """Also the key of a file that is missing, which is its name, and looks like markup."""
    rows = [{"file_name": "lost [bw].jpg", "text": "a caption"}, {"file_name": "lost [/b].jpg", "text": "a caption"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = genpipe("data", "rejects", sharded(pictures, str(tmp_path / "store")).uri)
    assert code == 0, err
    assert out.count("lost [bw].jpg") == out.count("lost [/b].jpg") == 2, "as the key and in the detail"


def test_shards_are_found_by_pipeline_and_by_what_was_made_from_them(
    genpipe: Command, pictures: Path, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    source = {"kind": "folder", "path": str(pictures)}
    tiny = str(Path("configs/pipeline/tiny.yaml").absolute())
    config.write_text(
        yaml.safe_dump({"base": tiny, "store": str(tmp_path / "store"), "stages": {"shard": {"source": source}}})
    )
    code, _, err = genpipe("data", "rejects", str(config))
    assert code == 2 and f"its shards are not made yet; `genpipe stage shard {config}` makes them" in err
    shards = sharded(pictures, str(tmp_path / "store"), part_size=40, filters={})
    assert genpipe("data", "rejects", str(config))[0] == 0
    features = made(str(tmp_path / "store"), "features", {"shard": shards})
    assert genpipe("data", "rejects", features.uri)[:2] == genpipe("data", "rejects", shards.uri)[:2]
    prior = made(str(tmp_path / "store"), "prior", {"features": features})
    assert genpipe("data", "rejects", prior.uri)[:2] == genpipe("data", "rejects", shards.uri)[:2]
    code, _, err = genpipe("data", "rejects", made(str(tmp_path / "store"), "clip", {}).uri)
    assert code == 2 and "not made from shards" in err
    open_storage(shards.uri).delete_all()
    for command in ("rejects", "show"):
        code, _, err = genpipe("data", command, prior.uri)
        assert code == 2 and f"what it was made from is not there any more: {shards.uri}" in err
    code, _, err = genpipe("data", "show", str(tmp_path / "nowhere"))
    assert code == 2 and "nothing is committed there (no manifest.json)" in err


def test_show_draws_samples_with_captions(genpipe: Command, pictures: Path, store_uri: str, tmp_path: Path) -> None:
    shards = sharded(pictures, store_uri, resize={"kind": "keep"})
    sheets = [tmp_path / "new" / name for name in ("one.png", "two.png", "three.png")]
    for sheet, seed in zip(sheets, "001", strict=True):
        code, out, err = genpipe("data", "show", shards.uri, "--out", str(sheet), "--n", "10", "--seed", seed)
        assert code == 0, err
        assert out.split("\n")[0].endswith("10 of 17 train samples")
    one, two, three = (Image.open(sheet) for sheet in sheets)
    assert one.size == (8 * 162 + 2, 2 * (162 + 40) + 2)
    assert one.tobytes() == two.tobytes() != three.tobytes()
    pixels = np.asarray(one)
    assert (pixels[40:120, 40:120].std(axis=(0, 1)) > 5).all(), "a picture"
    assert (pixels[164:200, 2:160] < 100).any(), "and words below it"


def test_show_passes_damaged_samples_over(genpipe: Command, pictures: Path, tmp_path: Path) -> None:
    """Kept bytes, of which only the header was looked at."""
    damaged = [f"p{n:02d}" for n in range(5)]
    for key in damaged:
        whole = (pictures / f"{key}.jpg").read_bytes()
        (pictures / f"{key}.jpg").write_bytes(whole[:700] + b"\xff\xc0" * 40 + whole[780:])
    shards = sharded(pictures, str(tmp_path / "store"), resize={"kind": "keep"}, filters={})
    code, out, err = genpipe("data", "show", shards.uri, "--out", str(tmp_path / "sheet.png"))
    train = open_shards(shards, split="train")
    bad = [train.key(i) for i in range(len(train)) if train.key(i) in damaged]
    assert code == 0 and f"{len(train) - len(bad)} of {len(train)} train samples" in out
    assert bad and all(f"{key} cannot be shown: corrupt" in err for key in bad)
    assert Image.open(tmp_path / "sheet.png").width == 8 * 162 + 2


def test_verify_finds_nothing_wrong_with_whole_shards(genpipe: Command, pictures: Path, store_uri: str) -> None:
    shards = sharded(pictures, store_uri)
    code, out, err = genpipe("data", "verify", shards.uri)
    count = len(artifacts.verify(shards.uri).files)
    assert (code, out) == (0, f"{shards.uri}: {count} files are as committed\n"), err
    features = made(store_uri, "features", {"shard": shards})
    assert genpipe("data", "verify", features.uri)[:2] == (0, f"{features.uri}: 0 files are as committed\n")


def test_verify_says_everything_that_is_wrong(genpipe: Command, pictures: Path, store_uri: str) -> None:
    """A flipped byte, a file cut short, one that is gone, and a shard that somebody has put beside the others."""
    shards = sharded(pictures, store_uri)
    storage = open_storage(shards.uri)
    first, second, third, *_ = shards.meta["shards"]["train"]
    index = storage.read(f"{first}{INDEX_SUFFIX}")
    row = pq.read_table(io.BytesIO(index)).to_pylist()[0]
    content = bytearray(storage.read(f"{first}.tar"))
    content[row["offset"] + 10] ^= 1
    storage.write(f"{first}.tar", bytes(content))
    short = storage.read(f"{second}.tar")[:-100]
    storage.write(f"{second}.tar", short)
    storage.delete(f"{third}.tar")
    storage.write(f"train-00099-00{INDEX_SUFFIX}", index)
    code, out, err = genpipe("data", "verify", shards.uri)
    assert code == 1
    assert f"{shards.uri}/{first}.tar: its content differs from the manifest's sha256" in err
    assert f"{first}: {row['key']}: the bytes of {row['key']}.jpg differ from the sha256 in the index" in err
    assert f"{shards.uri}/{second}.tar: has {len(short)} bytes, its manifest says {len(short) + 100} bytes" in err
    assert f"{shards.uri}/{third}.tar: is missing" in err and f"{third}: cannot be read" in err
    assert f"{shards.uri}/train-00099-00{INDEX_SUFFIX}: was not committed" in err
    assert f"6 faults; restore those files from a copy and delete what was added, or delete {shards.uri}" in out
    assert "Traceback" not in out + err


def listed(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "keys.txt"
    path.write_text("\n".join(lines))
    return str(path)


def test_samples_taken_out_are_gone(genpipe: Command, pictures: Path, store_uri: str, tmp_path: Path) -> None:
    """By key and by hash; the copies that an index stopped naming go with them, and what is left is untouched."""
    old = sharded(pictures, store_uri, resize={"kind": "keep"})
    before = keys_of(old)
    keys = listed(tmp_path, "p01", f"{before['p07']}  # by its hash", "p19", "absent", *(f"z{n}" for n in range(30)))
    code, out, err = genpipe("data", "remove", old.uri, "--keys", keys, "--yes")
    assert code == 0, err
    assert "3 samples leave" in out and "not there: absent" in out
    assert out.count("not there: ") == 20 and "... and 11 more of the list are not there" in out
    plan = plan_removal(old.uri, {"p01", "p07", "p19"})
    assert plan.rewritten >= {reject.source.removesuffix(".tar") for reject in plan.samples}
    new = artifacts.find(plan.target.uri)
    assert new is not None and f"committed {new.uri}" in out
    assert keys_of(new) == {key: digest for key, digest in before.items() if key not in ("p01", "p07", "p19")}
    assert genpipe("data", "verify", new.uri)[0] == 0

    content = everything(new)
    for key in ("p01", "p07", "p19"):
        assert picture(int(key[1:])) not in content and f"a picture called {key}".encode() not in content
    assert b"a picture called q01" not in content, "the bytes of a copy that no index names"
    for name in new.meta["shards"]["train"] + new.meta["shards"]["heldout"]:
        with tarfile.open(fileobj=io.BytesIO(open_storage(new.uri).read(f"{name}.tar"))) as tar:
            assert {member.name.split(".")[0] for member in tar} <= keys_of(new).keys()

    manifest, was = artifacts.verify(new.uri), artifacts.verify(old.uri)
    assert manifest.metrics["samples_train"] + manifest.metrics["samples_heldout"] == len(before) - 3
    assert manifest.metrics["captions"] == was.metrics["captions"] - 6
    assert manifest.artifact.meta["rejected"] == was.artifact.meta["rejected"] | {"removed": 3}
    assert manifest.artifact.meta["removed_from"] == [old.fingerprint] and "preview.png" not in str(manifest.files)
    table = pq.read_table(io.BytesIO(open_storage(new.uri).read("statistics.parquet"))).to_pylist()
    assert sum(row["samples"] for row in table) == len(before) - 3
    assert sum(row["captions"] for row in table) == manifest.metrics["captions"]
    code, out, _ = genpipe("data", "rejects", new.uri, "--reason", "removed", "--csv")
    assert sorted(row["key"] for row in csv.DictReader(io.StringIO(out))) == ["p01", "p07", "p19"]
    total = manifest.metrics["rejected"] + len(keys_of(new))
    assert total == manifest.metrics["samples_in"] == 25, "every sample is in an index or in the ledger"


def test_taking_out_again_from_what_is_left(pictures: Path, tmp_path: Path) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    once = remove(plan_removal(old.uri, {"p01"}))
    twice = remove(plan_removal(once.uri, {"p02", "p03"}))
    assert keys_of(twice).keys() == keys_of(old).keys() - {"p01", "p02", "p03"}
    assert twice.meta["rejected"]["removed"] == 3 and len({old.uri, once.uri, twice.uri}) == 3
    assert remove(plan_removal(old.uri, {"p01"})) == once, "done already"
    at_once = remove(plan_removal(old.uri, {"p01", "p02", "p03"}))
    for name in twice.meta["shards"]["train"]:
        assert Path(twice.uri, f"{name}.tar").read_bytes() == Path(at_once.uri, f"{name}.tar").read_bytes()


def test_what_was_trained_before_an_earlier_removal_is_listed(pictures: Path, tmp_path: Path) -> None:
    """The first shards are deleted; a model that was trained on them has seen what leaves their successors."""
    store = str(tmp_path / "store")
    old = sharded(pictures, store)
    clip = made(store, "clip", {"shard": old})
    once = remove(plan_removal(old.uri, {"p01"}))
    twice = remove(plan_removal(once.uri, {"p02"}))
    for gone in (old, once):
        open_storage(gone.uri).delete_all()
    on_twice = made(store, "clip", {"shard": twice})
    found = affected(plan_removal(twice.uri, {"p03"}))
    assert sorted(artifact.uri for artifact in found.made_from) == sorted([clip.uri, on_twice.uri])
    assert found.also_holding == [] and found.unreadable == []


def test_shards_may_be_named_from_where_one_stands(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    old = sharded(pictures, store)
    clip = made(store, "clip", {"shard": old})
    monkeypatch.chdir(Path(old.uri).parent)
    plan = plan_removal(Path(old.uri).name, {"p01"})
    assert Path(remove(plan).uri).parent == Path(old.uri).parent
    assert [artifact.uri for artifact in affected(plan).made_from] == [clip.uri]


def test_a_whole_shard_may_go(pictures: Path, tmp_path: Path) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    (first, *others) = old.meta["shards"]["train"]
    rows = pq.read_table(Path(old.uri, f"{first}{INDEX_SUFFIX}")).to_pylist()
    new = remove(plan_removal(old.uri, {row["key"] for row in rows}))
    assert new.meta["shards"]["train"] == others and not Path(new.uri, f"{first}.tar").exists()
    artifacts.verify(new.uri)


def test_a_split_is_not_emptied(pictures: Path, tmp_path: Path) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    heldout = open_shards(old, split="heldout")
    with pytest.raises(
        ValueError, match="without them nothing is left in the heldout split; delete it and shard again"
    ):
        plan_removal(old.uri, {heldout.key(i) for i in range(len(heldout))})


def test_an_interrupted_removal_goes_on(pictures: Path, tmp_path: Path) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    plan = plan_removal(old.uri, {"p01", "p13"})
    damaged = Path(old.uri, "train-00002-00.tar")
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(len(whole)))
    with pytest.raises(artifacts.ManifestError, match=r"train-00002-00\.tar: its content differs .*; restore it"):
        remove(plan)
    assert artifacts.find(plan.target.uri) is None
    done = artifacts.finished_parts(plan.target.uri)
    assert 0 < len(done) < len(plan.shards)
    damaged.write_bytes(whole)
    assert keys_of(remove(plan)).keys() == keys_of(old).keys() - {"p01", "p13"}


def test_what_was_trained_on_them_is_listed(genpipe: Command, pictures: Path, tmp_path: Path) -> None:
    store_uri = str(tmp_path / "store")
    old = sharded(pictures, store_uri)
    other = sharded(pictures, store_uri, image_size=16)
    clip, strange = made(store_uri, "clip", {"shard": old}), made(store_uri, "decoder", {})
    features = made(store_uri, "features", {"clip": clip})
    evaluate = made(store_uri, "evaluate", {"features": features, "decoder": strange})
    of_other = made(store_uri, "clip", {"shard": other})
    broken = join(store_uri, "artifacts", "prior", "0" * 16)
    open_storage(broken).write("manifest.json", b"{")
    bare = sharded(pictures, store_uri, image_size=24)
    open_storage(bare.uri).delete(f"{bare.meta['shards']['train'][0]}{INDEX_SUFFIX}")
    code, out, err = genpipe("data", "remove", old.uri, "--keys", listed(tmp_path, "p01"), "--yes")
    assert code == 0, err
    lines = out.splitlines()
    for artifact in (clip, features, evaluate):
        assert f"{artifact.kind} {artifact.uri}" in [" ".join(line.split()) for line in lines]
    assert strange.uri not in out and of_other.uri not in out
    assert f"1 {other.uri}" in [" ".join(line.split()) for line in lines], "the same sample, in other shards"
    assert f"could not be looked at: {broken}/manifest.json: not a readable manifest" in out
    assert f"could not be looked at: {bare.uri}: " in out
    new = plan_removal(old.uri, {"p01"}).target.uri
    assert f"inputs.shard={new}" in out and "stages.shard.filters.blocklist=" in out
    assert f"delete the old shards, which still hold the samples: {old.uri}" in out
    assert "delete preview.png, which may show them, from MLflow run 7c1e" in out
    assert artifacts.find(old.uri) == old


def test_the_old_shards_go_where_that_is_asked_for(genpipe: Command, pictures: Path, tmp_path: Path) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    keys = listed(tmp_path, "p01")
    code, out, err = genpipe("data", "remove", old.uri, "--keys", keys, "--yes", "--delete-old")
    assert code == 0, err
    assert f"then {old.uri} is deleted" in out and "which still hold the samples" not in out
    assert list(open_storage(old.uri).list()) == []
    assert genpipe("data", "verify", plan_uri(out))[0] == 0


def plan_uri(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("committed ")]
    return line.removeprefix("committed ")


def test_nothing_happens_without_a_yes(
    genpipe: Command, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, out, _ = genpipe("data", "remove", old.uri, "--keys", listed(tmp_path, "p01"), "--delete-old")
    assert code != 0 and "go on?" in out
    assert artifacts.find(old.uri) == old and len(list(Path(old.uri).parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["# nothing"], "holds no keys"),
        (["absent", "too"], "holds none of the 2 samples to be removed"),
    ],
)
def test_keys_that_remove_nothing(
    genpipe: Command, pictures: Path, tmp_path: Path, lines: list[str], says: str
) -> None:
    old = sharded(pictures, str(tmp_path / "store"))
    code, _, err = genpipe("data", "remove", old.uri, "--keys", listed(tmp_path, *lines), "--yes")
    assert code == 2 and says in err
    code, _, err = genpipe("data", "remove", old.uri, "--keys", str(tmp_path / "nowhere"), "--yes")
    assert code == 2 and "--keys: there is no file" in err


def test_the_same_list_keeps_them_out_for_good(pictures: Path, tmp_path: Path) -> None:
    """A hash that the index gave and a key, as the blocklist of the next sharding."""
    old = sharded(pictures, str(tmp_path / "store"))
    keys = listed(tmp_path, "p01", keys_of(old)["p07"])
    again = sharded(pictures, str(tmp_path / "store"), filters={"exact_duplicates": True, "blocklist": keys})
    assert keys_of(again).keys() == (keys_of(old).keys() | {"q01"}) - {"p01", "p07"}, "its copy has another key"


def test_old_indexes_are_taken_as_they_are(pictures: Path, tmp_path: Path) -> None:
    """Shards whose index knows no sha256 yet: samples are found by key."""
    old = sharded(pictures, str(tmp_path / "store"), filters={})
    before = Path(tmp_path / "before")
    before.mkdir()
    for path in Path(old.uri).glob("*.*"):
        if path.name.endswith(INDEX_SUFFIX):
            pq.write_table(pq.read_table(path, columns=INDEX_SCHEMA.names[:6]), before / path.name)
        elif path.name != "manifest.json":
            (before / path.name).write_bytes(path.read_bytes())
    identity = artifacts.identity("shard", version=1, settings={"before": "sha256"}, inputs={})
    moved = {"uri": str(tmp_path / "store/artifacts/shards/old"), "fingerprint": artifacts.fingerprint(identity)}
    target = old.model_copy(update=moved)
    metrics = artifacts.verify(old.uri).metrics
    artifacts.commit(target, folder=before, identity=identity, config={}, inputs={}, metrics=metrics)
    new = remove(plan_removal(target.uri, {"p01"}))
    assert keys_of(new).keys() == keys_of(old).keys() - {"p01"}
