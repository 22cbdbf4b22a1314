from __future__ import annotations

import itertools
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genpipe import artifacts
from genpipe.artifacts import Artifact, ManifestError
from genpipe.data.image_batches import image_batch
from genpipe.data.images import ImageError, encode
from genpipe.data.shard_dataset import ShardDataset, collect_damaged, open_shards
from genpipe.data.shards import ShardWriter
from genpipe.storage import open_storage

SIDE = 16


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples in four shards of two parts, and one held out."""
    path = tmp_path_factory.mktemp("shards")
    numbers = iter(range(11))
    for split, part, count in (("train", 0, 5), ("train", 1, 5), ("heldout", 0, 1)):
        with ShardWriter(path, split=split, part=part, max_samples=3, max_bytes=10**6) as writer:  # type: ignore[arg-type]
            for number in itertools.islice(numbers, count):
                writer.write(
                    f"key-{number}",
                    group=f"group-{number // 2}",
                    image=encode(picture(number), format="png"),
                    format="png",
                    height=SIDE,
                    width=SIDE,
                    source="",
                    captions=[f"caption {number}.{n}" for n in range(number % 3 + 1)],
                    meta={},
                )
    return path


def test_samples_by_index(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train")
    assert len(dataset) == 10
    assert dataset.shards() == ["train-00000-00", "train-00000-01", "train-00001-00", "train-00001-01"]
    assert [dataset.rows(shard) for shard in dataset.shards()] == [
        range(3),
        range(3, 5),
        range(5, 8),
        range(8, 10),
    ]
    for i in reversed(range(10)):
        assert (dataset.key(i), dataset.group(i)) == (f"key-{i}", f"group-{i // 2}")
        assert dataset.captions(i) == [f"caption {i}.{n}" for n in range(i % 3 + 1)]
        assert (dataset.image(i) == picture(i)).all()
    assert [ShardDataset(folder, split="heldout").key(0)] == ["key-10"]
    for i in (-1, 10):
        with pytest.raises(IndexError):
            dataset.key(i)
    dataset.close()
    assert (dataset.image(0) == picture(0)).all()
    dataset.close()


def test_threads_read_the_same_bytes(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train")
    wrong: list[int] = []

    def read(offset: int) -> None:
        wrong.extend(i for i in np.roll(np.arange(10), offset) if (dataset.image(int(i)) != picture(int(i))).any())

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset.close()
    assert wrong == []


def test_missing_shards_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no train shards"):
        ShardDataset(tmp_path, split="train")
    index = "train-00000-00.index.parquet"
    (tmp_path / index).write_bytes((folder / index).read_bytes())
    with pytest.raises(ValueError, match="no tar beside the index of train-00000-00; shard again"):
        ShardDataset(tmp_path, split="train")


def test_a_damaged_sample_gives_way_to_the_next_of_its_source(tmp_path: Path) -> None:
    """Sources of five and three samples; the last of the first and all of the second are cut off."""
    mixed = mix(tmp_path, counts={"photos": 5, "web": 3}, damaged={4, 5, 6, 7})
    dataset = ShardDataset(mixed, split="train")
    assert dataset.sources() == {"photos": range(0, 5), "web": range(5, 8)}
    with collect_damaged() as noticed:
        images = image_batch(dataset, np.array([2, 4]), size=SIDE).permute(0, 2, 3, 1).numpy()
    assert (images == [picture(2), picture(0)]).all(), "the last of a source is followed by its first"
    (reject,) = noticed
    assert (reject.key, reject.source) == ("key-4", "train-00001-00.tar")
    assert reject.reason in ("truncated", "corrupt") and reject.detail and "changed since" not in reject.detail
    with pytest.raises(ValueError) as error:
        image_batch(dataset, np.array([0, 6]), size=SIDE)
    assert str(error.value) == (
        f"{mixed}: 100 samples in a row are damaged, from 'key-6' on; `genpipe data verify` says what is wrong with "
        "the shards"
    )
    with pytest.raises(ImageError):
        dataset.image(4)


def mix(folder: Path, *, counts: dict[str, int], damaged: set[int]) -> Path:
    """Shards of up to four samples, several sources after one another, and weights on the captions of the second."""
    numbers, parts = itertools.count(), itertools.count()
    for source, count in counts.items():
        for first in range(0, count, 4):
            with ShardWriter(folder, split="train", part=next(parts), max_samples=9, max_bytes=10**6) as writer:
                for number in itertools.islice(numbers, min(4, count - first)):
                    image = encode(picture(number), format="png")
                    writer.write(
                        f"key-{number}",
                        group="g",
                        image=image[:90] if number in damaged else image,
                        format="png",
                        height=SIDE,
                        width=SIDE,
                        source=source,
                        captions=["one", "two"],
                        caption_weights=() if source == "photos" else (1.0, 3.0),
                        meta={},
                    )
    return folder


def test_captions_are_chosen_by_their_weights(tmp_path: Path) -> None:
    dataset = ShardDataset(mix(tmp_path, counts={"photos": 1, "web": 1}, damaged=set()), split="train")
    assert [dataset.caption_weights(i) for i in (0, 1)] == [[], [1.0, 3.0]]
    draws = (0.0, 0.24, 0.26, 0.49, 0.51, 0.99)
    assert [dataset.caption(0, draw=draw) for draw in draws] == ["one"] * 4 + ["two"] * 2
    assert [dataset.caption(1, draw=draw) for draw in draws] == ["one"] * 2 + ["two"] * 4


def test_an_index_of_an_earlier_version_is_read_by_its_names(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    for path in (tmp_path / "old").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.select(["format", "length", "offset", "captions", "group", "key"]), path)
    dataset = ShardDataset(tmp_path / "old", split="train")
    assert dataset.sources() == {"": range(10)} and dataset.caption_weights(1) == []
    assert (image_batch(dataset, np.array([3]), size=SIDE)[0].permute(1, 2, 0).numpy() == picture(3)).all()
    assert dataset.caption(1, draw=0.9) == "caption 1.1"


def test_a_pickled_dataset_is_its_arguments(folder: Path) -> None:
    dataset = ShardDataset(folder, split="train", only="train-00001-00")
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert len(again) == 3 and again.key(0) == "key-5" and (again.image(2) == picture(7)).all()


def test_a_shard_that_lost_all_its_samples_is_passed_over(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "less")
    index = tmp_path / "less" / "train-00000-01.index.parquet"
    pq.write_table(pq.read_table(index).slice(0, 0), index)
    dataset = ShardDataset(tmp_path / "less", split="train")
    assert dataset.shards() == ["train-00000-00", "train-00001-00", "train-00001-01"]
    assert [dataset.key(i) for i in range(len(dataset))] == [f"key-{i}" for i in (0, 1, 2, 5, 6, 7, 8, 9)]


def spoil(path: Path, column: str, values: list[object]) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(values, table.schema.types[place])), path
    )


def test_an_index_that_disagrees_with_its_tar_is_refused(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    short = copy("short")
    tar = short / "train-00000-00.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"short: train-00000-00.tar ends before its index does; restore it or shard"):
        ShardDataset(short, split="train")

    odd = copy("odd")
    index = odd / "train-00000-00.index.parquet"
    spoil(index, "offset", [512, 700, 4096])
    with pytest.raises(ValueError, match=r"00.index.parquet: holds offsets at which no tar has a member; shard again"):
        ShardDataset(odd, split="train")
    index.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"00.index.parquet: not a readable index .*; shard again"):
        ShardDataset(odd, split="train")

    swapped = copy("swapped")
    (swapped / "train-00000-00.tar").rename(swapped / "tar")
    (swapped / "train-00001-00.tar").rename(swapped / "train-00000-00.tar")
    (swapped / "tar").rename(swapped / "train-00001-00.tar")
    dataset = ShardDataset(swapped, split="train")
    with pytest.raises(ValueError) as error:
        dataset.image(0)
    assert str(error.value) == (
        f"{swapped}/train-00000-00.index.parquet does not describe train-00000-00.tar: where it has 'key-0' stands "
        "'key-5.png'; restore the two from one copy, or shard again"
    )

    shifted = copy("shifted")
    offsets = pq.read_table(shifted / "train-00000-00.index.parquet")["offset"].to_pylist()
    spoil(shifted / "train-00000-00.index.parquet", "offset", [offsets[0], offsets[1] + 512, offsets[2]])
    dataset = ShardDataset(shifted, split="train")
    dataset.image(0)
    with pytest.raises(ValueError, match=r"does not describe train-00000-00.tar: where it has 'key-1' stands"):
        image_batch(dataset, np.array([1]), size=SIDE)


def test_a_shard_deleted_after_its_listing_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    dataset = ShardDataset(tmp_path / "copy", split="train")
    (tmp_path / "copy" / "train-00001-00.tar").unlink()
    dataset.image(0)
    with pytest.raises(FileNotFoundError, match=r"train-00001-00.tar.*: gone since its index was read; restore it or"):
        image_batch(dataset, np.array([0, 5]), size=SIDE)


def commit(folder: Path, uri: str) -> Artifact:
    identity = artifacts.identity("shard", version=1, settings={}, inputs={})
    made = Artifact(kind="shards", uri=f"{uri}/shards", fingerprint=artifacts.fingerprint(identity))
    return artifacts.commit(made, folder=folder, identity=identity, config={}, inputs={}, metrics={})


def test_shards_are_read_where_they_are(
    folder: Path, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under S3 the indexes are copied whole and of the tars only what is read."""
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    artifact = commit(folder, store_uri)
    dataset = open_shards(artifact, split="train")
    assert len(dataset) == 10 and not list(tmp_path.glob("cache/blocks/??/*"))
    for i in (9, 0, 4, 0):
        assert (dataset.image(i) == picture(i)).all()
    remote = store_uri.startswith("s3://")
    copied = [path.name for path in tmp_path.glob("cache/**/*") if path.is_file()]
    assert not any(name.endswith(".tar") for name in copied)
    assert len(list(tmp_path.glob("cache/shards/*.indexes/*.parquet"))) == (4 if remote else 0)
    assert len(list(tmp_path.glob("cache/blocks/??/*"))) == (3 if remote else 0), "a block of each tar that was read"
    one = open_shards(artifact, split="train", only="train-00001-01")
    assert len(one) == 2 and (pickle.loads(pickle.dumps(one)).image(1) == picture(9)).all()
    if remote:
        for entry in open_storage(artifact.uri).list():
            open_storage(artifact.uri).delete(entry.key)
        assert (dataset.image(0) == picture(0)).all(), "what was read stays"
        with pytest.raises(FileNotFoundError, match="gone since its index was read; restore it or shard again"):
            dataset.image(5)


