"""A line again, once `toy_line` and `toy_slow` are there."""

from genpipe.artifacts import Role
from toys.toy_line import HEADLINES, VERSION, Config, Objective, check_inputs, data, example_batch, export, objective

MAKES = "toy_end"


def roles(cfg: Config) -> dict[str, Role]:
    return {name: Role(name) for name in ("toy_data", "toy_line", "toy_slow")}


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
