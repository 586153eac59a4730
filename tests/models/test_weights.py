"""Weights from and for other programs, each direction against that program's engine.

torch runs torchvision's network, OpenCV Caffe's, onnxruntime ours. The weights are
random, but a mistake shows: LRN changes what it normalises, biases are not zero, and
logits differ from class to class and from image to image.
"""

import dataclasses
import functools
import json
import os
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax.traverse_util import unflatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

from alexnet_jax import export, load
from alexnet_jax.data import imagenet, images
from alexnet_jax.models.layers import Activation, Lrn, WithinMapLrn, feature_names, stage_name
from alexnet_jax.models.weights import SUFFIXES, Weights, WeightsError, caffe, files, read_weights
from alexnet_jax.models.weights.files import make_model
from alexnet_jax.models.weights.safetensors import save_safetensors
from alexnet_jax.training import loop
from tests.models.test_variants import COUNTS, TWO_SIXES
from tests.training.test_loop import folder, small_config  # noqa: F401

TOLERANCE = 1e-4
LRNS = (Lrn, WithinMapLrn)
NARROW = 1 / 16
CLASSES = 12
MEAN = np.array([120.0, 115.0, 105.0], np.float32)
# Size of the activations, at which LRN's sums count beside its constant.
SCALE = 40.0
# unit -> factors on the kernels of the first layer, the last, the others, and biases.
GAINS = {
    "relu": (0.7, 3 / SCALE, 1.6, SCALE / 10),
    "tanh": (0.03, 3.0, 2.0, 0.3),
    "sigmoid": (0.03, 8.0, 8.0, 0.3),
}


@functools.cache
def pictures(kind: str, size: int) -> np.ndarray:
    """Return three raw images, [3, size, size, 3]: blotches, or ImageNet's."""
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
        members = [member for member in tar if member.isfile()][:3]
        return np.stack([images.decode(tar.extractfile(m).read(), size, m.name) for m in members])


def channels_first(batch):
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def normals(rng, shape, std):
    return (std * rng.standard_normal(shape)).astype(np.float32)


def random_variables(model):
    """Return weights with which every layer counts, and logits differ by about 1."""
    rng = np.random.default_rng(0)
    layers = model.network.layers
    units = [s.kind for s in model.network.stages if isinstance(s, Activation)]
    first, last, others, biases = GAINS[units[0]]
    gains = {layers[0].name: first, layers[-1].name: last}
    leaves = {}
    for name, shape in files.shapes_of(model, model.network.crop_size).items():
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
    return jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/"))


def random_weights(*, mean=MEAN, image_size=None, class_names=None, **settings) -> Weights:
    """Return `random_variables` of a network, with these settings."""
    model = make_model(settings)
    size = model.network.crop_size
    variables = random_variables(model)
    return Weights(settings, variables, mean, image_size or size, size, class_names)


def assert_same_logits(found, wanted):
    """The logits are equal, and differ between classes and between images."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    if len(wanted) > 1:
        assert wanted.std(axis=1).min() > 0.3, "the classes are all alike"
        assert wanted.std(axis=0).max() > 0.1, "the images are all alike"


def assert_same_weights(found: Weights, wanted: Weights):
    assert found.settings == wanted.settings
    jax.tree.map(np.testing.assert_array_equal, found.variables, wanted.variables)


def assert_lrn_matters(features, row):
    """The divisor of a normalisation differs from place to place."""
    (first, *_) = (i for i, stage in enumerate(row.then) if isinstance(stage, LRNS))
    labels = [row.name, *feature_names(row)]
    before = features[labels[first]]
    after = features[stage_name("norm", row.name)]
    divisor = np.abs(before[after != 0] / after[after != 0])
    assert divisor.std() > 0.03 * divisor.mean()


def jitted_features(weights):
    """Return a function of images that returns all features as NumPy arrays."""
    model = weights.make_model()
    apply = jax.jit(lambda x: model.apply(weights.variables, x, method="features"))
    return lambda batch: jax.tree.map(np.asarray, apply(batch))


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


@functools.cache
def network(name: str):
    """Return (weights, features) of one of NETWORKS, narrowed."""
    narrow = 0.25 if name.startswith("cifar") else NARROW
    weights = random_weights(**{"num_classes": CLASSES, "width": narrow, **NETWORKS[name]})
    return weights, jitted_features(weights)


@pytest.fixture
def export_onnx():
    pytest.importorskip("onnx")
    from alexnet_jax.models.weights.onnx import export_onnx

    return export_onnx


def run_onnx(path: Path, batch):
    """Return the outputs for raw images, [B, S, S, 3]."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    return session.run(None, {"images": channels_first(batch.astype(np.float32))})


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_our_logits(name, kind, export_onnx, tmp_path):
    weights, features = network(name)
    export_onnx(tmp_path / "x.onnx", weights)
    batch = pictures(kind, weights.crop_size)
    wanted = features(batch - MEAN)
    for count in (3, 1):
        (found,) = run_onnx(tmp_path / "x.onnx", batch[:count])
        assert_same_logits(found, wanted["logits"][:count])
    for row in weights.make_model().network.layers:
        if any(isinstance(stage, LRNS) for stage in row.then):
            assert_lrn_matters(wanted, row)


