"""Data sets and networks of the papers, each with its likelihood."""

from fisherlab.problems.autoencoder_data import curve_images as curve_images
from fisherlab.problems.descriptions import Description as Description
from fisherlab.problems.problem import Problem as Problem
from fisherlab.problems.registry import describe as describe
from fisherlab.problems.registry import download as download
from fisherlab.problems.registry import load as load
from fisherlab.problems.registry import names as names
