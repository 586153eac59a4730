"""torchvision's AlexNet in `.pth` and `.safetensors`, each direction against torch."""

import functools
import json
from collections import OrderedDict

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from alexnet_jax.models.weights import read_weights
from alexnet_jax.models.weights.safetensors import save_safetensors
from tests.models import networks

torch = pytest.importorskip("torch", reason="torch is not installed")
OWT = {"variant": "owt", "num_classes": networks.CLASSES, "width": networks.NARROW}
TORCHVISION_MEAN, TORCHVISION_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torch_alexnet():
    """Return torchvision's `AlexNet`, narrowed, with random weights."""
    nn = torch.nn
    c1, c2, c3, c4, c5 = (round(c * networks.NARROW) for c in (64, 192, 384, 256, 256))
    units = round(4096 * networks.NARROW)

    def conv(*sizes):
        return nn.Conv2d(*sizes), nn.ReLU()

    # fmt: off
    features = nn.Sequential(
        *conv(3, c1, 11, 4, 2), nn.MaxPool2d(3, 2), *conv(c1, c2, 5, 1, 2),
        nn.MaxPool2d(3, 2), *conv(c2, c3, 3, 1, 1), *conv(c3, c4, 3, 1, 1),
        *conv(c4, c5, 3, 1, 1), nn.MaxPool2d(3, 2),
    )
    classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(c5 * 36, units), nn.ReLU(),
        nn.Dropout(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, networks.CLASSES),
    )
    # fmt: on
    parts = OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier)
    net = nn.Sequential(parts).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel()
            parameter.normal_(0, 0.1 if parameter.ndim == 1 else 1.6 / fan_in**0.5)
    return net


def torch_logits(net, mean, std):
    """Return the logits as a function of raw images, through `Normalize(mean, std)`."""

    def run(batch):
        normalised = ((batch / 255 - mean) / std).astype(np.float32)
        return net(torch.from_numpy(networks.channels_first(normalised))).detach().numpy()

    return run


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory):
    """Return (net, .pth, .safetensors) with the same tensors."""
    place = tmp_path_factory.mktemp("torch")
    net = torch_alexnet()
    torch.save(net.state_dict(), place / "net.pth")
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    save_file(arrays, place / "net.safetensors")
    return net, place / "net.pth", place / "net.safetensors"


@pytest.mark.parametrize("kind", ["random", "real"])
def test_pth_logits_equal_torch(kind, torch_files):
    net, path, tensors = torch_files
    weights = read_weights(path)
    assert weights.settings == OWT
    networks.assert_same_weights(read_weights(tensors, variant="owt"), weights)
    np.testing.assert_allclose(weights.mean, [123.675, 116.28, 103.53], rtol=1e-6)
    assert (weights.image_size, weights.crop_size) == (256, 224)
    batch = networks.raw_images(kind, 224)
    ours = networks.jitted_features(weights)(batch - weights.mean)["logits"]
    networks.assert_same_logits(torch_logits(net, TORCHVISION_MEAN, TORCHVISION_STD), batch, ours)


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("", "", "module._orig_mod."),
        ("", "", "backbone.net."),
        ("", "", "classifier."),  # self.classifier = alexnet()
        # pytorch/examples wraps only these
        ("state_dict", "features.", "features.module."),
        ("a_key_of_any_name", "", ""),
    ],
)
def test_tensors_are_found_under_prefixes_and_keys(torch_files, tmp_path, key, before, after):
    net, path, _ = torch_files
    wanted = read_weights(path)
    state = {
        after + name.removeprefix(before) if name.startswith(before) else name: value
        for name, value in net.state_dict().items()
    }
    state["n_averaged"] = torch.tensor(7)  # a counter, as of averaged or batch norm
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).state_dict()
    checkpoint = {"epoch": 3, key: state, "optimizer": optimizer} if key else state
    torch.save(checkpoint, tmp_path / "x.pth.tar")
    arrays = {name: value.numpy() for name, value in state.items()}
    save_file(arrays, tmp_path / "x.safetensors")
    for name in ("x.pth.tar", "x.safetensors"):
        networks.assert_same_weights(read_weights(tmp_path / name), wanted)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_export_runs_in_torch_and_reads_back(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    weights = networks.random_weights(image_size=256, class_names=tuple("abcdefghijkl"), **OWT)
    save_safetensors(path, weights, names="torchvision")
    net, state = torch_alexnet(), load_file(path)
    net.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    mean, std = (json.loads(metadata[f"normalize_{n}"]) for n in ("mean", "std"))
    np.testing.assert_allclose(mean, networks.MEAN / 255, rtol=1e-6)
    assert tuple(std) == TORCHVISION_STD
    batch = networks.raw_images(kind, 224)
    ours = networks.jitted_features(weights)(batch - networks.MEAN)["logits"]
    networks.assert_same_logits(torch_logits(net, mean, std), batch, ours)
    # With the mean, the sizes and the names that torchvision has no place for.
    found = read_weights(path)
    assert found.settings == OWT and found.class_names == weights.class_names
    np.testing.assert_allclose(found.mean, networks.MEAN, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found.variables, weights.variables)


def test_wrong_state_dicts_are_refused(torch_files, tmp_path):
    net, whole, _ = torch_files
    path, state = tmp_path / "x.pth", net.state_dict()
    path.write_bytes(whole.read_bytes()[:-1000])
    networks.refused(path, "is no .pth that can be read")
    networks.refused(whole, "holds weights of variant owt; got variant='paper'", variant="paper")
    some = {name: value for name, value in state.items() if "6.weight" not in name}
    bias = torch.full((4,), float("nan"))
    two = "holds both 'state_dict.features.0.weight' and 'model.features.0.weight'"
    for content, words in (
        (some, "missing features.6.weight, classifier.6.weight."),
        (state | {"features.0.bias": bias}, "infinite or NaN features.0.bias."),
        ({"state_dict": state, "model": state}, two),
        ({"fc.weight": bias, "epoch": 3}, "holds no state_dict of torchvision's AlexNet"),
    ):
        torch.save(content, path)
        networks.refused(path, words)
