"""Real images, if there are any.

ALEXNET_TEST_DATA names a folder with `imagenet_sample/ILSVRC2012_img_{train,val}.tar`
(laid out as ImageNet's own) and `cifar10_images.tar` (class folders); without it these
tests are skipped.
"""

import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax import prepare
from alexnet_jax.data import open_source, statistics
from alexnet_jax.data.augment import IMAGENET_MEAN_255, IMAGENET_PCA_STD_255
from tests.data.images import fetched


@pytest.fixture(scope="module")
def data_dir():
    name = os.environ.get("ALEXNET_TEST_DATA")
    if not name:
        pytest.skip("ALEXNET_TEST_DATA names no folder of real images")
    return Path(name)


@pytest.mark.slow
def test_imagenet_archives_prepare_with_the_official_labels(data_dir, tmp_path):
    source = data_dir / "imagenet_sample"
    if not (source / "ILSVRC2012_img_val.tar").exists():
        pytest.skip(f"there are no archives in {source}")
    arguments = ["imagenet", f"--source={source}", f"--data_dir={tmp_path}"]
    assert prepare.main([*arguments]) == 0
    images, labels = {}, {}
    for split, count in (("train", 1000), ("validation", 300)):
        small = open_source("imagenet2012_256", split, data_dir=str(tmp_path), image_size=32)
        assert small.num_examples == count
        everything = np.arange(count)
        images[split] = fetched(small, *everything).reshape(count, -1).astype("f4")
        labels[split] = small.labels_of(everything)
    # The sample's validation images are its training images, made smaller.
    products = images["validation"] @ images["train"].T
    nearest = ((images["train"] ** 2).sum(1) - 2 * products).argmin(1)
    assert np.mean(labels["train"][nearest] == labels["validation"]) > 0.98
    train = open_source("imagenet2012_256", "train", data_dir=str(tmp_path))
    found = statistics.load(train.statistics_path)
    means = found.mean_image.mean((0, 1))
    np.testing.assert_allclose(means, IMAGENET_MEAN_255, atol=5)
    np.testing.assert_allclose(found.pca_std_255, IMAGENET_PCA_STD_255, rtol=0.2)


@pytest.mark.slow
def test_thirty_steps_on_cifar10_beat_chance(data_dir, tmp_path):
    from alexnet_jax.training.loop import train_and_evaluate
    from alexnet_jax.training.writers import read_metrics
    from configs import cifar10
    from tests.training.small import fast_loops

    archive = data_dir / "cifar10_images.tar"
    if not archive.exists():
        pytest.skip(f"there is no {archive}")
    with tarfile.open(archive) as tar:
        names = [m for m in tar if m.isfile() and int(Path(m.name).stem) < 200]
        tar.extractall(tmp_path, members=names, filter="data")
    config = cifar10.get_config("10")
    config.data.source = f"folder:{tmp_path}"
    config.model.init = "he"
    config.max_steps = 30
    config.eval_every_epochs = 0.0
    with fast_loops():
        train_and_evaluate(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval/count"] == 2000
    assert last["eval/loss"] < 0.9 * math.log(10)
    assert last["eval/top1_error"] < 0.75