def test_onnx_file_is_well_formed_and_names_our_features(export_onnx, tmp_path):
    import onnx

    weights, features = network("original")
    path, names = tmp_path / "x.onnx", [f"class {k}" for k in range(CLASSES)]
    export_onnx(path, dataclasses.replace(weights, class_names=tuple(names)))
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
    # Any feature can be made an output; maps have their channels first.
    batch = pictures("random", 224)[:1]
    wanted = features(batch - MEAN)
    del found.graph.output[:]
    found.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    onnx.save(found, path)
    results = run_onnx(path, batch)
    for (name, feature), result in zip(wanted.items(), results, strict=True):
        ours = np.moveaxis(feature, -1, 1)
        np.testing.assert_allclose(result, ours, rtol=1e-4, atol=1e-3, err_msg=name)


def test_onnx_subtracts_the_centre_of_a_mean_image(export_onnx, tmp_path):
    weights, features = network("cifar_13")
    mean = pictures("random", 40)[1].astype(np.float32)
    export_onnx(tmp_path / "x.onnx", dataclasses.replace(weights, mean=mean, image_size=40))
    batch = pictures("random", 24)
    (found,) = run_onnx(tmp_path / "x.onnx", batch)
    assert_same_logits(found, features(batch - mean[8:-8, 8:-8])["logits"])


CAFFE_CONVS = {
    "conv1": "kernel_size: 11 stride: 4",
    "conv2": "kernel_size: 5 pad: 2 group: 2",
    "conv3": "kernel_size: 3 pad: 1",
    "conv4": "kernel_size: 3 pad: 1 group: 2",
    "conv5": "kernel_size: 3 pad: 1 group: 2",
}
CAFFE_LAYERS = (*CAFFE_CONVS, "fc6", "fc7", "fc8")
ORDERS = {"caffe": ("norm", "pool"), "caffenet": ("pool", "norm")}


def caffe_tensors(variant: str, classes: int = CLASSES):
    """Return {layer: (weight, bias)}, random, in Caffe's layout."""
    weights = random_weights(variant=variant, num_classes=classes, width=NARROW)
    found, channels = {}, 3
    for row in weights.make_model().network.layers:
        leaves = weights.variables["params"][row.name]
        weight = files.channels_first(np.asarray(leaves["kernel"]), channels)
        found[row.name] = weight, np.asarray(leaves["bias"])
        channels = row.features
    return found


def write_caffemodel(path: Path, tensors, order=ORDERS["caffe"], *, old=False):
    """Write the format of 2015 and later, or the `old` one."""
    net = caffe.messages()["NetParameter"]()
    layers = net.layers if old else net.layer
    for name in ("conv1", *(f"{kind}1" for kind in order), *CAFFE_LAYERS[1:]):
        layer = layers.add(name=name)
        for array in tensors.get(name, ()):
            blob = layer.blobs.add()
            if old:
                four = (1,) * (4 - array.ndim) + array.shape
                blob.num, blob.channels, blob.height, blob.width = four
            else:
                blob.shape.dim.extend(array.shape)
            blob.data.append(array.astype("<f4").tobytes())
    path.write_bytes(net.SerializeToString())
    return path


def read_net(path: Path):
    """Return the message of a .caffemodel."""
    return caffe.messages()["NetParameter"].FromString(path.read_bytes())


