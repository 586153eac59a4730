"""A finished run that the tests of several commands read."""

# ruff: noqa: F401, F811  (a fixture of another file)

import pytest

from alexnet_jax.training import loop
from tests.training.test_loop import folder, small_config


@pytest.fixture(scope="session")
def workdir(folder, tmp_path_factory):
    """A run of four epochs on `folder`; tests that change it take a copy."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train_and_evaluate(small_config(folder, num_epochs=4.0), workdir)
    return workdir
