from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from genpipe.data.images import WHITE, decode
from genpipe.data.sheets import contact_sheet

FONT = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
RED = (255, 0, 0)


def test_contact_sheet() -> None:
    red = np.full((4, 4, 3), RED, np.uint8)
    sheet = decode(contact_sheet([red, red, red], columns=2, cell=4))
    assert sheet.shape == (2 + 2 * 6, 2 + 2 * 6, 3)
    assert tuple(sheet[3, 3]) == RED and tuple(sheet[-4, -4]) == WHITE and tuple(sheet[0, 0]) == WHITE


def test_a_contact_sheet_fits_any_shape_and_draws_captions() -> None:
    red = np.full((40, 20, 3), RED, np.uint8)
    plain = decode(contact_sheet([red, red], columns=2, cell=20, captions=["", ""]))
    assert tuple(plain[12, 12]) == RED and tuple(plain[12, 4]) == WHITE  # 10 pixels wide, in the middle
    drawn = decode(contact_sheet([red, red], columns=2, cell=20, captions=["two words", "more"]))
    assert plain.shape == drawn.shape
    assert (plain[:22] == drawn[:22]).all() and (plain[22:] != drawn[22:]).any()


@pytest.mark.parametrize(
    "caption",
    [
        "W" * 400,
        "MMMM WWWW " * 40,
        "a caption of many short words that goes on and on " * 5,
        "\u4e00\u53ea\u732b\u5750\u5728\u7a97\u53f0\u4e0a" * 20,
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 " * 20,
        "\U0001f431\u200d\U0001f464\u0301\u0301 " * 50,
    ],
)
@pytest.mark.parametrize("font", ["", FONT])
def test_a_caption_stays_below_its_image(caption: str, font: str) -> None:
    black = np.zeros((60, 60, 3), np.uint8)
    captions = ["", caption, "", ""]
    sheet = decode(contact_sheet([black] * 4, columns=3, cell=60, captions=captions, font=font))
    drawn = np.argwhere(sheet[62:102].min(axis=2) < 255)
    assert len(drawn) and drawn[:, 1].min() >= 64 and drawn[:, 1].max() <= 64 + 60 + 1


def test_a_font_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(
        ValueError, match=r"font\.ttf: not a font that can be read .*; give a \.ttf, \.otf or \.ttc file"
    ):
        contact_sheet(
            [np.zeros((4, 4, 3), np.uint8)], columns=1, cell=4, captions=["a"], font=str(tmp_path / "font.ttf")
        )
