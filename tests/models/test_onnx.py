"""Networks as ONNX: onnxruntime gives our logits."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from alexnet_jax.models.weights import read_weights
from alexnet_jax.models.weights.safetensors import save_safetensors
from tests.models import networks
from tests.models.test_variants import COUNTS, TWO_SIXES

onnx = pytest.importorskip("onnx")
from alexnet_jax.models.weights.onnx import export_onnx

# Squares of values below 1 would be nothing beside LRN's constant.
SIGMOID = {"activation": "sigmoid", "lrn": False}
ABLATIONS = {
    "batch_norm": {"variant": "paper", "normalization": "batch"},
    "norm_first": {"variant": "caffe", "norm_place": "before", "activation": "tanh"},
    "averages": {"variant": "zfnet", "pool_kind": "avg", **SIGMOID},
    "one_column": {"variant": "paper", "columns": 1, "pool_window": 2, "dropout": 0.3},
    "four_columns": {"variant": "no_communication", "columns": 4, "skip": ["conv4"]},
    "two_sixes": {"variant": TWO_SIXES, "width": 1.0},
}
NETWORKS = {name: {"variant": name} for name in COUNTS} | ABLATIONS
# The other networks have the same layers and stages in other numbers.
QUICK = {"original", "caffenet", "cifar_11", "batch_norm", "averages", "four_columns", "two_sixes"}


@functools.cache
def network(name: str):
    """Return (weights, features) of one of NETWORKS, narrowed."""
    narrow = 0.25 if name.startswith("cifar") else networks.NARROW
    weights = networks.random_weights(
        **{"num_classes": networks.CLASSES, "width": narrow, **NETWORKS[name]}
    )
    return weights, networks.jitted_features(weights)


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
def test_onnx_gives_our_logits(name, kind, tmp_path):
    weights, features = network(name)
    export_onnx(tmp_path / "x.onnx", weights)
    batch = networks.raw_images(kind, weights.crop_size)
    wanted = features(batch - networks.MEAN)
    networks.assert_same_logits(
        lambda b: networks.run_onnx(tmp_path / "x.onnx", b)[0], batch, wanted["logits"]
    )
    for row in weights.make_model().network.layers:
        if any(isinstance(stage, networks.LRNS) for stage in row.then):
            networks.assert_lrn_matters(wanted, row)


def test_onnx_file_is_well_formed_and_names_our_features(tmp_path):
    weights, features = network("original")
    path, names = tmp_path / "x.onnx", [f"class {k}" for k in range(networks.CLASSES)]
    export_onnx(path, dataclasses.replace(weights, class_names=tuple(names)))
    found = onnx.load(path)
    onnx.checker.check_model(found, full_check=True)
    (source,), (target,) = found.graph.input, found.graph.output
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (source, target)
    ]
    assert source.name == "images" and shapes[0] == ["batch", 3, 224, 224]
    assert target.name == "logits" and shapes[1] == ["batch", networks.CLASSES]
    properties = {item.key: item.value for item in found.metadata_props}
    assert json.loads(properties["class_names"]) == names
    # Any feature can be made an output; maps have their channels first.
    batch = networks.raw_images("random", 224)[:1]
    wanted = features(batch - networks.MEAN)
    del found.graph.output[:]
    found.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    onnx.save(found, path)
    results = networks.run_onnx(path, batch)
    for (name, feature), result in zip(wanted.items(), results, strict=True):
        ours = np.moveaxis(feature, -1, 1)
        np.testing.assert_allclose(result, ours, rtol=1e-4, atol=1e-3, err_msg=name)


def test_onnx_subtracts_the_centre_of_a_mean_image(tmp_path):
    weights, features = network("cifar_13")
    mean = networks.raw_images("random", 40)[1].astype(np.float32)
    export_onnx(tmp_path / "x.onnx", dataclasses.replace(weights, mean=mean, image_size=40))
    batch = networks.raw_images("random", 24)
    wanted = features(batch - mean[8:-8, 8:-8])["logits"]
    networks.assert_same_logits(
        lambda b: networks.run_onnx(tmp_path / "x.onnx", b)[0], batch, wanted
    )


@pytest.mark.nightly
def test_paper_exports_at_full_size(tmp_path):
    weights = networks.random_weights(variant="paper", image_size=256)
    tensors, graph = tmp_path / "paper.safetensors", tmp_path / "paper.onnx"
    save_safetensors(tensors, weights)
    found = read_weights(tensors)
    networks.assert_same_weights(found, weights)
    assert found.variables["params"]["fc6"]["kernel"].shape == (9216, 4096)
    export_onnx(graph, found)
    for path in (tensors, graph):
        assert path.stat().st_size == pytest.approx(4 * 60_965_224, rel=0.001)
    batch = networks.raw_images("random", 224)
    wanted = networks.jitted_features(weights)(batch - networks.MEAN)["logits"]
    networks.assert_same_logits(lambda b: networks.run_onnx(graph, b)[0], batch, wanted)