def deploy_prototxt(tensors, order) -> str:
    """Return the network as `bvlc_alexnet` (or CaffeNet) defines it, with these widths."""
    text, below = ['input: "data"', *(f"input_dim: {n}" for n in (1, 3, 227, 227))], ""

    def add(name, kind, parameters="", top=None):
        nonlocal below
        text.append(
            f'layer {{ name: "{name}" type: "{kind}" bottom: "{below or "data"}" '
            f'top: "{top or name}" {parameters} }}'
        )
        below = top or name

    lrn = "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }"
    pool = "pooling_param { pool: MAX kernel_size: 3 stride: 2 }"
    steps = {"norm": ("LRN", lrn), "pool": ("Pooling", pool)}
    for name in CAFFE_LAYERS:
        outputs = f"num_output: {len(tensors[name][0])}"
        if name in CAFFE_CONVS:
            both = f"{outputs} {CAFFE_CONVS[name]}"
            add(name, "Convolution", f"convolution_param {{ {both} }}")
        else:
            add(name, "InnerProduct", f"inner_product_param {{ {outputs} }}")
        if name != "fc8":
            add(f"relu{name[-1]}", "ReLU", top=name)
        for kind in order:
            if name in ("conv1", "conv2") or (name, kind) == ("conv5", "pool"):
                add(f"{kind}{name[-1]}", *steps[kind])
    return "\n".join(text)


@pytest.fixture(scope="module", params=ORDERS)
def caffe_network(request, tmp_path_factory):
    """(place, weights, features) of a network in Caffe's files."""
    place = tmp_path_factory.mktemp(request.param)
    tensors, order = caffe_tensors(request.param), ORDERS[request.param]
    for age in ("new", "old"):
        path = place / f"{age}.caffemodel"
        write_caffemodel(path, tensors, order, old=age == "old")
    (place / "deploy.prototxt").write_text(deploy_prototxt(tensors, order))
    weights = read_weights(place / "new.caffemodel")
    assert weights.settings["variant"] == request.param  # as the file says
    return place, weights, jitted_features(weights)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_opencv_and_we_read_the_same_caffemodel(caffe_network, kind):
    cv2 = pytest.importorskip("cv2")
    place, weights, features = caffe_network
    batch = pictures(kind, weights.crop_size) - weights.mean
    wanted = features(batch)
    for age in ("new", "old"):
        net = cv2.dnn.readNetFromCaffe(
            str(place / "deploy.prototxt"), str(place / f"{age}.caffemodel")
        )
        for count in (3, 1):
            net.setInput(channels_first(batch[:count, ..., ::-1]))
            assert_same_logits(net.forward(), wanted["logits"][:count])
    for row in weights.make_model().network.layers[:2]:
        assert_lrn_matters(wanted, row)


def test_old_and_new_caffemodels_are_the_same(caffe_network):
    place, weights, _ = caffe_network
    variant = weights.settings["variant"]
    old = read_weights(place / "old.caffemodel", variant=variant)
    assert_same_weights(old, weights)
    sizes = {"variant": variant, "num_classes": CLASSES, "width": NARROW}
    assert weights.settings == sizes
    assert weights.class_names is None and weights.image_size == 256
    np.testing.assert_allclose(weights.mean, [122.68, 116.67, 104.01], atol=0.01)


def test_caffemodel_in_chunks_with_a_classifier_of_another_name(tmp_path):
    path = write_caffemodel(tmp_path / "x.caffemodel", caffe_tensors("caffe", 1000))
    plain, net = read_weights(path), read_net(path)
    for layer in net.layer:
        layer.name = layer.name.replace("fc8", "fc8_flickr")
        for blob in layer.blobs:
            values = np.frombuffer(blob.data.pop(), "<f4")
            blob.data.extend(part.tobytes() for part in np.array_split(values, 3))
    path.write_bytes(net.SerializeToString())
    found = read_weights(path)
    assert_same_weights(found, plain)
    # A thousand classes are assumed to be ImageNet's.
    assert found.settings["num_classes"] == 1000
    assert found.class_names == imagenet.wnids()


OWT = {"variant": "owt", "num_classes": CLASSES, "width": NARROW}
TORCHVISION_MEAN, TORCHVISION_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


