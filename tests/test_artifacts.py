"""Artifacts: what is committed is found whole, and what is damaged is refused by name."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpipe import artifacts
from genpipe.artifacts import Artifact, ManifestError
from genpipe.storage import S3Storage, join, open_storage

FILES = {"a.bin": b"alpha", "deep/b.bin": b"beta" * 1000, "empty": b""}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def committed(uri: str, folder: Path, **fields: Any) -> Artifact:
    needs: dict[str, Any] = {"config": {"lr": 1e-3}, "inputs": {}, "metrics": {"loss": 0.25}} | fields
    identity = artifacts.identity("thing", version=2, settings=needs["config"], inputs=needs["inputs"])
    meta = {"size": 3, "mean": [0.1, 1e-7]}
    target = Artifact(kind="thing", uri=uri, fingerprint=artifacts.fingerprint(identity), meta=meta)
    return artifacts.commit(target, folder=folder, identity=identity, **needs)


@pytest.fixture
def thing(tmp_path: Path) -> Artifact:
    return committed(str(tmp_path / "thing"), write_folder(tmp_path / "made", FILES))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_commit_then_find_verify_and_fetch(store_uri: str, tmp_path: Path, cache: Path) -> None:
    source = Artifact(kind="source", uri="elsewhere", fingerprint="e" * 64)
    made = committed(store_uri, write_folder(tmp_path / "made", FILES), inputs={"source": source}, run_id="run")
    assert artifacts.find(store_uri) == made
    manifest = artifacts.verify(store_uri)
    assert {file.path: file.size for file in manifest.files} == {name: len(data) for name, data in FILES.items()}
    assert (manifest.config, manifest.metrics) == ({"lr": 1e-3}, {"loss": 0.25})
    assert (manifest.identity["version"], manifest.identity["inputs"]) == (2, {"source": "e" * 64})
    assert (manifest.inputs, manifest.run_id) == ({"source": source}, "run")
    folder = artifacts.fetch(made)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert artifacts.fetch(made) == folder


def test_nothing_committed_is_no_artifact(store_uri: str) -> None:
    assert artifacts.find(store_uri) is None
    open_storage(store_uri).write("weights.safetensors", b"half a stage")
    assert artifacts.find(store_uri) is None
    with pytest.raises(ManifestError) as error:
        artifacts.verify(store_uri)
    assert str(error.value) == f"{store_uri}: no manifest.json here, so nothing was committed"


def test_a_moved_artifact_knows_where_it_is(thing: Artifact, tmp_path: Path) -> None:
    os.rename(thing.uri, tmp_path / "moved")
    assert artifacts.find(str(tmp_path / "moved")) == thing.model_copy(update={"uri": str(tmp_path / "moved")})


def edit(text: str) -> str:
    return text.replace('"loss": 0.25', '"loss": 0.05')


def truncate(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (edit, "changed since it was written (its digest differs)"),
        (truncate, "not a readable manifest"),
        (lambda _: "not JSON at all", "not a readable manifest"),
        (lambda _: "[]", "not a readable manifest"),
        (lambda _: "{}", "not a readable manifest"),
        (lambda _: "", "not a readable manifest"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}), "not a readable manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(thing: Artifact, damage: Any, says: str) -> None:
    path = Path(thing.uri, "manifest.json")
    before = path.read_text()
    assert damage(before) != before
    path.write_text(damage(before))
    with pytest.raises(ManifestError) as error:
        artifacts.find(thing.uri)
    remedy = f"delete {thing.uri} to have it made again, or restore it from a copy"
    assert str(error.value) == f"{path}: {says}; {remedy}"


def test_a_missing_or_short_file_is_refused(store_uri: str, tmp_path: Path) -> None:
    made = committed(store_uri, write_folder(tmp_path / "made", FILES))
    remedy = f"delete {store_uri} to have it made again, or restore it from a copy"
    open_storage(store_uri).write("deep/b.bin", b"beta")
    with pytest.raises(ManifestError) as error:
        artifacts.find(made.uri)
    assert str(error.value) == f"{store_uri}/deep/b.bin: has 4 bytes, its manifest says 4000 bytes; {remedy}"
    open_storage(store_uri).delete("deep/b.bin")
    with pytest.raises(ManifestError) as error:
        artifacts.find(made.uri)
    assert str(error.value) == f"{store_uri}/deep/b.bin: is missing, its manifest says 4000 bytes; {remedy}"


def test_a_flipped_byte_is_found(store_uri: str, tmp_path: Path, cache: Path) -> None:
    made = committed(store_uri, write_folder(tmp_path / "made", FILES))
    open_storage(store_uri).write("a.bin", b"alphA")
    assert artifacts.find(store_uri) == made, "sizes still agree"
    with pytest.raises(ManifestError) as error:
        artifacts.verify(store_uri)
    assert str(error.value) == f"{store_uri}/a.bin: its content differs from the manifest's sha256"
    if store_uri.startswith("s3://"):
        with pytest.raises(ManifestError, match="arrived with another sha256"):
            artifacts.fetch(made)
        assert [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()] == [], (
            "no half copy stays"
        )


def test_a_remote_artifact_is_copied_once(s3_server: str, tmp_path: Path, cache: Path) -> None:
    uri = f"s3://genpipe/{tmp_path.name}"
    files = write_folder(tmp_path / "made", FILES)
    (files / artifacts.ASIDE).mkdir()
    (files / artifacts.ASIDE / "large").write_bytes(bytes(1000))
    made = committed(uri, files)
    folder = artifacts.fetch(made)
    assert folder == cache / "thing" / made.fingerprint
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(FILES)
    open_storage(uri).delete_all()
    assert artifacts.fetch(made) == folder
    with pytest.raises(ManifestError, match="nothing was committed"):
        artifacts.fetch(made.model_copy(update={"fingerprint": "0" * 64}))


def fetch_noting(artifact: dict[str, Any], log: str, stuck: str, processes: int) -> None:
    """In another process: fetch, and note what is downloaded; of the file `stuck` only half of it ever comes."""

    def download(self: S3Storage, key: str, path: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{key}\n")
        if key == stuck:
            path.write_bytes(self.read(key)[:100])
            threading.Event().wait()
        usual(self, key, path)

    usual, S3Storage.download = S3Storage.download, download  # type: ignore[method-assign]
    Path(f"{log}.{os.getpid()}").touch()
    while len(list(Path(log).parent.glob("log.*"))) < processes:  # begin together
        time.sleep(0.001)
    artifacts.fetch(Artifact.model_validate(artifact))


def start_fetching(artifact: Artifact, log: Path, *, processes: int = 1, stuck: str = "") -> list[Any]:
    spawn = multiprocessing.get_context("spawn")
    arguments = (artifact.model_dump(mode="json"), str(log), stuck, processes)
    started = [spawn.Process(target=fetch_noting, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    return started


def test_processes_that_fetch_at_once_share_one_copy(s3_server: str, tmp_path: Path, cache: Path) -> None:
    made = committed(f"s3://genpipe/{tmp_path.name}", write_folder(tmp_path / "made", FILES))
    for process in start_fetching(made, tmp_path / "log", processes=2):
        process.join()
        assert process.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) == sorted(FILES), "each file came once"
    folder = artifacts.fetch(made)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_a_fetch_that_was_killed_goes_on_with_what_it_lacks(s3_server: str, tmp_path: Path, cache: Path) -> None:
    made = committed(f"s3://genpipe/{tmp_path.name}", write_folder(tmp_path / "made", FILES))
    [process] = start_fetching(made, tmp_path / "log", stuck="deep/b.bin")
    staging = cache / "thing" / f"{made.fingerprint}.part"
    while not all((staging / name).exists() for name in ("a.bin", "empty")) or not list(staging.glob("deep/*")):
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert not (staging / "deep/b.bin").exists(), "half a file does not have its name"
    (staging / "a.bin").write_bytes(b"alphA")  # as a crash of the machine may leave what was not written through
    (tmp_path / "log").unlink()
    [process] = start_fetching(made, tmp_path / "log")
    process.join()
    assert sorted((tmp_path / "log").read_text().split()) == ["a.bin", "deep/b.bin"]
    folder = cache / "thing" / made.fingerprint
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == FILES and not staging.exists()


def test_a_file_takes_the_place_of_markers_that_were_read(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "ROLL", 3)
    names = [f"part-{number}" for number in range(8)]
    for number, name in enumerate(names[:7]):
        artifacts.add_part(store_uri, name, write_folder(tmp_path / name, {name: b"1"}), {"count": number})
    storage = open_storage(store_uri)
    for _ in range(2):
        done = artifacts.finished_parts(store_uri)
        assert {part: record["stats"]["count"] for part, record in done.items()} == {
            name: number for number, name in enumerate(names[:7])
        }
        assert len(list(storage.list("_parts/"))) == 3, "two files of three parts each, and a marker"
        assert artifacts.missing_parts(store_uri, names) == names[7:]
    artifacts.add_part(store_uri, names[0], write_folder(tmp_path / "new", {names[0]: b"22"}), {"count": 9})
    done = artifacts.finished_parts(store_uri)
    assert [done[name]["stats"]["count"] for name in names[:3]] == [9, 1, 2], "a part that is repeated is read again"
    committed(store_uri, write_folder(tmp_path / "rest", {"rest": b""}), parts=names[:7])
    assert {file.path: file.size for file in artifacts.verify(store_uri).files} == {
        "rest": 0, names[0]: 2, **dict.fromkeys(names[1:7], 1),
    }  # fmt: skip
    assert not list(storage.list("_parts/"))


def test_parts_count_as_they_were_made_last(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process was killed after it wrote a file of markers and before it deleted them."""
    monkeypatch.setattr(artifacts, "ROLL", 2)
    storage = open_storage(store_uri)
    for count in range(3):
        for name in ("one", "two"):
            artifacts.mark_part(storage, name, [], {"count": count})
        markers = {entry.key: storage.read(entry.key) for entry in storage.list("_parts/") if "rolled" not in entry.key}
        artifacts.finished_parts(store_uri)
    for key, marker in markers.items():
        storage.write(key, marker)
    for _ in range(2):
        done = artifacts.finished_parts(store_uri)
        assert {part: record["stats"]["count"] for part, record in done.items()} == {"one": 2, "two": 2}
    artifacts.forget_part(store_uri, "one")
    assert artifacts.finished_parts(store_uri).keys() == {"two"}
    assert artifacts.missing_parts(store_uri, ["one", "two"]) == ["one"]


