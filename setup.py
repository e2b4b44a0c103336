"""Everything but the compiled part is declared in pyproject.toml."""

from setuptools import setup

setup()
