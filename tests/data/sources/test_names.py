from __future__ import annotations

import unicodedata

import pytest

from genpipe.data.sources.names import Names, pair_by_stem

FILES = ["train/p_0.jpg", "train/deep/p_0.jpg", "p_1.jpg", unicodedata.normalize("NFD", "\u00e9t\u00e9.jpg")]


@pytest.mark.parametrize(
    "written, folder, expected",
    [
        ("p_0.jpg", "train", "train/p_0.jpg"),
        ("train/p_0.jpg", "train", "train/p_0.jpg"),  # the folder's own name repeated
        ("train/p_0.jpg", "", "train/p_0.jpg"),
        ("/home/somebody/photos/train/p_0.jpg", "", "train/p_0.jpg"),
        ("C:\\photos\\train\\p_0.jpg", "", "train/p_0.jpg"),
        ("../p_1.jpg", "train", "p_1.jpg"),
        ("p_1.jpg", "train", "p_1.jpg"),
        ("deep/./p_0.jpg", "train", "train/deep/p_0.jpg"),
        ("\u00e9t\u00e9.jpg", "", FILES[3]),
        ("p_2.jpg", "train", None),
        ("_0.jpg", "train", None),
    ],
)
def test_a_name_in_a_table(written: str, folder: str, expected: str | None) -> None:
    assert Names(FILES).find(written, folder=folder) == expected


@pytest.mark.parametrize("written", ["../p_1.jpg", "/etc/passwd", "../../x.jpg"])
def test_a_name_that_leads_out(written: str) -> None:
    with pytest.raises(ValueError, match="outside the folder"):
        Names(FILES).find(written, folder="")


def test_sidecars_by_stem() -> None:
    nfd = unicodedata.normalize("NFD", "caf\u00e9")
    images = ["a.png", "a.gif", "IMG_1.JPG", "Two.jpg", "two.png", f"{nfd}.jpg", "alone.jpg"]
    texts = ["a.txt", "a.TXT", "img_1.TXT", "TWO.txt", "caf\u00e9.txt", "other.txt"]
    assert pair_by_stem(images, texts) == {
        "a.png": "a.txt",
        "a.gif": "a.txt",
        "IMG_1.JPG": "img_1.TXT",
        f"{nfd}.jpg": "caf\u00e9.txt",
    }, "whose TWO.txt is, nothing tells"
