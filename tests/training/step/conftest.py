"""Warnings that are given once are given anew in each test of captured steps."""

import pytest

from fastgan.backend import warn_anew


@pytest.fixture(autouse=True)
def fresh_warnings():
    warn_anew.cache_clear()
    yield
    warn_anew.cache_clear()
