"""Which fields of a record are captions or labels, and how likely each caption is to be chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from genpipe.data.samples import clean_captions, weigh_captions
from genpipe.data.text import clean_text

CAPTION_FIELDS = ("text", "caption", "captions")
OTHER_CAPTION_FIELDS = ("prompt", "prompts", "description")
"""Taken, the first that there is, where a record has none of CAPTION_FIELDS."""

WEIGHTS_FIELD = "caption_weights"
LABEL = "{label}"
"""What stands for the class in a caption template."""


def _name_weights(value: Any) -> Any:
    if isinstance(value, str):
        return {value: 1.0}
    return dict.fromkeys(value, 1.0) if isinstance(value, list | tuple) else value


def _likeliest_first(weights: dict[str, float]) -> dict[str, float]:
    # A resolved configuration is stored with sorted keys: what is read from it must not depend on their order.
    return dict(sorted(weights.items(), key=lambda item: (-item[1], item[0])))


# Shards keep weights in single precision, in which none may become 0 or infinite, nor their sum.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
Weight = Annotated[float, Field(ge=LEAST_WEIGHT, le=LARGEST_WEIGHT)]
# The names of caption fields, or templates such as "a photo of a {label}", with the weight of each: a name, a list of
# names, or a mapping.
CaptionFields = Annotated[dict[str, Weight], BeforeValidator(_name_weights), AfterValidator(_likeliest_first)]


def check_templates(captions: Mapping[str, float], *, label: str) -> None:
    """Raise ValueError if a caption template has no label to be filled with."""
    for template in (name for name in captions if LABEL in name and not label):
        raise ValueError(f"captions: the template {template!r} needs a label; say with `label` what the class is")


def caption_columns(wanted: Mapping[str, float]) -> tuple[str, ...]:
    """The fields that may hold captions: those that are wanted, templates left out, or the usual ones."""
    if wanted:
        return tuple(name for name in wanted if LABEL not in name)
    return (*CAPTION_FIELDS, *OTHER_CAPTION_FIELDS)


def captions_of(
    record: Mapping[str, Any], *, wanted: Mapping[str, float], label: str | None = None
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The captions of a record and their weights (none: uniform), the likeliest field's first.

    `wanted`: caption fields to weights; a field that holds a list shares its weight among its captions. One with
    `{label}` is a template, filled with `label` (underscores as spaces). Empty: all of `text`, `caption` and
    `captions`, weighted by `caption_weights` if the record has it; without them `prompt`, `prompts` or
    `description`. Raises ValueError for what is neither a string nor a list of strings, and for weights that do not
    fit.
    """
    if wanted:
        found = {name: _filled(name, label) if LABEL in name else _strings(record, name) for name in wanted}
        shares = [(text, wanted[name] / len(texts)) for name, texts in found.items() for text in texts]
        return weigh_captions(shares)
    captions = [text for name in CAPTION_FIELDS for text in _strings(record, name)]
    if not captions:
        captions = next((texts for name in OTHER_CAPTION_FIELDS if (texts := _strings(record, name))), [])
    weights = record.get(WEIGHTS_FIELD)
    if weights is None:
        return clean_captions(captions), ()
    if not isinstance(weights, list) or len(weights) != len(captions) or not all(map(_is_weight, weights)):
        raise ValueError(
            f"{WEIGHTS_FIELD} must be a list with a number from {LEAST_WEIGHT} to {LARGEST_WEIGHT} for each of the "
            f"{len(captions)} captions"
        )
    return weigh_captions(zip(captions, weights, strict=True))


def label_of(value: Any) -> str | None:
    """The name of a class as a field has it, a string or an integer; None for an empty one. ValueError for others.

    A whole float is an integer, and NaN empty: what pandas makes of integers where some are missing.
    """
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"a label must be a string or an integer, not {value!r}")
    return clean_text(str(value)) or None


def labels_of(values: Iterable[Any]) -> set[str]:
    """The names of the classes among values; what cannot be one is skipped."""
    found = set()
    for value in values:
        with suppress(ValueError):
            found.add(label_of(value))
    return {name for name in found if name is not None}


def _filled(template: str, label: str | None) -> list[str]:
    return [] if label is None else [template.replace(LABEL, label.replace("_", " "))]


def _strings(record: Mapping[str, Any], name: str) -> list[str]:
    value = record.get(name)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a string or a list of strings")
    return texts


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_WEIGHT <= value <= LARGEST_WEIGHT
