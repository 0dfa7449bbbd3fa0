"""Data sets and networks of the papers, each with its likelihood."""

from fisherlab.problems.data import curve_images as curve_images
from fisherlab.problems.descriptions import Description as Description
from fisherlab.problems.descriptions import describe as describe
from fisherlab.problems.descriptions import download as download
from fisherlab.problems.descriptions import load as load
from fisherlab.problems.descriptions import names as names
from fisherlab.problems.problem import Problem as Problem
