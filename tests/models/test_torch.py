"""The networks at full width against torch.nn modules that are built from their tables."""

import jax
import numpy as np
import pytest

from alexnet_jax.models import layers
from alexnet_jax.models.alexnet import create_model
from tests.models.networks import random_variables

CLASSES = 20


def torch_network(torch, table, params):
    """Return the rows of a table as torch.nn modules with `params`."""
    nn = torch.nn
    modules, channels, grid = [], 3, 6
    for row in table.layers:
        weights = {k: torch.tensor(np.asarray(v)) for k, v in params[row.name].items()}
        if isinstance(row, layers.Conv):
            groups = table.columns if row.sees == "own" else 1
            layer = nn.Conv2d(
                channels, row.features, row.kernel, row.stride, int(row.padding), groups=groups
            )
            weight = weights["kernel"].permute(3, 2, 0, 1)
            channels = row.features
        else:
            weight = weights["kernel"].T
            if channels:  # torch flattens channels first
                modules.append(nn.Flatten())
                weight = weight.reshape(-1, grid, grid, channels)
                weight = weight.permute(0, 3, 1, 2).reshape(weight.shape[0], -1)
                channels = 0
            layer = nn.Linear(weight.shape[1], row.features)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(weights["bias"])
        modules.append(layer)
        for stage in row.then:
            match stage:
                case layers.Activation():
                    modules.append(nn.ReLU())
                case layers.Pool():
                    modules.append(nn.MaxPool2d(stage.window, stage.stride))
                case layers.Lrn():
                    modules.append(
                        nn.LocalResponseNorm(stage.size, stage.alpha, stage.beta, stage.k)
                    )
                case layers.Dropout():
                    modules.append(nn.Dropout(stage.rate))
    return nn.Sequential(*modules).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["owt", "one_tower", "caffe"])
def test_logits_equal_torch(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = create_model(name, num_classes=CLASSES)
    size = model.network.crop_size
    variables = random_variables(model)
    images = np.random.default_rng(1).normal(0, 60, (2, size, size, 3))
    images = images.astype(np.float32)
    ours = jax.jit(model.apply)(variables, images)
    network = torch_network(torch, model.network, variables["params"])
    with torch.no_grad():
        theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    scale = np.abs(theirs).max()
    assert scale > 1  # the logits say something
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4)
