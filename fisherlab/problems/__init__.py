"""Data sets and networks of the papers, each with its likelihood."""

from fisherlab.problems.problem import Problem
from fisherlab.problems.registry import Description, describe, load, names

__all__ = ["Description", "Problem", "describe", "load", "names"]
