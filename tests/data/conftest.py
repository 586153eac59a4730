"""The small ImageNet, prepared once."""

from pathlib import Path

import pytest

from tests.data.imagenet_files import imagenet, write_archives


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="session")
def data_dir(archives, tmp_path_factory) -> Path:
    """The data set, prepared from the archives by two processes."""
    target = tmp_path_factory.mktemp("tfds")
    assert imagenet(archives, target, "--workers=2") == 0
    return target