def torch_alexnet(torch):
    """Return torchvision's `AlexNet`, narrowed, with random weights."""
    nn = torch.nn
    c1, c2, c3, c4, c5 = (round(c * NARROW) for c in (64, 192, 384, 256, 256))
    units = round(4096 * NARROW)

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
        nn.Dropout(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, CLASSES),
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


def torch_logits(torch, net, batch, mean, std):
    """Return the logits of raw images, [B, S, S, 3], through `Normalize(mean, std)`."""
    normalised = ((batch / 255 - mean) / std).astype(np.float32)
    with torch.no_grad():
        return net(torch.from_numpy(channels_first(normalised))).numpy()


@pytest.fixture(scope="module")
def torch_files(torch, tmp_path_factory):
    """(net, .pth, .safetensors) with the same tensors."""
    place = tmp_path_factory.mktemp("torch")
    net = torch_alexnet(torch)
    torch.save(net.state_dict(), place / "net.pth")
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    save_file(arrays, place / "net.safetensors")
    return net, place / "net.pth", place / "net.safetensors"


@pytest.mark.parametrize("kind", ["random", "real"])
def test_torch_and_we_read_the_same_pth(kind, torch, torch_files):
    net, path, tensors = torch_files
    weights = read_weights(path)
    assert weights.settings == OWT
    assert_same_weights(read_weights(tensors, variant="owt"), weights)
    np.testing.assert_allclose(weights.mean, [123.675, 116.28, 103.53], rtol=1e-6)
    assert (weights.image_size, weights.crop_size) == (256, 224)
    batch = pictures(kind, 224)
    ours = jitted_features(weights)(batch - weights.mean)["logits"]
    for count in (3, 1):
        some = batch[:count]
        theirs = torch_logits(torch, net, some, TORCHVISION_MEAN, TORCHVISION_STD)
        assert_same_logits(theirs, ours[:count])


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
def test_the_tensors_are_found_under_prefixes_and_keys(
    torch, torch_files, tmp_path, key, before, after
):
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
        assert_same_weights(read_weights(tmp_path / name), wanted)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_torch_runs_what_we_export_and_we_read_it_back(kind, torch, tmp_path):
    path = tmp_path / "x.safetensors"
    weights = random_weights(image_size=256, class_names=tuple("abcdefghijkl"), **OWT)
    save_safetensors(path, weights, names="torchvision")
    net, state = torch_alexnet(torch), load_file(path)
    net.load_state_dict({name: torch.from_numpy(a) for name, a in state.items()})
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    mean, std = (json.loads(metadata[f"normalize_{n}"]) for n in ("mean", "std"))
    np.testing.assert_allclose(mean, MEAN / 255, rtol=1e-6)
    assert tuple(std) == TORCHVISION_STD
    batch = pictures(kind, 224)
    ours = jitted_features(weights)(batch - MEAN)
    assert_same_logits(torch_logits(torch, net, batch, mean, std), ours["logits"])
    # With the mean, the sizes and the names that torchvision has no place for.
    found = read_weights(path)
    assert found.settings == OWT and found.class_names == weights.class_names
    np.testing.assert_allclose(found.mean, MEAN, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found.variables, weights.variables)


def test_torchvision_has_no_lrn(tmp_path):
    weights = random_weights(**OWT, lrn=True)
    with pytest.raises(WeightsError, match="no network like variant owt with lrn chang"):
        save_safetensors(tmp_path / "x.safetensors", weights, names="torchvision")


def own_weights(**changes) -> Weights:
    mean = pictures("random", 32)[0].astype(np.float32)
    settings = {"variant": "cifar", "num_classes": 3, "width": 0.25, **changes}
    return random_weights(mean=mean, class_names=("cat", "dog", "größer"), **settings)


def test_own_files_hold_all_that_load_gives(tmp_path):
    weights = own_weights(normalization="batch", skip=["conv3"], dtype="bfloat16")
    path = tmp_path / "net.safetensors"
    save_safetensors(path, weights)
    found = read_weights(path, variant="cifar")
    assert found.class_names == weights.class_names
    np.testing.assert_array_equal(found.mean, weights.mean)
    assert "batch_stats" in found.variables
    assert_same_weights(found, weights)
    model, variables, preprocess = load(path)
    assert model == weights.make_model()
    picture = pictures("random", 32)[1]
    batch = picture.astype(np.float32)[None] - weights.mean
    np.testing.assert_array_equal(preprocess(Image.fromarray(picture)), batch)
    jax.tree.map(np.testing.assert_array_equal, variables, weights.variables)
    # A mean colour is subtracted everywhere.
    save_safetensors(path, dataclasses.replace(weights, mean=MEAN))
    _, _, preprocess = load(path)
    np.testing.assert_array_equal(preprocess(picture), (picture - MEAN)[None])


