"""Train the second upsampler of a cascade, from the first one's size to a larger (unCLIP's 256 to 1,024)."""

from genpipe.stages.upsampler import (
    CONSUMES,
    VERSION,
    Config,
    Objective,
    agree,
    consumes,
    data,
    example,
    export,
    objective,
)

__all__ = [
    "CONSUMES",
    "VERSION",
    "Config",
    "Objective",
    "agree",
    "consumes",
    "data",
    "example",
    "export",
    "objective",
]
