"""Weights from and for other programs, each direction against that program's engine.

torch runs torchvision's network, OpenCV Caffe's, onnxruntime ours. The weights are
random, and such that a mistake shows: LRN changes what it normalises, biases are not
zero, and logits differ from class to class and from picture to picture.
"""

import dataclasses
import functools
import json
import os
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_train import folder, small_config  # noqa: F401
from test_variants import TWO_SIXES

from alexnet_jax import ablations, export, load, pretrained, train, variants
from alexnet_jax.data import imagenet, images
from alexnet_jax.layers import (
    Activation,
    Dense,
    Lrn,
    WithinMapLrn,
    feature_names,
    stage_name,
)
from alexnet_jax.pretrained import Weights, WeightsError, caffe, read_weights
from alexnet_jax.pretrained.files import flat, make_model, nested, shapes_of

TOLERANCE = 1e-4
NORMS = (Lrn, WithinMapLrn)
NARROW = 1 / 16
CLASSES = 12
MEAN = np.array([120.0, 115.0, 105.0], np.float32)
# How large activations are made, so that LRN's sums count beside its constant.
SCALE = 40.0
# unit -> factors on the kernels of the first layer, the last, the others, and biases.
GAINS = {
    "relu": (0.7, 3 / SCALE, 1.6, SCALE / 10),
    "tanh": (0.03, 3.0, 2.0, 0.3),
    "sigmoid": (0.03, 8.0, 8.0, 0.3),
}


@functools.cache
def pictures(kind: str, size: int) -> np.ndarray:
    """Three pictures, uint8 [3, size, size, 3]: blotches, or validation pictures."""
    if kind == "random":
        rng = np.random.default_rng(0)
        blotches = rng.integers(0, 256, (3, 5, 5, 3)).astype(np.uint8)
        enlarge = functools.partial(images.resize_to_square, size=size)
        smooth = np.stack([enlarge(blotch) for blotch in blotches]).astype(int)
        noise = rng.integers(-30, 31, smooth.shape)
        return np.clip(smooth + noise, 0, 255).astype(np.uint8)
    name = os.environ.get("ALEXNET_TEST_DATA")
    archive = Path(name or "") / "imagenet_sample" / "ILSVRC2012_img_val.tar"
    if not name or not archive.exists():
        pytest.skip("ALEXNET_TEST_DATA names no folder of real pictures")
    with tarfile.open(archive) as tar:
        files = [member for member in tar if member.isfile()][:3]
        return np.stack(
            [images.decode(tar.extractfile(f).read(), size, f.name) for f in files]
        )


def normals(rng, shape, std):
    return (std * rng.standard_normal(shape)).astype(np.float32)


def random_variables(model, size: int, seed: int = 0):
    """Weights with which every layer is at work, and logits differ by about 1."""
    rng = np.random.default_rng(seed)
    layers = model.network.layers
    units = [s.kind for s in model.network.stages if isinstance(s, Activation)]
    first, last, others, biases = GAINS[units[0]]
    gains = {layers[0].name: first, layers[-1].name: last}
    leaves = {}
    for name, shape in shapes_of(model, size).items():
        _, layer, leaf = name.split("/")
        if leaf == "kernel":
            fan_in = np.prod(shape[-4:-1]) if len(shape) > 2 else shape[0]
            std = gains.get(layer, others) / np.sqrt(fan_in)
            leaves[name] = normals(rng, shape, std)
        elif leaf in ("scale", "var"):
            leaves[name] = rng.uniform(0.5, 2, shape).astype(np.float32)
        else:
            std = 0.3 if layer == layers[-1].name else biases
            leaves[name] = normals(rng, shape, std)
    return jax.tree.map(jnp.asarray, nested(leaves))


