"""Another line through the points of `toy_data`, beside `toy_line`."""

from genpipe.stages.toy_line import CONSUMES, VERSION, Config, Objective, agree, data, export, objective

__all__ = ["CONSUMES", "VERSION", "Config", "Objective", "agree", "data", "export", "objective"]
