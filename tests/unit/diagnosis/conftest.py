"""A batch to diagnose, of a tiny policy and an engine in this process."""

import functools

import pytest
from support.diagnosed import batch_of, tiny_models


@pytest.fixture(scope="module")
def models():
    return tiny_models()


@pytest.fixture
def make_batch(models):
    return functools.partial(batch_of, models)