def assert_same_logits(found, wanted):
    """Equal, and such that it means something."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    if len(wanted) > 1:
        assert wanted.std(axis=1).min() > 0.3, "the classes are all alike"
        assert wanted.std(axis=0).max() > 0.1, "the pictures are all alike"


def features_of(model, variables, batch):
    apply = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    return jax.tree.map(np.asarray, apply(variables, batch))


# --- ONNX ---------------------------------------------------------------------------

ABLATIONS = {
    "batch_norm": {"variant": "paper", "normalization": "batch"},
    "norm_first": {"variant": "caffe", "norm_place": "before", "activation": "tanh"},
    # Of values below 1 LRN's sums would be nothing beside its constant.
    "averages": {
        "variant": "zfnet",
        "pool_kind": "avg",
        "activation": "sigmoid",
        "lrn": False,
    },
    "one_column": {"variant": "paper", "columns": 1, "pool_window": 2, "dropout": 0.3},
    "four_columns": {"variant": "no_communication", "columns": 4, "skip": ["conv4"]},
}
NETWORKS = {name: {"variant": name} for name in variants.VARIANTS} | ABLATIONS


@functools.cache
def onnx_session(path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )


@functools.cache
def network(name: str):
    """(model, variables, jitted features) of one of NETWORKS, narrowed."""
    narrow = 0.25 if name.startswith("cifar") else NARROW
    settings = {"num_classes": CLASSES, "width": narrow, **NETWORKS[name]}
    model = make_model(settings)
    variables = random_variables(model, model.network.crop_size)
    return (
        model,
        variables,
        jax.jit(lambda batch: model.apply(variables, batch, method="features")),
    )


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    pytest.importorskip("onnx")
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_our_logits(name, kind, onnx_folder):
    model, variables, features = network(name)
    path = onnx_folder / f"{name}.onnx"
    if not path.exists():
        pretrained.export_onnx(path, model, variables)
    batch = pictures(kind, model.network.crop_size) - MEAN
    wanted = jax.tree.map(np.asarray, features(batch))
    session = onnx_session(path)
    for count in (3, 1):
        part = np.ascontiguousarray(batch[:count].transpose(0, 3, 1, 2))
        (found,) = session.run(None, {"images": part})
        assert_same_logits(found, wanted["logits"][:count])
    for row in model.network.layers:
        if any(isinstance(stage, NORMS) for stage in row.then):
            assert_lrn_matters(wanted, row)


def test_onnx_keeps_batch_norms_of_one_number_apart(onnx_folder, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, TWO_SIXES.name, TWO_SIXES)
    model = make_model({"variant": TWO_SIXES.name})
    variables = random_variables(model, TWO_SIXES.crop_size)
    path = onnx_folder / "two_sixes.onnx"
    pretrained.export_onnx(path, model, variables)
    batch = pictures("random", TWO_SIXES.crop_size) - MEAN
    (found,) = onnx_session(path).run(None, {"images": batch.transpose(0, 3, 1, 2)})
    assert_same_logits(found, np.asarray(model.apply(variables, batch)))


def assert_lrn_matters(features, row):
    """What normalisation divides by differs from place to place."""
    (first, *_) = (i for i, stage in enumerate(row.then) if isinstance(stage, NORMS))
    labels = [row.name, *feature_names(row)]
    before = features[labels[first]]
    after = features[stage_name("norm", row.name)]
    divisor = np.abs(before[after != 0] / after[after != 0])
    assert divisor.std() > 0.03 * divisor.mean()


def test_onnx_file_is_well_formed_and_names_our_features(onnx_folder):
    onnx = pytest.importorskip("onnx")
    model, variables, features = network("original")
    names = [f"class {k}" for k in range(CLASSES)]
    path = onnx_folder / "described.onnx"
    pretrained.export_onnx(path, model, variables, class_names=names)
    found = onnx.load(path)
    onnx.checker.check_model(found, full_check=True)
    (source,), (target,) = found.graph.input, found.graph.output
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (source, target)
    ]
    assert source.name == "images" and shapes[0] == ["batch", 3, 224, 224]
    assert target.name == "logits" and shapes[1] == ["batch", CLASSES]
    properties = {item.key: item.value for item in found.metadata_props}
    assert json.loads(properties["class_names"]) == names
    assert "minus the mean" in properties["input"]
    # Any feature can be made an output; maps have their channels first.
    batch = pictures("random", 224)[:1] - MEAN
    wanted = features(batch)
    del found.graph.output[:]
    found.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    onnx.save(found, path)
    results = onnx_session(path).run(None, {"images": batch.transpose(0, 3, 1, 2)})
    for (name, feature), result in zip(wanted.items(), results, strict=True):
        ours = np.moveaxis(np.asarray(feature), -1, 1)
        np.testing.assert_allclose(result, ours, rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("mean", ["colour", "image"])
def test_onnx_can_subtract_the_mean_itself(mean, onnx_folder):
    model, variables, features = network("cifar_13")
    values = MEAN if mean == "colour" else pictures("random", 40)[1].astype(np.float32)
    path = onnx_folder / f"{mean}.onnx"
    pretrained.export_onnx(path, model, variables, mean=values)
    batch = pictures("random", 24).astype(np.float32)
    centre = values if mean == "colour" else values[8:-8, 8:-8]
    (found,) = onnx_session(path).run(None, {"images": batch.transpose(0, 3, 1, 2)})
    assert_same_logits(found, np.asarray(features(batch - centre)["logits"]))


def test_onnx_refuses_what_does_not_fit(tmp_path):
    pytest.importorskip("onnx")
    model, variables, _ = network("cifar_13")
    out = tmp_path / "x.onnx"
    other = make_model({"variant": "cifar_13", "num_classes": CLASSES})
    with pytest.raises(WeightsError, match=r"conv1/kernel \[5, 5, 3, 16\] instead of"):
        pretrained.export_onnx(out, other, variables)
    with pytest.raises(WeightsError, match="20 pixels wide, the network's input 24"):
        pretrained.export_onnx(out, model, variables, mean=np.zeros((20, 20, 3)))
    with pytest.raises(ValueError, match="needs a 24x24 grid"):
        pretrained.export_onnx(out, model, variables, crop_size=32)
    assert not list(tmp_path.iterdir())


# --- Caffe --------------------------------------------------------------------------

CAFFE_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


def caffe_tensors(variant: str, width: float = NARROW, classes: int = CLASSES):
    """{layer: (weight, bias)} as Caffe keeps them: [out, in, down, across], BGR."""
    rng = np.random.default_rng(1)
    first, last, others, biases = GAINS["relu"]
    gains = {"conv1": first, "fc8": last}
    table = ablations.customize(variants.get(variant), width=width, num_classes=classes)
    found, channels = {}, 3
    for row in table.layers:
        if isinstance(row, Dense):
            places = 36 if row.name == "fc6" else 1
            shape = (row.features, channels * places)
        else:
            groups = 2 if row.name in ("conv2", "conv4", "conv5") else 1
            shape = (row.features, channels // groups, row.kernel, row.kernel)
        std = gains.get(row.name, others) / np.sqrt(np.prod(shape[1:]))
        bias = 0.3 if row.name == "fc8" else biases
        found[row.name] = normals(rng, shape, std), normals(rng, shape[:1], bias)
        channels = row.features
    return found


def write_caffemodel(
    path: Path, tensors, order=("norm1", "pool1"), *, old=False, chunks=1
):
    """In the format of 2015 and later, or in the `old` one."""
    net = caffe.messages()["NetParameter"]()
    layers = net.layers if old else net.layer
    for name in ("conv1", *order, *CAFFE_LAYERS[1:]):
        layer = layers.add(name=name)
        for array in tensors.get(name, ()):
            blob = layer.blobs.add()
            if old:
                four = (1,) * (4 - array.ndim) + array.shape
                blob.num, blob.channels, blob.height, blob.width = four
            else:
                blob.shape.dim.extend(array.shape)
            for part in np.array_split(array.reshape(-1), chunks):
                blob.data.append(part.astype("<f4").tobytes())
    path.write_bytes(net.SerializeToString())
    return path


def deploy_prototxt(tensors, *, pools_first: bool) -> str:
    """The network as `bvlc_alexnet` (or CaffeNet) defines it, with these widths."""
    text, below = ['input: "data"', *(f"input_dim: {n}" for n in (1, 3, 227, 227))], ""

    def add(name, kind, parameters="", top=None):
        nonlocal below
        text.append(
            f'layer {{ name: "{name}" type: "{kind}" bottom: "{below or "data"}" '
            f'top: "{top or name}" {parameters} }}'
        )
        below = top or name

    geometry = {
        "conv1": "kernel_size: 11 stride: 4",
        "conv2": "kernel_size: 5 pad: 2 group: 2",
        "conv3": "kernel_size: 3 pad: 1",
        "conv4": "kernel_size: 3 pad: 1 group: 2",
        "conv5": "kernel_size: 3 pad: 1 group: 2",
    }
    lrn = "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }"
    pool = "pooling_param { pool: MAX kernel_size: 3 stride: 2 }"
    for name in CAFFE_LAYERS:
        outputs = f"num_output: {len(tensors[name][0])}"
        if name in geometry:
            both = f"{outputs} {geometry[name]}"
            add(name, "Convolution", f"convolution_param {{ {both} }}")
        else:
            add(name, "InnerProduct", f"inner_product_param {{ {outputs} }}")
        if name != "fc8":
            add(f"relu{name[-1]}", "ReLU", top=name)
        steps = [("norm", "LRN", lrn), ("pool", "Pooling", pool)]
        for kind, layer, parameters in reversed(steps) if pools_first else steps:
            if name in ("conv1", "conv2") or (name, kind) == ("conv5", "pool"):
                add(f"{kind}{name[-1]}", layer, parameters)
    return "\n".join(text)


@pytest.fixture(scope="module", params=["caffe", "caffenet"])
def caffe_network(request, tmp_path_factory):
    """(place, tensors, features) of a network that OpenCV and we have read."""
    place = tmp_path_factory.mktemp(request.param)
    tensors = caffe_tensors(request.param)
    order = ("norm1", "pool1") if request.param == "caffe" else ("pool1", "norm1")
    for old in (False, True):
        path = place / ("old.caffemodel" if old else "new.caffemodel")
        write_caffemodel(path, tensors, order, old=old)
    text = deploy_prototxt(tensors, pools_first=order[0] == "pool1")
    (place / "deploy.prototxt").write_text(text)
    weights = read_weights(place / "new.caffemodel")
    assert weights.settings["variant"] == request.param  # the file says so
    model = weights.make_model()
    features = jax.jit(
        lambda batch: model.apply(weights.variables, batch, method="features")
    )
    return place, weights, features


@pytest.mark.parametrize("kind", ["random", "real"])
def test_opencv_and_we_read_the_same_caffemodel(caffe_network, kind):
    cv2 = pytest.importorskip("cv2")
    place, weights, features = caffe_network
    batch = pictures(kind, weights.crop_size) - weights.mean
    wanted = jax.tree.map(np.asarray, features(batch))
    for age in ("new", "old"):
        net = cv2.dnn.readNetFromCaffe(
            str(place / "deploy.prototxt"), str(place / f"{age}.caffemodel")
        )
        for count in (3, 1):
            bgr = batch[:count, ..., ::-1].transpose(0, 3, 1, 2)
            net.setInput(np.ascontiguousarray(bgr))
            assert_same_logits(net.forward(), wanted["logits"][:count])
    for row in weights.make_model().network.layers[:2]:
        assert_lrn_matters(wanted, row)


def test_old_and_new_caffemodels_are_the_same(caffe_network):
    place, weights, _ = caffe_network
    old = read_weights(place / "old.caffemodel", variant=weights.settings["variant"])
    assert old.settings == weights.settings
    jax.tree.map(np.testing.assert_array_equal, old.variables, weights.variables)
    assert weights.settings["width"] == NARROW
    assert weights.settings["num_classes"] == CLASSES
    assert weights.class_names is None and weights.image_size == 256
    np.testing.assert_allclose(weights.mean, [122.68, 116.67, 104.01], atol=0.01)


def test_caffemodel_of_doubles_in_chunks_with_a_classifier_of_another_name(tmp_path):
    tensors = caffe_tensors("caffe", classes=20)
    plain = read_weights(write_caffemodel(tmp_path / "a.caffemodel", tensors))
    in_chunks = write_caffemodel(tmp_path / "b.caffemodel", tensors, chunks=3)
    net = caffe.messages()["NetParameter"].FromString(in_chunks.read_bytes())
    for layer in net.layer:
        layer.name = layer.name.replace("fc8", "fc8_flickr")
        for blob in layer.blobs:
            values = np.frombuffer(b"".join(blob.data), "<f4").astype("<f8")
            if layer.name == "conv3":
                blob.double_data.append(values.tobytes())
                blob.ClearField("data")
    in_chunks.write_bytes(net.SerializeToString())
    found = read_weights(in_chunks)
    assert found.settings == plain.settings and found.settings["num_classes"] == 20
    jax.tree.map(np.testing.assert_array_equal, found.variables, plain.variables)


@pytest.mark.parametrize(
    ("first", "second", "layer"),
    [
        ("fc8_age", "fc8_gender", "fc8"),
        ("fc8", "fc8_gender", "fc8"),
        ("conv3", "conv3", "conv3"),
    ],
)
def test_two_caffe_layers_for_one_of_ours_are_refused(tmp_path, first, second, layer):
    path = write_caffemodel(tmp_path / "x.caffemodel", caffe_tensors("caffe"))
    net = caffe.messages()["NetParameter"].FromString(path.read_bytes())
    (found,) = (row for row in net.layer if row.name == layer)
    net.layer.add().CopyFrom(found)
    found.name, net.layer[-1].name = first, second
    path.write_bytes(net.SerializeToString())
    refused(
        path, f"holds both {first!r} and {second!r} for {layer!r}", "one of the two"
    )
    # A layer without weights, such as a second data layer, is no second one.
    del net.layer[-1].blobs[:]
    path.write_bytes(net.SerializeToString())
    assert read_weights(path).settings["num_classes"] == CLASSES


def test_a_thousand_classes_are_imagenets(tmp_path):
    tensors = caffe_tensors("caffenet", classes=1000)
    path = write_caffemodel(tmp_path / "x.caffemodel", tensors, ("pool1", "norm1"))
    assert read_weights(path).class_names == imagenet.wnids()


# --- torchvision --------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


def torch_alexnet(torch, width: float, classes: int):
    """torchvision's `AlexNet`, of which only the widths are changed."""
    nn = torch.nn
    c1, c2, c3, c4, c5 = (round(c * width) for c in (64, 192, 384, 256, 256))
    units = round(4096 * width)

    class AlexNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, c1, kernel_size=11, stride=4, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2),
                nn.Conv2d(c1, c2, kernel_size=5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2),
                nn.Conv2d(c2, c3, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Conv2d(c3, c4, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Conv2d(c4, c5, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2),
            )
            self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
            self.classifier = nn.Sequential(
                nn.Dropout(),
                nn.Linear(c5 * 36, units),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(units, units),
                nn.ReLU(),
                nn.Linear(units, classes),
            )

        def forward(self, x):
            return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    torch.manual_seed(0)
    net = AlexNet().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 1.6 / parameter[0].numel() ** 0.5)
    return net


