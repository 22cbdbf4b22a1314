"""Another line through the points of `toy_data`, beside `toy_line`."""

from toys.toy_line import (
    HEADLINES,
    VERSION,
    Config,
    Objective,
    check_inputs,
    data,
    example_batch,
    export,
    objective,
    roles,
)

MAKES = "toy_slow"

__all__ = [
    "HEADLINES",
    "MAKES",
    "VERSION",
    "Config",
    "Objective",
    "check_inputs",
    "data",
    "example_batch",
    "export",
    "objective",
    "roles",
]
