"""Filters on sizes and captions, blocklists, and the search for duplicates."""

from __future__ import annotations

import hashlib
import io
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from pydantic import ValidationError

from genpipe.data import perceptual_hash as hashes
from genpipe.data.duplicates import HASH_SCHEMA, find_duplicates
from genpipe.data.filters import (
    FilterConfig,
    Filtered,
    blocklist_digest,
    check_blocked,
    check_caption,
    check_size,
    junk,
    keep_captions,
    read_blocklist,
)
from genpipe.data.perceptual_hash import nearest_kept, perceptual_hash
from genpipe.storage import open_storage


def fault(check: Any, *arguments: Any, **options: Any) -> str:
    """The reason of the fault that `check` finds, "" if it finds none."""
    try:
        check(*arguments, **options)
    except Filtered as filtered:
        assert filtered.detail
        return filtered.reason
    return ""


def test_every_filter_is_off_until_it_is_set() -> None:
    off = FilterConfig()
    check_size(off, height=1, width=10_000)
    for caption in ("", "IMG_0001.JPG", "x " * 10_000):
        check_caption(off, caption)
    assert read_blocklist(off) == frozenset() and blocklist_digest(off) == ""
    assert not off.finds_duplicates


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (64, 64, ""),
        (64, 128, ""),
        (63, 64, "too_small"),
        (64, 63, "too_small"),
        (64, 129, "aspect"),
        (129, 64, "aspect"),
    ],
)
def test_sizes(height: int, width: int, reason: str) -> None:
    cfg = FilterConfig(min_side=64, max_aspect=2)
    assert fault(check_size, cfg, height=height, width=width) == reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("one", "caption_too_short"),
        ("one two", ""),
        ("one two three four", ""),
        ("one two three four five", "caption_too_long"),
        ("a bc", "caption_too_short"),
        ("a bcd", ""),
        ("abcdefghi klmnopqrst", ""),
        ("abcdefghij klmnopqrst", "caption_too_long"),
    ],
)
def test_caption_lengths(caption: str, reason: str) -> None:
    cfg = FilterConfig(min_caption_words=2, max_caption_words=4, min_caption_chars=5, max_caption_chars=20)
    assert fault(check_caption, cfg, caption) == reason


def test_limits_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_caption_words 5 is more than max_caption_words 4; change one"):
        FilterConfig(min_caption_words=5, max_caption_words=4)


JUNK = {
    "only an address": ["http://a.example/b.html", "www.example.com", "https://a.example/x https://b.example/y!"],
    "a file name": [
        *("IMG_1234", "DSC00012", "IMG_20190304_101112", "PXL_20210101_123", "DSCF0001.JPG", "my holiday.jpeg"),
        *("photo 12", "image (3)", "Screenshot 2021-01-02 10.11.12", "p1010023"),
    ],
    "hardly any letters": ["12345", "2019-03-04", "24/7", "!!!", "...", "№ 12 / 34", "😀😀", "1920x1080"],
    "one word or letter repeated": ["foo foo foo", "Foo foo FOO foo", "aaaaaa", "猫 猫 猫"],
}
CAPTIONS = [
    *("a red apple", "2 cats on a sofa", "F-16 in flight", "cat", "Nr. 5", "apple apple", "Image of a dog"),
    *("the photo 12 Monkeys was shot in", "see http://a.example for a picture of a cat"),
    *("IMG_1234 of our dog in the sea", "www.example.com shows a dog"),
    *("猫", "一只猫坐在沙发上", "สุนัข", "कुत्ता", "собака", "كلب", "ねこ", "강아지 두 마리"),
]  # fmt: skip


@pytest.mark.parametrize(("why", "caption"), [(why, caption) for why, captions in JUNK.items() for caption in captions])
def test_junk(why: str, caption: str) -> None:
    assert junk(caption) == why
    assert fault(check_caption, FilterConfig(junk_captions=True), caption) == "junk_caption"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_what_is_no_junk(caption: str) -> None:
    assert junk(caption) == ""


@given(st.text())
def test_any_caption_is_judged(caption: str) -> None:
    assert isinstance(junk(caption), str)