def torch_logits(torch, net, batch, mean, std):
    """Of pictures 0..255, [B, S, S, 3], through `Normalize(mean, std)`."""
    normalised = ((batch / 255 - mean) / std).astype(np.float32)
    with torch.no_grad():
        return net(torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())).numpy()


TORCHVISION_MEAN, TORCHVISION_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def torch_files(torch, tmp_path_factory):
    """(net, .pth, .safetensors) with the same tensors."""
    place = tmp_path_factory.mktemp("torch")
    net = torch_alexnet(torch, NARROW, CLASSES)
    torch.save(net.state_dict(), place / "net.pth")
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    save_file(arrays, place / "net.safetensors")
    return net, place / "net.pth", place / "net.safetensors"


@pytest.mark.parametrize("kind", ["random", "real"])
def test_torch_and_we_read_the_same_pth(kind, torch, torch_files):
    net, path, _ = torch_files
    weights = read_weights(path)
    assert weights.settings == {
        "variant": "owt",
        "num_classes": CLASSES,
        "width": NARROW,
    }
    batch = pictures(kind, weights.crop_size)
    ours = features_of(weights.make_model(), weights.variables, batch - weights.mean)[
        "logits"
    ]
    for count in (3, 1):
        theirs = torch_logits(
            torch, net, batch[:count], TORCHVISION_MEAN, TORCHVISION_STD
        )
        assert_same_logits(theirs, ours[:count])