def test_safetensors_keeps_arrays_of_any_order_and_precision(tmp_path):
    weights = own_weights()
    params = weights.variables["params"]
    kernel = np.asarray(params["fc10"]["kernel"])
    params["fc10"]["kernel"] = np.asfortranarray(kernel)
    params["conv1"]["bias"] = params["conv1"]["bias"].astype(jnp.bfloat16)
    params["conv2"]["bias"] = np.asarray(params["conv2"]["bias"], ">f8")
    save_safetensors(tmp_path / "net.safetensors", weights)
    found = load_file(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(found["params/fc10/kernel"], kernel)
    for layer, dtype in (("conv1", jnp.bfloat16), ("conv2", np.float64)):
        bias = found[f"params/{layer}/bias"]
        assert bias.dtype == dtype
        np.testing.assert_array_equal(bias, params[layer]["bias"])


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):  # noqa: F811
    """The workdir of a run of one step."""
    workdir = tmp_path_factory.mktemp("run")
    config = small_config(folder, max_steps=1, eval_every_epochs=0.0)
    loop.train_and_evaluate(config, workdir)
    return workdir


def test_a_run_becomes_a_file_and_the_file_onnx(workdir, tmp_path, capsys):
    pytest.importorskip("onnx")
    model, variables, preprocess = load(workdir)
    tensors, graph = tmp_path / "new" / "run.safetensors", tmp_path / "run.onnx"
    for source, out in ((workdir, tensors), (tensors, graph)):
        assert export.main([f"--workdir={source}", f"--out={out}"]) == 0
        assert f"wrote {out}" in capsys.readouterr().out
    again, leaves, prepare = load(tensors)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, leaves, variables)
    weights = read_weights(tensors)
    assert weights.class_names == ("blue", "green", "red")
    picture = pictures("random", weights.image_size)[0]
    image = preprocess(picture)
    np.testing.assert_array_equal(prepare(picture), image)
    start = (weights.image_size - weights.crop_size) // 2
    centre = slice(start, start + weights.crop_size)
    (found,) = run_onnx(graph, picture[None, centre, centre])
    wanted = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_mistakes_are_one_line(workdir, tmp_path, capsys):
    names, narrow = "--names=torchvision", workdir / "narrow.safetensors"
    save_safetensors(narrow, own_weights())
    for arguments, message in (
        (["--out={tmp}/x.h5"], "must end in .safetensors or .onnx"),
        (["--out={tmp}/x.onnx", names], "is for .safetensors"),
        (["--out={tmp}/x.safetensors", names], "no network like variant cifar"),
        (
            ["--out={tmp}/x.safetensors", names, f"--workdir={narrow}"],
            "layers of width 0.25, which torchvision's AlexNet could not read",
        ),
        (["--out={tmp}/x.onnx", "--step=77"], "step 77"),
        (["--out={tmp}/x.onnx", "--workdir={tmp}/a.pth"], "a.pth"),
        (["--out={tmp}/x.onnx", "--workdir={tmp}"], "is not the workdir of a run"),
    ):
        given = [argument.format(tmp=tmp_path) for argument in arguments]
        assert export.main([f"--workdir={workdir}", *given]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
        assert not list(tmp_path.iterdir())


def refused(path: Path, *expected: str, variant: str | None = None) -> None:
    """Reading fails with one line that names the file and contains these words."""
    with pytest.raises(WeightsError) as caught:
        read_weights(path, variant=variant)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for words in expected:
        assert words in message


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".h5", ""])
def test_files_of_another_format(suffix, tmp_path):
    if suffix.startswith(".p"):
        pytest.importorskip("torch", reason="torch is not installed")
    page = tmp_path / f"page{suffix}"
    refused(page, "there is no such file")
    page.write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
    if suffix in SUFFIXES:
        refused(page, "<!DOCTYPE html>", "Was it downloaded whole?")
    else:
        refused(page, ".caffemodel", f"got {suffix or 'no suffix'}")