def test_captions_that_pass_keep_their_weights() -> None:
    cfg = FilterConfig(min_caption_chars=3)
    assert keep_captions(cfg, ["ab", "abc", "d", "def"], [0.1, 0.2, 0.3, 0.4]) == (("abc", "def"), (0.2, 0.4))
    assert keep_captions(cfg, ["ab", "abc"], []) == (("abc",), ())
    assert fault(keep_captions, FilterConfig(min_caption_chars=3, max_caption_chars=4), ["12345", "1"], []) == (
        "caption_too_long"
    )


def test_blocklist(store_uri: str) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    text = f"# what was objected to\nkey-1\n\n  key-2  # on 3 March\n{digest.upper()}\n"
    open_storage(store_uri).write("blocked.txt", text.encode())
    cfg = FilterConfig(blocklist=f"{store_uri}/blocked.txt")
    assert read_blocklist(cfg) == {"key-1", "key-2", digest}
    assert blocklist_digest(cfg) == hashlib.sha256(text.encode()).hexdigest()
    for key, sha256, reason in (("key-1", "", "blocked"), ("key-3", digest, "blocked"), ("key-3", "0" * 64, "")):
        assert fault(check_blocked, read_blocklist(cfg), key=key, sha256=sha256) == reason


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_blocklist_as_editors_write_it(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "blocked.txt"
    path.write_bytes(end.join(["key-1", "", "key-2 "]).encode(encoding))
    assert read_blocklist(FilterConfig(blocklist=str(path))) == {"key-1", "key-2"}


def test_a_blocklist_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "blocked.txt"
    path.write_bytes("key-1".encode("utf-16"))
    with pytest.raises(ValueError, match=r"^filters\.blocklist: .*blocked\.txt is not UTF-8 .*; save it as UTF-8"):
        read_blocklist(FilterConfig(blocklist=str(path)))


def test_a_missing_blocklist_is_named(tmp_path: Path) -> None:
    cfg = FilterConfig(blocklist=str(tmp_path / "blocked.txt"))
    with pytest.raises(ValueError, match=r"^filters\.blocklist: there is no file .*blocked\.txt; correct the path"):
        read_blocklist(cfg)


def picture(seed: int, side: int = 200) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def dct_hash(image: Image.Image) -> int:
    """The hash as the library `imagehash` computes it, by SciPy and Pillow."""
    gray = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)).astype(float)
    low = scipy.fft.dct(scipy.fft.dct(gray, axis=0), axis=1)[:8, :8]
    return int("".join("01"[int(bit)] for bit in (low > np.median(low)).ravel()), 2)


def hashed(image: Image.Image) -> int:
    value = perceptual_hash(np.asarray(image))
    assert value is not None and 0 <= value < 2**64
    return value


def test_the_perceptual_hash_is_that_of_a_library() -> None:
    for seed in range(20):
        exact = picture(seed, side=32)  # no resizing, in which filters differ
        assert (hashed(exact) ^ dct_hash(exact)).bit_count() <= 2  # gray is rounded to 8 bits there
        assert (hashed(picture(seed)) ^ dct_hash(picture(seed))).bit_count() <= 4


def test_copies_are_near_and_other_pictures_far() -> None:
    originals = [hashed(picture(seed)) for seed in range(30)]
    for seed, original in enumerate(originals):
        buffer = io.BytesIO()
        picture(seed).resize((90, 90)).save(buffer, "JPEG", quality=40)
        for copy in (Image.open(buffer), picture(seed).filter(ImageFilter.GaussianBlur(2))):
            assert (hashed(copy) ^ original).bit_count() <= 4
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(originals, 2)) > 12


def test_flat_images_have_no_hash() -> None:
    assert perceptual_hash(np.full((40, 30, 3), 77, np.uint8)) is None
    assert perceptual_hash(np.zeros((1, 1, 3), np.uint8)) is None


def by_definition(values: list[int], distance: int) -> list[int]:
    """Each with all kept before it."""
    kept: list[int] = []
    found = []
    for row, value in enumerate(values):
        near = [other for other in kept if (values[other] ^ value).bit_count() <= distance]
        found.append(near[0] if near else row)
        if not near:
            kept.append(row)
    return found