def test_pth_and_safetensors_are_the_same(torch, torch_files, tmp_path):
    net, path, tensors = torch_files
    wanted = read_weights(path)
    parallel = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": parallel}, tmp_path / "best.pth.tar")
    for other in (tensors, tmp_path / "best.pth.tar"):
        found = read_weights(other, variant="owt")
        assert found.settings == wanted.settings
        jax.tree.map(np.testing.assert_array_equal, found.variables, wanted.variables)
    np.testing.assert_allclose(wanted.mean, [123.675, 116.28, 103.53], rtol=1e-6)
    assert (wanted.image_size, wanted.crop_size) == (256, 224)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "module."),
        ("", "_orig_mod."),
        ("", "model."),
        ("", "module._orig_mod."),
        ("", "backbone.net."),
        ("", "classifier."),  # self.classifier = alexnet()
        ("features.", "features.module."),  # pytorch/examples wraps only these
    ],
)
def test_prefixes_and_counters_are_left_out(
    torch, torch_files, tmp_path, before, after
):
    net, path, _ = torch_files
    wanted = read_weights(path)
    state = {
        after + name.removeprefix(before) if name.startswith(before) else name: value
        for name, value in net.state_dict().items()
    }
    counters = {"n_averaged": torch.tensor(7), "bn.num_batches_tracked": torch.ones(1)}
    torch.save({**counters, **state}, tmp_path / "x.pth")
    arrays = {name: value.numpy() for name, value in {**state, **counters}.items()}
    save_file(arrays, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        found = read_weights(tmp_path / name)
        assert found.settings == wanted.settings
        jax.tree.map(np.testing.assert_array_equal, found.variables, wanted.variables)


def test_two_state_dicts_in_one_file_are_refused(torch, torch_files, tmp_path):
    state = torch_files[0].state_dict()
    torch.save({"state_dict": state, "model": state}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "under each of the keys state_dict, model.")


def test_two_tensors_that_differ_in_their_prefix_are_refused(
    torch, torch_files, tmp_path
):
    net, *_ = torch_files
    state = {n: a for n, a in net.state_dict().items() if n == "classifier.6.bias"}
    both = {f"{who}.{n}": a for who in ("model", "ema") for n, a in state.items()}
    torch.save(both, tmp_path / "x.pth")
    arrays = {name: value.numpy() for name, value in both.items()}
    save_file(arrays, tmp_path / "x.safetensors")
    for suffix in ("pth", "safetensors"):
        names = ("'model.classifier.6.bias'", "'ema.classifier.6.bias'")
        refused(tmp_path / f"x.{suffix}", *names, " for 'classifier.6.bias'")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_the_state_dict_is_found_under_its_usual_keys(
    torch, torch_files, tmp_path, key
):
    net, path, _ = torch_files
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).state_dict()
    arch = {"model": "alexnet"} if key == "net" else {}
    torch.save(
        {**arch, "epoch": 3, key: net.state_dict(), "optimizer": optimizer},
        tmp_path / "x.pth",
    )
    wanted, found = read_weights(path), read_weights(tmp_path / "x.pth")
    jax.tree.map(np.testing.assert_array_equal, found.variables, wanted.variables)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_torch_runs_what_we_export(kind, torch, tmp_path):
    settings = {"variant": "owt", "num_classes": CLASSES, "width": NARROW}
    model = make_model(settings)
    variables = random_variables(model, 224)
    weights = Weights(settings, variables, MEAN, 256, 224, tuple("abcdefghijkl"))
    path = tmp_path / "owt.safetensors"
    pretrained.save_safetensors(path, weights, names="torchvision")
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    mean, std = (json.loads(metadata[f"normalize_{n}"]) for n in ("mean", "std"))
    np.testing.assert_allclose(mean, MEAN / 255, rtol=1e-6)
    assert tuple(std) == TORCHVISION_STD
    net = torch_alexnet(torch, NARROW, CLASSES)
    state = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
    net.load_state_dict(state)
    batch = pictures(kind, 224)
    ours = features_of(model, variables, batch - MEAN)["logits"]
    assert_same_logits(torch_logits(torch, net, batch, mean, std), ours)
    # And back, with the sizes and the names that torchvision has no place for.
    again = read_weights(path)
    assert again.settings == settings and again.class_names == weights.class_names
    np.testing.assert_allclose(again.mean, MEAN, rtol=1e-6)
    back = features_of(model, again.variables, batch - again.mean)["logits"]
    assert_same_logits(back, ours)


