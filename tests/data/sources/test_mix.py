from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from source_files import described, png, put, tar_of

from genpipe import config
from genpipe.data.samples import Reject, Sample
from genpipe.data.sources import Source, open_source
from genpipe.stages import shard


def mix(sources: dict[str, Any], tmp_path: Path) -> shard.Config:
    """A shard stage's settings, read from a file as a pipeline's are."""
    path = tmp_path / "shard.yaml"
    path.write_text(yaml.safe_dump({"source": {"kind": "mix", "sources": sources}}))
    return config.parse(shard.Config, config.load(path))


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    for name in ("b", "a", "bad"):
        put(tmp_path / "photos", {f"{name}.png": png(name == "a"), f"{name}.txt": f"photo {name}"})
    (tmp_path / "photos/bad.txt").write_bytes(b"caf\xe9")
    put(tmp_path / "web", {"0.tar": tar_of(*described("1"), *described("2")), "1.tar": tar_of(*described("1"))})
    return {
        "web": {"kind": "webdataset", "path": str(tmp_path / "web")},
        "photos": {"kind": "folder", "path": str(tmp_path / "photos")},
    }


def opened(sources: dict[str, Any], tmp_path: Path) -> Source:
    return open_source(mix(sources, tmp_path).source, part_size=2)


def test_sources_stand_one_after_another_and_mark_what_is_theirs(sources: dict[str, Any], tmp_path: Path) -> None:
    one = opened(sources, tmp_path)
    assert one.parts() == ["photos/00000", "photos/00001", "web/00000", "web/00001"]
    items = [item for part in one.parts() for item in one.read(part)]
    assert [(item.key, item.group, item.source) for item in items if isinstance(item, Sample)] == [
        ("photos-a", "photos/a", "photos"),
        ("photos-b", "photos/b", "photos"),
        ("web-0-1", "web/0-1", "web"),
        ("web-0-2", "web/0-2", "web"),
        ("web-1-1", "web/1-1", "web"),
    ]
    assert [(item.key, item.source, item.reason) for item in items if isinstance(item, Reject)] == [
        ("photos-bad", "photos/bad.png", "bad_caption")
    ]


def test_nothing_depends_on_the_order_of_the_settings(sources: dict[str, Any], tmp_path: Path) -> None:
    """A worker gets its settings as JSON with sorted keys."""
    turned = dict(reversed(sources.items()))
    assert opened(turned, tmp_path).parts() == opened(sources, tmp_path).parts()
    assert opened(turned, tmp_path).digest() == opened(sources, tmp_path).digest()
    cfg = mix(sources, tmp_path)
    again = shard.Config.model_validate(json.loads(config.canonical_json(cfg.model_dump(mode="json"))))
    assert open_source(again.source, part_size=2).parts() == opened(sources, tmp_path).parts()


def test_digest_follows_each_source_and_the_names(sources: dict[str, Any], tmp_path: Path) -> None:
    before = opened(sources, tmp_path).digest()
    renamed = {"pictures": sources["photos"], "web": sources["web"]}
    put(tmp_path / "photos", {"a.txt": "another caption"})
    after = opened(sources, tmp_path).digest()
    assert len({before, after, opened(renamed, tmp_path).digest()}) == 3


def test_an_inner_source_that_is_missing_is_named_with_its_setting(sources: dict[str, Any], tmp_path: Path) -> None:
    sources["photos"]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^source\.sources\.photos\.path: the folder .*/nowhere does not exist"):
        opened(sources, tmp_path)
    sources["photos"]["path"] = str(tmp_path / "photos")
    sources["web"]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^source\.sources\.web\.path: .*/nowhere does not exist"):
        opened(sources, tmp_path)


def test_faults_of_the_settings_are_explained(sources: dict[str, Any], tmp_path: Path) -> None:
    where = f"{tmp_path}/shard.yaml: source.sources"
    for change, message in (
        (
            {"inner": {"kind": "mix", "sources": sources}},
            f"{where}: inner is itself a mix; list its sources here, beside",
        ),
        (
            {"photos": {"kind": "foldr", "path": "x"}},
            f"{where}.photos.kind: unknown kind 'foldr'; did you mean 'folder'?",
        ),
        (
            {"photos": {"kind": "folder", "pth": "x", "path": "y"}},
            f"{where}.photos.pth: unknown key; did you mean 'path'?",
        ),
        ({"photos": {"path": "x"}}, f"{where}.photos: has no `kind`, which says what its settings mean; add one"),
    ):
        with pytest.raises(config.ConfigError) as error:
            mix({**sources, **change}, tmp_path)
        assert str(error.value).startswith(message)
    with pytest.raises(config.ConfigError, match=r"source\.sources"):
        mix({}, tmp_path)
    with pytest.raises(config.ConfigError, match=r"source\.sources.*my photos"):
        mix({"my photos": sources["photos"]}, tmp_path)