def test_wrong_caffemodels(tmp_path):
    tensors = caffe_tensors("caffe")
    path = tmp_path / "x.caffemodel"
    whole = write_caffemodel(path, tensors).read_bytes()
    refused(path, "holds weights of variant caffe;", "'caffenet'", variant="caffenet")
    path.write_bytes(whole[:-1])
    refused(path, "is no .caffemodel that can be read", "downloaded whole")
    ungrouped = np.zeros((16, 6, 5, 5), np.float32), tensors["conv2"][1]
    write_caffemodel(path, {**tensors, "conv2": ungrouped, "conv3": ()})
    refused(path, "missing conv3 blob 0, conv3 blob 1;")
    refused(path, "conv2 blob 0 [16, 6, 5, 5] instead of [16, 3, 5, 5].")
    write_caffemodel(path, tensors, order=())
    refused(path, "variant='caffe' or variant='caffenet'")
    assert read_weights(path, variant="caffenet").settings["variant"] == "caffenet"
    # A second classifier is ambiguous.
    write_caffemodel(path, tensors)
    net = read_net(path)
    net.layer.add(name="fc8_gender", blobs=net.layer[-1].blobs)
    path.write_bytes(net.SerializeToString())
    refused(path, "holds both 'fc8' and 'fc8_gender' for 'fc8'", "one of the two")


def test_wrong_state_dicts(torch, torch_files, tmp_path):
    net, whole, _ = torch_files
    path, state = tmp_path / "x.pth", net.state_dict()
    path.write_bytes(whole.read_bytes()[:-1000])
    refused(path, "is no .pth that can be read")
    refused(whole, "holds weights of variant owt; got variant='paper'", variant="paper")
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
        refused(path, words)


def test_wrong_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, own_weights())
    whole, leaves = path.read_bytes(), load_file(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    refused(path, "holds weights of variant cifar; got variant='owt'", variant="owt")
    path.write_bytes(whole[:-5])
    refused(path, "is no .safetensors that can be read", "not fully covered")
    save_file(leaves, path)
    refused(path, "written neither by alexnet_jax nor from torchvision's", "params/")
    save_file({f"{who}.classifier.6.bias": MEAN for who in ("model", "ema")}, path)
    refused(path, "holds both 'ema.classifier.6.bias' and 'model.classifier.6.bias' for")
    kernel = "params/conv2/kernel"
    left = {k: v for k, v in leaves.items() if k not in (kernel, "mean")}
    for tensors, words in (
        (left, f"variant cifar: missing {kernel}, mean."),
        (leaves | {"more": MEAN}, "unexpected more."),
        (leaves | {"mean": MEAN[:2]}, "of another shape mean [2] instead of [3]."),
    ):
        save_file(tensors, path, metadata)
        refused(path, words)
    record = json.loads(metadata["alexnet_jax"])
    for change, words in (
        ({"version": 2}, "expected version 1"),
        ({"settings": {"variant": "cifar", "depth": 5}}, "'depth'"),
    ):
        save_file(leaves, path, {"alexnet_jax": json.dumps(record | change)})
        refused(path, "metadata 'alexnet_jax' cannot be used", words)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    for package in ("torch", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "alexnet_jax.models.weights.onnx", raising=False)
    pth, own = tmp_path / "x.pth", tmp_path / "x.safetensors"
    pth.touch()
    refused(pth, "needs torch: pip install")
    save_safetensors(own, own_weights())
    assert export.main([f"--workdir={own}", f"--out={tmp_path / 'x.onnx'}"]) == 1
    assert "needs onnx: pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_the_papers_network_at_full_size(export_onnx, tmp_path):
    weights = random_weights(variant="paper", image_size=256)
    tensors, graph = tmp_path / "paper.safetensors", tmp_path / "paper.onnx"
    save_safetensors(tensors, weights)
    found = read_weights(tensors)
    assert_same_weights(found, weights)
    assert found.variables["params"]["fc6"]["kernel"].shape == (9216, 4096)
    export_onnx(graph, found)
    for path in (tensors, graph):
        assert path.stat().st_size == pytest.approx(4 * 60_965_224, rel=0.001)
    batch = pictures("random", 224)
    (logits,) = run_onnx(graph, batch)
    assert_same_logits(logits, jitted_features(weights)(batch - MEAN)["logits"])