def test_torchvision_has_no_other_networks(tmp_path):
    for change in ({"variant": "paper"}, {"variant": "owt", "lrn": True}):
        settings = {"num_classes": CLASSES, "width": NARROW, **change}
        variables = random_variables(make_model(settings), 224)
        weights = Weights(settings, variables, MEAN, 256, 224)
        with pytest.raises(WeightsError, match="torchvision has no network like"):
            pretrained.save_safetensors(
                tmp_path / "x.safetensors", weights, names="torchvision"
            )
    assert not list(tmp_path.iterdir())


# --- our own files ------------------------------------------------------------------


def own_weights(**changes) -> Weights:
    settings = {"variant": "cifar", "num_classes": 3, "width": 0.25, **changes}
    model = make_model(settings)
    mean = pictures("random", 32)[0].astype(np.float32)
    variables = random_variables(model, 32)
    return Weights(settings, variables, mean, 32, 32, ("cat", "dog", "größer"))


def test_own_files_hold_all_that_load_gives(tmp_path):
    weights = own_weights(normalization="batch", skip=["conv3"], dtype=jnp.bfloat16)
    path = tmp_path / "net.safetensors"
    pretrained.save_safetensors(path, weights)
    found = read_weights(path, variant="cifar")
    assert found.settings == {**weights.settings, "dtype": "bfloat16"}
    assert found.class_names == weights.class_names
    np.testing.assert_array_equal(found.mean, weights.mean)
    assert "batch_stats" in found.variables
    jax.tree.map(np.testing.assert_array_equal, found.variables, weights.variables)
    model, variables, preprocess = load(path)
    assert model == weights.make_model()
    picture = pictures("random", 32)[1]
    batch = picture.astype(np.float32)[None] - weights.mean
    np.testing.assert_array_equal(preprocess(Image.fromarray(picture)), batch)
    apply = jax.jit(model.apply)
    logits = apply(variables, batch)
    np.testing.assert_array_equal(logits, apply(weights.variables, batch))


