"""Which fields of a record are captions, and how likely each caption is to be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from genpipe.data.samples import clean_captions, weigh_captions

CAPTION_FIELDS = ("text", "caption", "captions")
WEIGHTS_FIELD = "caption_weights"


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
# The names of caption fields with the weight of each: a name, a list of names, or a mapping.
CaptionFields = Annotated[dict[str, Weight], BeforeValidator(_name_weights), AfterValidator(_likeliest_first)]


def captions_of(record: Mapping[str, Any], *, wanted: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The captions of a record and their weights (none: uniform), the likeliest field's first.

    `wanted`: caption fields to weights; a field that holds a list shares its weight among its captions. Empty:
    all of `text`, `caption` and `captions`, weighted by `caption_weights` if the record has it. Raises
    ValueError for what is neither a string nor a list of strings, and for weights that do not fit.
    """
    if wanted:
        found = {name: _strings(record, name) for name in wanted}
        shares = [(text, wanted[name] / len(texts)) for name, texts in found.items() for text in texts]
        return weigh_captions(shares)
    captions = [text for name in CAPTION_FIELDS for text in _strings(record, name)]
    weights = record.get(WEIGHTS_FIELD)
    if weights is None:
        return clean_captions(captions), ()
    if not isinstance(weights, list) or len(weights) != len(captions) or not all(map(_is_weight, weights)):
        raise ValueError(
            f"{WEIGHTS_FIELD} must be a list with a number from {LEAST_WEIGHT} to {LARGEST_WEIGHT} for each of the "
            f"{len(captions)} captions"
        )
    return weigh_captions(zip(captions, weights, strict=True))


def _strings(record: Mapping[str, Any], name: str) -> list[str]:
    value = record.get(name)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a string or a list of strings")
    return texts


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_WEIGHT <= value <= LARGEST_WEIGHT
