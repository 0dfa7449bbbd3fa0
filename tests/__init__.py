"""Tests; the run-time type checker is named in pyproject.toml as tests.typechecker."""

from tests import typechecker as typechecker