def test_load_broadcasts_a_mean_colour(tmp_path):
    weights = dataclasses.replace(own_weights(), mean=MEAN)
    pretrained.save_safetensors(tmp_path / "net.safetensors", weights)
    _, _, preprocess = load(tmp_path / "net.safetensors")
    picture = pictures("random", 32)[1]
    np.testing.assert_array_equal(preprocess(picture), (picture - MEAN)[None])


def test_safetensors_reads_arrays_of_any_order_and_precision(tmp_path):
    weights = own_weights()
    params = weights.variables["params"]
    kernel = np.asarray(params["fc10"]["kernel"])
    params["fc10"]["kernel"] = np.asfortranarray(kernel)
    params["conv1"]["bias"] = params["conv1"]["bias"].astype(jnp.bfloat16)
    params["conv2"]["bias"] = np.asarray(params["conv2"]["bias"], ">f8")
    pretrained.save_safetensors(tmp_path / "net.safetensors", weights)
    found = load_file(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(found["params/fc10/kernel"], kernel)
    for layer, dtype in (("conv1", jnp.bfloat16), ("conv2", np.float64)):
        bias = found[f"params/{layer}/bias"]
        assert bias.dtype == dtype
        np.testing.assert_array_equal(bias, params[layer]["bias"])


# --- the command --------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(
        small_config(folder, max_steps=1, eval_every_epochs=0.0), workdir
    )
    return workdir


