"""The small ImageNet and the small textures, prepared once."""

from pathlib import Path

import pytest

from alexnet_jax.data import textures
from tests.data.imagenet_files import imagenet, write_archives


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="session")
def data_dir(archives, tmp_path_factory) -> Path:
    """Prepare the data set from the archives with two processes."""
    target = tmp_path_factory.mktemp("tfds")
    assert imagenet(archives, target, "--workers=2") == 0
    return target


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Build `textures/tiny` in a new directory of tfds data sets."""
    data_dir = tmp_path_factory.mktemp("textures")
    textures.build(data_dir, tiny=True)
    return data_dir