clusters = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 63), max_size=8)), min_size=1, max_size=40
)  # few centers, and the bits in which a hash differs from its center


@settings(deadline=None)
@given(clusters=clusters, distance=st.integers(0, 12), bands=st.integers(1, 4), few=st.sampled_from([0, 10, 10**6]))
def test_near_hashes_are_found_as_by_comparing_all(
    clusters: list[tuple[int, list[int]]], distance: int, bands: int, few: int
) -> None:
    centers = np.random.default_rng(0).integers(0, 2**63, 4).tolist()
    values = [centers[center] ^ sum(1 << bit for bit in set(bits)) for center, bits in clusters]
    with pytest.MonkeyPatch.context() as patch:  # whatever is cheapest for so few
        patch.setattr(hashes, "_best_bands", lambda n, distance: (distance + bands, bands))
        patch.setattr(hashes, "_FEW_PAIRS", few)  # crowds of more are divided
        assert nearest_kept(np.array(values, np.uint64), distance=distance).tolist() == by_definition(values, distance)


def test_many_hashes() -> None:
    """Two hundred thousand, of which one in a hundred is a copy of another with a few bits flipped."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 200_000, dtype=np.uint64)
    copies, of = rng.choice(200_000, (2, 2000), replace=False)
    flips = (np.uint64(1) << rng.integers(0, 64, (2000, 3), dtype=np.uint64)).sum(axis=1)
    values[copies] = values[of] ^ flips
    found = nearest_kept(values, distance=6)
    assert (found[np.maximum(copies, of)] == np.minimum(copies, of)).all()
    assert (found != np.arange(len(values))).sum() == 2000  # another pair by chance has a probability of 1e-4


def test_a_crowd_of_near_hashes_takes_no_memory_by_the_square() -> None:
    """As of pages of text, that differ in a few bits each: all pairs would be some 200 MB."""
    rng = np.random.default_rng(0)
    flips = np.uint64(1) << rng.integers(0, 64, (6000, 3), dtype=np.uint64)
    crowd = np.uint64(0x0123456789ABCDEF) ^ np.bitwise_or.reduce(flips, axis=1)
    tracemalloc.start()
    found = nearest_kept(crowd, distance=6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found == 0).all() and peak < 20e6


def table(rows: list[tuple[bytes, int | None]]) -> pa.Table:
    named = [
        {"shard": f"train-{n // 3:05d}-00", "key": f"k{n}", "place": f"k{n}.jpg", "phash": phash}
        | {"sha256": hashlib.sha256(content).digest()}
        for n, (content, phash) in enumerate(rows)
    ]
    return pa.Table.from_pylist(named, HASH_SCHEMA)


ROWS: list[tuple[bytes, int | None]] = [
    (b"a", 0b0000),
    (b"b", 0b0011),  # near to the first at distance 2
    (b"c", 0b1111),  # near to the second only, which is gone
    (b"b", 0b0011),  # the bytes of the second
    (b"d", None),
    (b"e", None),  # flat images are no copies of each other
    (b"d", None),
]


@pytest.mark.parametrize(
    ("exact", "distance", "expected"),
    [
        (False, None, {}),
        (True, None, {3: ("duplicate_image", 1), 6: ("duplicate_image", 4)}),
        (False, 0, {3: ("near_duplicate", 1)}),
        (False, 2, {1: ("near_duplicate", 0), 3: ("near_duplicate", 0)}),
        (
            True,
            2,
            {1: ("near_duplicate", 0), 3: ("duplicate_image", 0), 6: ("duplicate_image", 4)},
        ),
    ],
)
def test_duplicates_and_what_stands_for_them(exact: bool, distance: int | None, expected: dict[int, Any]) -> None:
    found = {int(d.reject.key[1:]): d for d in find_duplicates(table(ROWS), exact=exact, distance=distance)}
    assert {row: (d.reject.reason, int(d.reject.detail.split()[-1][1:])) for row, d in found.items()} == expected
    for row, duplicate in found.items():
        assert (duplicate.shard, duplicate.reject.source) == (f"train-{row // 3:05d}-00", f"k{row}.jpg")