def test_a_run_becomes_files(workdir, tmp_path, capsys):
    model, variables, preprocess = load(workdir)
    out = tmp_path / "new" / "run.safetensors"
    assert export.main([f"--workdir={workdir}", f"--out={out}"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    again, leaves, prepare = load(out)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, leaves, variables)
    picture = pictures("random", 50)[0]
    np.testing.assert_array_equal(prepare(picture), preprocess(picture))
    assert read_weights(out).class_names == ("blue", "green", "red")


def test_a_file_becomes_onnx(workdir, tmp_path, capsys):
    pytest.importorskip("onnx")
    model, variables, preprocess = load(workdir)
    tensors, out = tmp_path / "run.safetensors", tmp_path / "run.onnx"
    assert export.main([f"--workdir={workdir}", f"--out={tensors}"]) == 0
    assert export.main([f"--workdir={tensors}", f"--out={out}"]) == 0
    weights = read_weights(tensors)
    picture = pictures("random", weights.image_size)[0]
    start = (weights.image_size - weights.crop_size) // 2
    centre = slice(start, start + weights.crop_size)
    pixels = picture[centre, centre].transpose(2, 0, 1)[None].astype(np.float32)
    (found,) = onnx_session(out).run(None, {"images": pixels})
    wanted = jax.jit(model.apply)(variables, preprocess(picture))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out={tmp}/x.h5"], "must end in .safetensors or .onnx"),
        (["--out={tmp}/x.onnx", "--names=torchvision"], "is for .safetensors"),
        (["--out={tmp}/x.safetensors", "--names=torchvision"], "no network like"),
        (["--out={tmp}/x.onnx", "--step=77"], "step 77"),
        (["--out={tmp}/x.onnx", "--workdir={tmp}/a.pth"], "a.pth"),
        (["--out={tmp}/x.onnx", "--workdir={tmp}"], "is not the workdir of a run"),
    ],
)
def test_mistakes_are_one_line(workdir, tmp_path, capsys, arguments, message):
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert export.main([f"--workdir={workdir}", *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_torchvision_is_given_its_own_widths_only(torch_files, tmp_path, capsys):
    _, narrow, _ = torch_files
    out = tmp_path / "x.safetensors"
    arguments = [f"--workdir={narrow}", f"--out={out}"]
    assert export.main([*arguments, "--names=torchvision"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "4, 12, 24, 16, 16, 256, 256 features per layer; torchvision's" in line
    assert "64, 192, 384, 256, 256, 4096, 4096 and could not read them" in line
    assert not out.exists()
    assert export.main(arguments) == 0


# --- wrong files --------------------------------------------------------------------


def refused(path: Path, *expected: str, variant: str | None = None) -> None:
    """One line that names the file, and these words."""
    with pytest.raises(WeightsError) as caught:
        read_weights(path, variant=variant)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for words in expected:
        assert words in message


def test_files_of_no_known_format(tmp_path):
    refused(tmp_path / "none.pth", "there is no such file")
    (tmp_path / "weights.h5").write_bytes(b"x")
    refused(tmp_path / "weights.h5", ".caffemodel", "got .h5")
    with pytest.raises(ValueError, match="no variant 'vgg'"):
        (tmp_path / "weights.pth").touch()
        read_weights(tmp_path / "weights.pth", variant="vgg")
    for suffix in pretrained.SUFFIXES:
        if suffix.startswith(".p"):
            pytest.importorskip("torch", reason="torch is not installed")
        page = tmp_path / f"page{suffix}"
        page.write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
        refused(page, "<!DOCTYPE html>", "Was it downloaded whole?")
        page.write_bytes(b"")
        refused(page, "0 bytes")


def test_wrong_caffemodels(tmp_path):
    tensors = caffe_tensors("caffe")
    path = tmp_path / "x.caffemodel"
    whole = write_caffemodel(path, tensors).read_bytes()
    refused(path, "holds weights of variant caffe;", "'caffenet'", variant="caffenet")
    refused(path, "holds weights of variant caffe or", "'owt'", variant="owt")
    for size in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "is no .caffemodel that can be read", "downloaded whole")
    write_caffemodel(path, {k: v for k, v in tensors.items() if k != "conv3"})
    refused(path, "missing conv3 blob 0, conv3 blob 1.")
    write_caffemodel(path, {**tensors, "norm1": tensors["conv1"]})
    refused(path, "unexpected norm1 blob 0, norm1 blob 1.")
    ungrouped = np.zeros((16, 6, 5, 5), np.float32)
    write_caffemodel(path, {**tensors, "conv2": (ungrouped, tensors["conv2"][1])})
    refused(path, "conv2 blob 0 [16, 6, 5, 5] instead of [16, 3, 5, 5].")
    write_caffemodel(path, tensors, order=())
    refused(path, "variant='caffe' or variant='caffenet'")
    assert read_weights(path, variant="caffenet").settings["variant"] == "caffenet"
    # A blob with fewer numbers than its shape says.
    net = caffe.messages()["NetParameter"].FromString(whole)
    net.layer[0].blobs[0].data[0] = net.layer[0].blobs[0].data[0][:-8]
    path.write_bytes(net.SerializeToString())
    refused(path, "cannot reshape array")


def test_wrong_state_dicts(torch, torch_files, tmp_path):
    net, whole, tensors = torch_files
    path = tmp_path / "x.pth"
    path.write_bytes(whole.read_bytes()[:-1000])
    refused(path, "is no .pth that can be read")
    refused(whole, "holds weights of variant owt; got variant='paper'", variant="paper")
    refused(tensors, "variant owt; got variant='caffe'", variant="caffe")
    state = net.state_dict()
    left = {name: value for name, value in state.items() if "6.weight" not in name}
    torch.save(left, path)
    refused(path, "missing features.6.weight, classifier.6.weight.")
    torch.save({**state, "extra": torch.zeros(2)}, path)
    refused(path, "unexpected extra.")
    torch.save({**state, "features.8.weight": torch.zeros(16, 24, 5, 5)}, path)
    refused(path, "features.8.weight [16, 24, 5, 5] instead of [16, 24, 3, 3].")
    torch.save([1, 2], path)
    refused(path, "holds no state_dict: it is no dictionary")
    torch.save({"weights": state, "epoch": 3}, path)
    keys = "no floating-point tensor is under its keys weights, epoch."
    refused(path, keys, "model_state_dict, model")
    torch.save({**state, "features.0.bias": torch.full((4,), float("nan"))}, path)
    refused(path, "features.0.bias holds numbers that are infinite or NaN")


def test_wrong_safetensors(tmp_path):
    weights = own_weights()
    path = tmp_path / "x.safetensors"
    pretrained.save_safetensors(path, weights)
    whole = path.read_bytes()
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    leaves = load_file(path)
    refused(path, "holds weights of variant cifar; got variant='owt'", variant="owt")
    path.write_bytes(whole[:-5])
    refused(path, "is no .safetensors that can be read", "not fully covered")
    save_file(leaves, path)
    refused(path, "written neither by alexnet_jax nor from torchvision's", "params/")
    kernel = "params/conv2/kernel"
    save_file(
        {k: v for k, v in leaves.items() if k not in (kernel, "mean")}, path, metadata
    )
    refused(path, f"variant cifar: missing {kernel}, mean.")
    save_file({**leaves, "more": MEAN}, path, metadata)
    refused(path, "unexpected more.")
    save_file({**leaves, "mean": MEAN[:2]}, path, metadata)
    refused(path, "of another shape mean [2] instead of [3].")
    record = json.loads(metadata["alexnet_jax"])
    for change, words in (
        ({"version": 2}, "version 2, expected 1"),
        ({"settings": {"variant": "vgg"}}, "no variant 'vgg'"),
        ({"settings": {"variant": "cifar", "depth": 5}}, "'depth'"),
    ):
        changed = {"alexnet_jax": json.dumps({**record, **change})}
        save_file(leaves, path, changed)
        refused(path, "metadata 'alexnet_jax' cannot be used", words)
    save_file(leaves, path, {"alexnet_jax": "{"})
    refused(path, "metadata 'alexnet_jax' cannot be used")


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_a_package_that_is_missing_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "x.pth"
    path.touch()
    with pytest.raises(WeightsError, match=f"needs {package}: pip install"):
        if package == "torch":
            read_weights(path)
        else:
            pretrained.export_onnx(tmp_path / "x.onnx", *network("cifar_13")[:2])


def test_weights_that_are_not_their_settings_are_not_written(tmp_path):
    weights = own_weights()
    wrong = dataclasses.replace(weights, settings={**weights.settings, "width": 0.5})
    path = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match="instead of"):
        pretrained.save_safetensors(path, wrong)
    with pytest.raises(WeightsError, match=r"mean has shape \[2\]"):
        dataclasses.replace(weights, mean=MEAN[:2])
    with pytest.raises(WeightsError, match="names='caffe'"):
        pretrained.save_safetensors(path, weights, names="caffe")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    pretrained.save_safetensors(path, own_weights())
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained.safetensors.safetensors.numpy, "save", full)
    with pytest.raises(OSError, match="No space"):
        pretrained.save_safetensors(path, own_weights())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- at full size -------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_network_at_full_size(tmp_path):
    pytest.importorskip("onnx")
    model = make_model({"variant": "paper"})
    variables = random_variables(model, 224)
    weights = Weights({"variant": "paper"}, variables, MEAN, 256, 224)
    tensors, graph = tmp_path / "paper.safetensors", tmp_path / "paper.onnx"
    pretrained.save_safetensors(tensors, weights)
    found = read_weights(tensors)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    pretrained.export_onnx(graph, model, found.variables)
    assert flat(variables)["params/fc6/kernel"].shape == (9216, 4096)
    assert tensors.stat().st_size == pytest.approx(4 * 60_965_224, rel=0.001)
    assert graph.stat().st_size == pytest.approx(4 * 60_965_224, rel=0.001)
    batch = pictures("random", 224) - MEAN
    wanted = features_of(model, variables, batch)
    (logits,) = onnx_session(graph).run(None, {"images": batch.transpose(0, 3, 1, 2)})
    assert_same_logits(logits, wanted["logits"])