def test_finished_parts_are_taken_up(store_uri: str, tmp_path: Path) -> None:
    artifacts.add_part(store_uri, "one", write_folder(tmp_path / "1", {"one.bin": b"1"}), {"count": 1})
    artifacts.add_part(store_uri, "part two/€", write_folder(tmp_path / "2", {"two.bin": b"22"}), {"count": 2})
    artifacts.add_part(store_uri, "one", write_folder(tmp_path / "3", {"one.bin": b"new"}), {"count": 3})
    assert artifacts.find(store_uri) is None, "parts alone are no artifact"
    done = artifacts.finished_parts(store_uri)
    assert {part: record["stats"] for part, record in done.items()} == {
        "one": {"count": 3},
        "part two/€": {"count": 2},
    }
    committed(store_uri, write_folder(tmp_path / "rest", {"c.bin": b"c"}), parts=["one", "part two/€"])
    manifest = artifacts.verify(store_uri)
    assert [(file.path, file.size) for file in manifest.files] == [("c.bin", 1), ("one.bin", 3), ("two.bin", 2)]
    assert sorted(entry.key for entry in open_storage(store_uri).list()) == [
        "c.bin",
        "manifest.json",
        "one.bin",
        "two.bin",
    ]


def test_a_part_without_its_marker_is_not_done(tmp_path: Path) -> None:
    """A worker that dies between its files and its marker leaves the part to do."""
    uri = str(tmp_path / "thing")
    open_storage(uri).write("one.bin", b"1")
    assert artifacts.finished_parts(uri) == {}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.sampled_from("abcd"), json_values, max_size=4)


