"""What metrics of two sets of pictures are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gallery import SIDE, Gallery, pictures
from scripted import PLAIN, Projection, network_file

from genpipe.artifacts import Artifact

DIMS = 7


@pytest.fixture(scope="session")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Real pictures 0 to 23 and, held out, 24 to 35; the pictures 100 to 119 have the captions of the first 20."""
    gallery = Gallery(tmp_path_factory.mktemp("store"))
    named = {"train": pictures(range(24), [f"picture {i}" for i in range(24)])}
    named["heldout"] = pictures(range(24, 36), [f"picture {i}" for i in range(24, 36)])
    drawn = {"train": pictures(range(100, 120), [f"picture {i}" for i in range(20)])}
    return {
        "shard": gallery.shards(named),  # type: ignore[arg-type]
        "sample": gallery.shards(drawn, kind="samples", each=6),  # type: ignore[arg-type]
    }


@pytest.fixture
def projection(tmp_path: Path) -> dict[str, Any]:
    """The settings of a network, `scripted.Projection` to seven features."""
    return network_file(tmp_path, Projection(SIDE, DIMS), size=SIDE, **PLAIN)
