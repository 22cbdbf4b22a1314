"""A line again, once `toy_line` and `toy_slow` are there."""

from genpipe.stages.toy_line import VERSION, Config, Objective, agree, data, export, objective

CONSUMES = ("toy_data", "toy_line", "toy_slow")

__all__ = ["CONSUMES", "VERSION", "Config", "Objective", "agree", "data", "export", "objective"]
