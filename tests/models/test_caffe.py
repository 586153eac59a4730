"""Caffe's files: OpenCV runs the same `.caffemodel` with the same logits."""

from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.data import imagenet
from alexnet_jax.models.weights import caffe, files, read_weights
from tests.models import networks

CAFFE_CONVS = {
    "conv1": "kernel_size: 11 stride: 4",
    "conv2": "kernel_size: 5 pad: 2 group: 2",
    "conv3": "kernel_size: 3 pad: 1",
    "conv4": "kernel_size: 3 pad: 1 group: 2",
    "conv5": "kernel_size: 3 pad: 1 group: 2",
}
CAFFE_LAYERS = (*CAFFE_CONVS, "fc6", "fc7", "fc8")
ORDERS = {"caffe": ("norm", "pool"), "caffenet": ("pool", "norm")}


def caffe_tensors(variant: str, classes: int = networks.CLASSES):
    """Return {layer: (weight, bias)}, random, in Caffe's layout."""
    weights = networks.random_weights(variant=variant, num_classes=classes, width=networks.NARROW)
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
    """Return (folder, weights, features) of a network in Caffe's files."""
    place = tmp_path_factory.mktemp(request.param)
    tensors, order = caffe_tensors(request.param), ORDERS[request.param]
    for age in ("new", "old"):
        path = place / f"{age}.caffemodel"
        write_caffemodel(path, tensors, order, old=age == "old")
    (place / "deploy.prototxt").write_text(deploy_prototxt(tensors, order))
    weights = read_weights(place / "new.caffemodel")
    assert weights.settings["variant"] == request.param  # as the file says
    return place, weights, networks.jitted_features(weights)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_caffemodel_logits_equal_opencv(caffe_network, kind):
    cv2 = pytest.importorskip("cv2")
    place, weights, features = caffe_network
    batch = networks.raw_images(kind, weights.crop_size) - weights.mean
    wanted = features(batch)
    for age in ("new", "old"):
        paths = place / "deploy.prototxt", place / f"{age}.caffemodel"
        net = cv2.dnn.readNetFromCaffe(*map(str, paths))

        def run(batch, net=net):
            net.setInput(networks.channels_first(batch[..., ::-1]))
            return net.forward()

        networks.assert_same_logits(run, batch, wanted["logits"])
    for row in weights.make_model().network.layers[:2]:
        networks.assert_lrn_matters(wanted, row)


def test_old_and_new_caffemodels_are_equal(caffe_network):
    place, weights, _ = caffe_network
    variant = weights.settings["variant"]
    old = read_weights(place / "old.caffemodel", variant=variant)
    networks.assert_same_weights(old, weights)
    sizes = {"variant": variant, "num_classes": networks.CLASSES, "width": networks.NARROW}
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
    networks.assert_same_weights(found, plain)
    # A thousand classes are assumed to be ImageNet's.
    assert found.settings["num_classes"] == 1000
    assert found.class_names == imagenet.wnids()


def test_wrong_caffemodels_are_refused(tmp_path):
    tensors = caffe_tensors("caffe")
    path = tmp_path / "x.caffemodel"
    whole = write_caffemodel(path, tensors).read_bytes()
    networks.refused(path, "holds weights of variant caffe;", "'caffenet'", variant="caffenet")
    path.write_bytes(whole[:-1])
    networks.refused(path, "is no .caffemodel that can be read", "downloaded whole")
    ungrouped = np.zeros((16, 6, 5, 5), np.float32), tensors["conv2"][1]
    write_caffemodel(path, {**tensors, "conv2": ungrouped, "conv3": ()})
    networks.refused(path, "missing conv3 blob 0, conv3 blob 1;")
    networks.refused(path, "conv2 blob 0 [16, 6, 5, 5] instead of [16, 3, 5, 5].")
    write_caffemodel(path, tensors, order=())
    networks.refused(path, "variant='caffe' or variant='caffenet'")
    assert read_weights(path, variant="caffenet").settings["variant"] == "caffenet"
    # A second classifier is ambiguous.
    write_caffemodel(path, tensors)
    net = read_net(path)
    net.layer.add(name="fc8_gender", blobs=net.layer[-1].blobs)
    path.write_bytes(net.SerializeToString())
    networks.refused(path, "holds both 'fc8' and 'fc8_gender' for 'fc8'", "one of the two")