@given(configs, configs)
def test_fingerprints_differ_exactly_if_settings_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    def of(settings: dict[str, Any]) -> str:
        return artifacts.fingerprint(artifacts.identity("stage", version=1, settings=settings, inputs={}))

    assert (of(one) == of(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))
    assert of(one) == of(dict(reversed(one.items())))


def test_fingerprints_depend_on_everything_that_decides_the_output() -> None:
    def of(stage: str = "stage", **changed: Any) -> str:
        needs: dict[str, Any] = {"version": 1, "settings": {"lr": 1}, "inputs": {}, "source": ""} | changed
        return artifacts.fingerprint(artifacts.identity(stage, **needs))

    source = Artifact(kind="source", uri="here", fingerprint="e")
    moved = source.model_copy(update={"uri": "there", "meta": {"x": 1}})
    prints = [
        of(),
        of("other"),
        of(version=2),
        of(settings={"lr": 2}),
        of(source="digest"),
        of(inputs={"source": source}),
        of(inputs={"other": source}),
    ]
    assert len(set(prints)) == 7
    assert of(inputs={"source": moved}) == of(inputs={"source": source}), "a place is no content"


def test_a_manifest_whose_fingerprint_is_not_its_identitys_is_refused(thing: Artifact) -> None:
    """Also where whoever changed it made the digest fit."""
    path = Path(thing.uri, "manifest.json")
    record = json.loads(path.read_text())
    del record["digest"]
    record["identity"]["settings"]["lr"] = 2e-3
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**record, "digest": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises(ManifestError, match=re.escape(str(path))):
        artifacts.find(thing.uri)