def test_an_index_that_changed_on_the_way_is_refused(
    folder: Path, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    artifact = commit(folder, f"s3://genpipe/{tmp_path.name}")
    name = "train-00000-01.index.parquet"
    data = bytearray((folder / name).read_bytes())
    data[100] ^= 1
    open_storage(artifact.uri).write(name, bytes(data))
    with pytest.raises(ManifestError, match=f"{name}: arrived with another sha256 than its manifest's"):
        open_shards(artifact, split="train")


def test_a_cache_without_a_size_is_refused(
    folder: Path, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GENPIPE_CACHE_GB", "lots")
    with pytest.raises(ValueError, match="GENPIPE_CACHE_GB='lots': give the gigabytes"):
        open_shards(commit(folder, f"s3://genpipe/{tmp_path.name}"), split="train")


def test_memory_is_a_dozen_bytes_a_sample(tmp_path: Path) -> None:
    """A shard of 300,000 samples that exist in the index only; long captions wait on disk until they are asked for."""
    n = 300_000
    numbers = np.arange(n)
    columns = {
        "key": pa.array([f"key-{i}" for i in range(n)]),
        "captions": pa.array([["a caption of some length"]] * n),
        "offset": pa.array(numbers * 4096 + 512),
        "length": pa.array(np.full(n, 3000)),
        "height": pa.array(np.full(n, 64, np.int32)),
        "width": pa.array(np.full(n, 64, np.int32)),
        "source": pa.array([""] * n),
    }
    pq.write_table(pa.table(columns), tmp_path / "train-00000-00.index.parquet")
    with (tmp_path / "train-00000-00.tar").open("wb") as file:
        file.truncate(n * 4096 + 4096)  # sparse
    dataset = ShardDataset(tmp_path, split="train")
    held = sum(value.nbytes for value in vars(dataset).values() if isinstance(value, np.ndarray))
    assert held <= 12 * n + 100
    assert not any(isinstance(value, list) and len(value) > 10 for value in vars(dataset).values())
    assert dataset.captions(n - 1) == ["a caption of some length"]


def test_names_too_long_for_a_header_are_found_by_what_fits(tmp_path: Path) -> None:
    key = "k" * 130
    with ShardWriter(tmp_path, split="train", part=0, max_samples=3, max_bytes=10**6) as writer:
        image = encode(picture(0), format="png")
        facts = {"group": "g", "format": "png", "height": SIDE, "width": SIDE, "captions": ["c"], "meta": {}}
        writer.write(key, image=image, **facts)  # type: ignore[arg-type]
    with tarfile.open(tmp_path / "train-00000-00.tar") as tar:
        assert tar.getnames()[0] == f"{key}.png"
    assert (ShardDataset(tmp_path, split="train").image(0) == picture(0)).all()


def test_bytes_that_changed_since_they_were_written_are_told_of(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "rotten")
    tar = tmp_path / "rotten" / "train-00000-00.tar"
    data = bytearray(tar.read_bytes())
    data[512:532] = bytes(20)
    tar.write_bytes(bytes(data))
    with collect_damaged() as noticed:
        image_batch(ShardDataset(tmp_path / "rotten", split="train"), np.array([0]), size=SIDE)
    assert [reject.key for reject in noticed] == ["key-0"]
    assert noticed[0].detail.endswith("; its bytes have changed since the index was written")


def test_shards_of_which_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "none")
    index = tmp_path / "none" / "heldout-00000-00.index.parquet"
    pq.write_table(pq.read_table(index).slice(0, 0), index)
    with pytest.raises(ValueError, match="the heldout shards hold no samples any more; shard again"):
        ShardDataset(tmp_path / "none", split="heldout")