def test_what_was_planned_is_found_and_another_is_refused(thing: Artifact) -> None:
    assert artifacts.committed(thing) == thing
    with pytest.raises(ManifestError, match=re.escape(thing.uri)):
        artifacts.committed(thing.model_copy(update={"fingerprint": "0" * 64}))
    assert artifacts.committed(thing.model_copy(update={"uri": f"{thing.uri}-elsewhere"})) is None


def test_inputs_of_the_same_store_move_with_it(tmp_path: Path) -> None:
    made = write_folder(tmp_path / "made", FILES)
    near = committed(str(tmp_path / "store/artifacts/thing/1"), made)
    far = committed(str(tmp_path / "other/artifacts/thing/2"), made)
    committed(str(tmp_path / "store/artifacts/sum/3"), made, inputs={"near": near, "far": far})
    (tmp_path / "store").rename(tmp_path / "moved")
    manifest = artifacts.read_manifest(str(tmp_path / "moved/artifacts/sum/3"))
    assert manifest is not None
    assert manifest.inputs["near"].uri == str(tmp_path / "moved/artifacts/thing/1")
    assert manifest.inputs["far"] == far


def test_artifacts_of_a_role_that_takes_several_come_in_order() -> None:
    made = [Artifact(kind="decoder", uri=f"/{i}", fingerprint=str(i)) for i in range(12)]
    inputs = {f"decoders.{i}": artifact for i, artifact in reversed(list(enumerate(made)))} | {"clip": made[0]}
    assert artifacts.several(inputs, "decoders") == made
    assert artifacts.several(inputs, "priors") == []


def test_uris_of_artifacts_and_of_unfinished_work() -> None:
    assert artifacts.artifact_uri("s3://b/p", "clip", "0123456789abcdef0") == "s3://b/p/artifacts/clip/0123456789abcdef"
    assert artifacts.work_uri("runs/x", "clip", "0123456789abcdef0") == "runs/x/work/clip/0123456789abcdef"
    assert join("runs/x", "a") == "runs/x/a"
