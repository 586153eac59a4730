"""Files from anywhere: whatever is in them, they are read right or refused in words.

Small valid files are changed byte by byte and in their structure. Each is then given to
what reads it. It must give a value that is right, or raise one of the exceptions that it
documents, with a message that names the file; nothing else may happen: no other
exception, no crash, no hang, no gigabytes, no code that is run.

The tests take a few inputs of each kind, always the same ones. The long form takes more
than 100,000, and writes how many of each kind were read and how many refused:

    ALEXNET_UNTRUSTED_RECORD=FILE.json python -m pytest tests/test_untrusted.py \
        --hypothesis-profile=long -m ""
"""

import ast
import collections
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import struct
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alexnet_jax import experiment, findings, pretrained, records, report, report_page
from alexnet_jax.analysis.codes import Coder, Codes, load_codes
from alexnet_jax.analysis.retrieval import PIXELS, Index, RetrievalError, load_index
from alexnet_jax.checkpoint import MANIFEST, Checkpointer, CheckpointError
from alexnet_jax.data import DataError, images, statistics
from alexnet_jax.data.imagenet import classes, originals
from alexnet_jax.evaluate import Predictions, PredictionsError, errors, load_predictions
from alexnet_jax.experiment import ConfigError
from alexnet_jax.pretrained import Weights, WeightsError, caffe, read_weights
from alexnet_jax.pretrained import weights as weights_lib
from alexnet_jax.stopwatch import read_times
from alexnet_jax.writers import read_metrics
from configs import common

ROOT = Path(__file__).parent.parent
RECORD = "ALEXNET_UNTRUSTED_RECORD"
LONG = settings.get_current_profile_name() == "long"
# Seconds after which an input counts as one that hangs.
HANGS = 60
# Address space that reading may take beyond what the process has, and memory that it may
# have taken in the end.
MORE_SPACE = 4 * 2**30
MORE_MEMORY = 2 * 2**30

# What happened to the inputs, by kind: "read", or the exception's name.
tally = collections.defaultdict(collections.Counter)


def inputs(long: int, short: int = 20):
    """How many inputs of a kind there are in the long form, and otherwise."""
    return settings(max_examples=long if LONG else short)


# --- what must hold -----------------------------------------------------------------


class _Watch:
    """Notes what must not happen while a file is read: programs started, pickles."""

    def __init__(self):
        self.on = False
        self.seen = []
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.on and event in (
            *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
            *("subprocess.Popen", "pickle.find_class", "shutil.rmtree"),
        ):
            self.seen.append((event, args))


watch = _Watch()


@pytest.fixture(scope="module", autouse=True)
def _bounded():
    """A bound on memory, and at the end the record of what was tried."""
    used = _address_space()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_SPACE, before[1]))
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first) * 1024
    assert grown < MORE_MEMORY
    if path := os.environ.get(RECORD):
        kinds = {kind: dict(sorted(tally[kind].items())) for kind in sorted(tally)}
        record = {
            "about": "mutated files, each read right or refused in words",
            "inputs": sum(sum(counts.values()) for counts in kinds.values()),
            "kinds": {
                kind: {"inputs": sum(counts.values()), **counts}
                for kind, counts in kinds.items()
            },
            "peak_memory_grown_mib": round(grown / 2**20),
            "machine": records.machine(
                f"python -m pytest {records.without_paths(sys.argv[1:])}"
            ),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=2) + "\n")


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


class Hangs(BaseException):
    """Nothing that is read may catch it."""


@contextlib.contextmanager
def _in_time():
    def hangs(*_):
        raise Hangs(f"not read in {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_or_refused(kind, read, named, refusals):
    """What `read` gives, None if it refuses as it says that it does.

    Args:
      named: what a refusal's message must have, such as the file's path.
      refusals: the exceptions that it documents.
    """
    watch.seen.clear()
    try:
        with _in_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of files that are cut off
            watch.on = True
            found = read()
    except refusals as error:
        assert type(error) in refusals, f"{type(error).__name__} is not documented"
        assert str(named) in str(error), str(error)
        assert len(str(error)) < 5000
        tally[kind][type(error).__name__] += 1
        return None
    finally:
        watch.on = False
    assert not watch.seen
    tally[kind]["read"] += 1
    return found


# --- changes ------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63)
HUGE = st.sampled_from([*NUMBERS, -1, -2, -(2**31), 10**9, 10**18, 2**64, 10**400])
VALUES = st.one_of(
    *(st.none(), st.booleans(), HUGE, st.integers(-3, 300)),
    st.floats(),
    st.sampled_from([1e308, -0.0, 5e-324, math.nan, math.inf, -math.inf]),
    st.text(max_size=8),
    st.sampled_from(["", "\x00", "\ud800", "../..", "/dev/zero", "x" * 999, "a\nb"]),
    st.sampled_from([[], {}, [[]], {"": {}}, [None], {"a": [1, {"b": 2}]}]),
)


@st.composite
def changed_bytes(draw, data: bytes) -> bytes:
    """Up to three changes: bits, bytes, numbers, and parts dropped, doubled or put in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        match draw(
            st.sampled_from(
                ["bit", "byte", "number", "cut", "drop", "double", "insert"]
            )
        ):
            case "bit" if found:
                found[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if found:
                found[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                order = draw(st.sampled_from(["little", "big"]))
                number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
                found[at : at + size] = number.to_bytes(size, order)
            case "cut":
                del found[at:]
            case "drop":
                del found[at : at + draw(st.integers(1, 64))]
            case "double":
                part = found[at : at + draw(st.integers(1, 64))]
                found[at:at] = part
            case "insert":
                found[at:at] = draw(st.binary(max_size=16))
    return bytes(found)


@st.composite
def changed_tree(draw, tree):
    """A JSON value, in which one to three places hold something else, or nothing."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        tree = _changed_once(draw, tree, draw(st.integers(1, 5)))
    return tree


def _changed_once(draw, tree, depth):
    if not isinstance(tree, dict | list) or not tree or depth == 0:
        return copy.deepcopy(draw(VALUES))
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = draw(st.sampled_from(keys))
    what = draw(st.sampled_from(["into", "into", "into", "drop", "rename", "add"]))
    if what == "drop":
        del tree[key]
    elif what == "rename" and isinstance(tree, dict):
        tree[draw(st.sampled_from(["", "..", *map(str, keys)]))] = tree.pop(key)
    elif what == "add":
        value = copy.deepcopy(draw(VALUES))
        if isinstance(tree, dict):
            tree[draw(st.text(max_size=5))] = value
        else:
            tree.append(value)
    else:
        tree[key] = _changed_once(draw, tree[key], depth - 1)
    return tree


@st.composite
def changed_json(draw, tree) -> bytes:
    """Text of a changed tree, perhaps with what no tree has."""
    text = json.dumps(draw(changed_tree(tree)))
    what = draw(
        st.sampled_from(["as it is"] * 6 + ["deep", "digits", "twice", "bytes"])
    )
    at = draw(st.integers(0, len(text)))
    if what == "deep":
        depth = draw(st.sampled_from([50, 900, 100_000]))
        deep = "[" * depth + "]" * depth
        text = draw(st.sampled_from([deep, '{"a":' * depth + "1" + "}" * depth]))
    elif what == "digits":
        text = text[:at] + "9" * draw(st.sampled_from([400, 5000])) + text[at:]
    elif what == "twice":
        text = text[:-1] + "," + text[1:]  # every name a second time
    data = text.encode("utf-8", "surrogatepass")
    return draw(changed_bytes(data)) if what == "bytes" else data


def test_trees_and_bytes_are_changed():
    """The changes do what the tests rely on: most inputs differ, in many ways."""
    tree = {"a": {"b": [1, 2]}, "c": "d"}
    seen = set()

    @settings(max_examples=200)
    @given(changed_json(tree), changed_bytes(b"abcdefgh"))
    def collect(text, data):
        seen.update({("json", text), ("bytes", data)})

    collect()
    for kind in ("json", "bytes"):
        assert sum(k == kind for k, _ in seen) > 50


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("untrusted")


# --- weights ------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _shapes_once():
    """Shapes of the same network are traced once, which is nearly all of the time."""
    once = functools.lru_cache(256)(weights_lib.shapes_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_lib, "shapes_of", lambda *args: dict(once(*args)))
        yield


def _variables(settings, size):
    """Small numbers for every variable of a network."""
    shapes = weights_lib.shapes_of(weights_lib.make_model(settings), size)
    rng = np.random.default_rng(0)
    return weights_lib.nested(
        {name: rng.normal(0, 0.1, s).astype(np.float32) for name, s in shapes.items()}
    )


def check_weights(weights):
    """They are those of the network that they say, and finite."""
    if weights is None:
        return
    model = weights.make_model()
    wanted = weights_lib.shapes_of(model, weights.crop_size)
    found = weights_lib.flat(weights.variables)
    assert {name: np.shape(leaf) for name, leaf in found.items()} == dict(wanted)
    assert all(np.isfinite(np.asarray(leaf, float)).all() for leaf in found.values())
    assert np.isfinite(weights.mean).all()
    assert 1 <= weights.crop_size <= weights.image_size <= 4096
    count = model.network.layers[-1].features
    assert weights.class_names is None or len(weights.class_names) <= count


@functools.cache
def caffe_message():
    """A `NetParameter` of a very narrow bvlc_alexnet."""
    network = weights_lib.make_model({"variant": "caffe", "width": 1 / 48}).network
    shapes = weights_lib.shapes_of(
        weights_lib.make_model({"variant": "caffe", "width": 1 / 48, "num_classes": 3}),
        network.crop_size,
    )
    net = caffe.messages()["NetParameter"]()
    rng = np.random.default_rng(0)
    for row in network.layers:
        layer = net.layer.add(name=row.name)
        kernel = shapes[f"params/{row.name}/kernel"]
        for shape in (weights_lib.first_shape(kernel), kernel[-1:]):
            blob = layer.blobs.add()
            blob.shape.dim.extend(shape)
            blob.data.append(rng.normal(size=shape).astype("<f4").tobytes())
        if row.name == "conv1":
            for name in ("norm1", "pool1"):
                net.layer.add(name=name)
    return net


@st.composite
def caffemodels(draw):
    net = caffe.messages()["NetParameter"]()
    net.CopyFrom(caffe_message())
    for _ in range(draw(st.integers(0, 2))):
        layer = net.layer[draw(st.integers(0, len(net.layer) - 1))]
        _change_layer(draw, net, layer)
    data = net.SerializeToString()
    how = draw(st.sampled_from(["as it is", "bytes", "bytes", "deep"]))
    if how == "bytes":  # mostly where the structure is, not in the numbers
        data = draw(changed_bytes(data))
    elif how == "deep":  # groups, or messages in messages
        depth = draw(st.sampled_from([10, 101, 20_000]))
        data = draw(st.sampled_from([b"\x0b", b"\xa3\x06", b"\xa2\x06\x7f"])) * depth
    return data


def _change_layer(draw, net, layer):
    blobs = layer.blobs
    what = draw(
        st.sampled_from(["name", "double", "old", "shape", "values", "doubles", "drop"])
    )
    if what == "name":
        others = ["", "fc8_x", "conv1", "norm1", "fc6", "x" * 300, "a\nb"]
        layer.name = draw(st.sampled_from(others))
    elif what == "double":
        net.layer.add().CopyFrom(layer)
    elif what == "old":
        net.layers.add(name=layer.name).blobs.extend(blobs)
    elif not blobs:
        return
    elif what == "drop":
        del blobs[draw(st.integers(0, len(blobs) - 1))]
    else:
        blob = blobs[draw(st.integers(0, len(blobs) - 1))]
        sides = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**62, -(2**63)]))
        if what == "shape" and draw(st.booleans()):
            blob.ClearField("shape")
            blob.num, blob.channels = draw(sides), draw(sides)
            blob.height, blob.width = draw(sides), draw(sides)
        elif what == "shape":
            dims = list(blob.shape.dim)
            if dims and draw(st.booleans()):
                dims[draw(st.integers(0, len(dims) - 1))] = draw(sides)
            else:
                dims = draw(st.lists(sides, max_size=70))
            del blob.shape.dim[:]
            blob.shape.dim.extend(dims)
        elif what == "values":
            data = b"".join(blob.data)
            nan = np.float32(draw(st.sampled_from([np.nan, np.inf, 3e38, -0.0])))
            changed = [data[:-3], data[:-4], b"", nan.tobytes() + data[4:], data * 2]
            del blob.data[:]
            blob.data.append(draw(st.sampled_from(changed)))
        else:
            values = np.frombuffer(b"".join(blob.data), "<f4").astype("<f8")
            values *= draw(st.sampled_from([1.0, 1e300, math.nan]))
            cut = draw(st.sampled_from([0, 1, 8]))
            blob.double_data.append(values.tobytes()[cut:])


@inputs(long=11_000)
@given(
    caffemodels(),
    st.sampled_from([None, None, None, "caffe", "caffenet", "owt"]),
)
def test_caffemodels(place, data, variant):
    path = place / "x.caffemodel"
    path.write_bytes(data)
    found = read_or_refused(
        ".caffemodel",
        lambda: read_weights(path, variant=variant),
        path,
        (WeightsError,),
    )
    check_weights(found)


@functools.cache
def own_file() -> bytes:
    settings = {"variant": "cifar", "num_classes": 3, "width": 1 / 16}
    mean = np.full((34, 34, 3), 99, np.float32)
    weights = Weights(
        settings, _variables(settings, 32), mean, 34, 32, ("a", "b", "größer")
    )
    return _written(weights, "alexnet_jax")


@functools.cache
def torchvisions_file() -> bytes:
    settings = {"variant": "owt", "num_classes": 3, "width": 1 / 64}
    mean = np.array([120, 115, 105], np.float32)
    weights = Weights(settings, _variables(settings, 224), mean, 256, 224)
    return _written(weights, "torchvision")


def _written(weights, names) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        pretrained.save_safetensors(path, weights, names=names)
        return path.read_bytes()


@st.composite
def safetensors_files(draw, whole: bytes):
    """Bytes changed, the header as JSON changed, or what we keep in it as JSON."""
    length = int.from_bytes(whole[:8], "little")
    header, tensors = whole[8 : 8 + length], whole[8 + length :]
    what = draw(
        st.sampled_from(["bytes", "head", "header", "record", "record", "type"])
    )
    if what == "bytes":
        return draw(changed_bytes(whole))
    if what == "head":  # where the structure is
        return draw(changed_bytes(whole[: 8 + length])) + tensors
    tree = json.loads(header)
    if what == "header":
        header = draw(changed_json(tree))
    elif what == "type":
        name = draw(st.sampled_from([n for n in tree if n != "__metadata__"]))
        types = "F64 F32 F16 BF16 I64 I8 U8 BOOL F8_E4M3 F8_E5M2 C64 U64 F4 E8M0 X"
        tree[name]["dtype"] = draw(st.sampled_from(types.split()))
        if draw(st.booleans()):  # as many bytes in another shape
            count = tree[name]["data_offsets"][1] - tree[name]["data_offsets"][0]
            tree[name]["shape"] = draw(st.sampled_from([[count], [count, 1], [0], []]))
        header = json.dumps(tree).encode()
    else:
        metadata = tree["__metadata__"]
        name = draw(st.sampled_from([*metadata]))
        if draw(st.booleans()) and name == "alexnet_jax":
            text = json.dumps(draw(_records(json.loads(metadata[name]))))
        else:
            known = "pt" if name == "format" else json.loads(metadata[name])
            text = draw(changed_json(known)).decode("utf-8", "replace")
        metadata[name] = text
        header = json.dumps(tree).encode("utf-8", "replace")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tensors


@st.composite
def _records(draw, record):
    """A setting that is there, or could be, with a value of any kind."""
    names = [
        *("variant", "num_classes", "width", "dtype", "init", "lrn", "pool_window"),
        *("pool_stride", "pool_kind", "activation", "columns", "dropout", "fast"),
        *("normalization", "norm_layers", "norm_place", "skip", "depth"),
    ]
    likely = st.sampled_from(
        [10**9, 1e9, 60, 0.05, "owt", "paper", "tanh", "batch", "float64", ["conv2"]]
    )
    value = draw(st.one_of(VALUES, likely))
    if draw(st.booleans()):
        record["settings"][draw(st.sampled_from(names))] = value
    else:
        other = ["version", "image_size", "crop_size", "class_names", "settings"]
        record[draw(st.sampled_from(other))] = value
    return record


@inputs(long=11_000)
@given(st.data())
def test_our_safetensors(place, data):
    path = place / "own.safetensors"
    path.write_bytes(data.draw(safetensors_files(own_file())))
    read = functools.partial(read_weights, path)
    check_weights(read_or_refused(".safetensors, ours", read, path, (WeightsError,)))


@inputs(long=5_000)
@given(st.data())
def test_torchvisions_safetensors(place, data):
    path = place / "theirs.safetensors"
    path.write_bytes(data.draw(safetensors_files(torchvisions_file())))
    read = functools.partial(read_weights, path)
    kind = ".safetensors, torchvision's"
    check_weights(read_or_refused(kind, read, path, (WeightsError,)))


def test_files_that_would_build_gigantic_networks(place):
    """Each is refused by its numbers, with what they are."""
    whole = own_file()
    length = int.from_bytes(whole[:8], "little")
    for change, words in (
        ({"settings": {"width": 1e9}}, "width=1000000000.0 must be above 0, at most"),
        ({"settings": {"width": math.nan}}, "width=nan"),
        ({"settings": {"width": "wide"}}, "width='wide' must be a number"),
        (
            {"settings": {"num_classes": 10**9}},
            "num_classes=1000000000 must be a whole",
        ),
        ({"settings": {"columns": 10**400}}, "columns=1000000"),
        ({"settings": {"dtype": "int8"}}, "dtype='int8' must be one of float32"),
        ({"settings": {"pool_window": 60}}, "pool_window=60"),
        ({"crop_size": 10**9}, "larger than the picture"),
        ({"image_size": 10**9}, "4096"),
        ({"image_size": 34.0}, "image_size=34.0 must be a whole number"),
        ({"class_names": [1, 2, 3]}, "class_names must be names"),
        ({"version": "1"}, "version='1' must be a whole number"),
    ):
        tree = json.loads(whole[8 : 8 + length])
        record = json.loads(tree["__metadata__"]["alexnet_jax"])
        for name, value in change.items():
            record[name] = {**record[name], **value} if name == "settings" else value
        tree["__metadata__"]["alexnet_jax"] = json.dumps(record)
        header = json.dumps(tree).encode()
        path = place / "gigantic.safetensors"
        path.write_bytes(
            len(header).to_bytes(8, "little") + header + whole[8 + length :]
        )
        with pytest.raises(WeightsError) as error:
            read_weights(path)
        assert str(path) in str(error.value) and words in str(error.value)


# --- torch files --------------------------------------------------------------------


def payloads(canary: Path) -> list[bytes]:
    """Pickles that would make a file if they were run."""
    code = f"open({str(canary)!r}, 'w').close()"
    command = f"touch {canary}"
    return [
        f"cos\nsystem\n(S{command!r}\ntR.".encode(),
        f"c__builtin__\neval\n(S{code!r}\ntR.".encode(),
        f"cbuiltins\nexec\n(S{code!r}\ntR.".encode(),
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        f"(S{command!r}\nios\nsystem\n.".encode(),
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.",
    ]


def torch_files(torch, canary: Path) -> list[bytes]:
    """What torch writes: state_dicts, and what is none."""
    state = {
        name: torch.from_numpy(array.copy())
        for name, array in pretrained.torchvision.to_state(
            Weights(
                {"variant": "owt", "num_classes": 3, "width": 1 / 64},
                _variables({"variant": "owt", "num_classes": 3, "width": 1 / 64}, 224),
                np.zeros(3, np.float32),
                256,
                224,
            )
        ).items()
    }
    bias = "features.0.bias"
    huge = torch.zeros(1).expand(10**6, 10**6)
    others = [
        state,
        {"state_dict": state, "epoch": 3},
        {f"module.{name}": tensor for name, tensor in state.items()},
        {**state, bias: torch.full_like(state[bias], math.nan)},
        {**state, bias: state[bias].int()},
        {**state, bias: state[bias].to(torch.complex64)},
        {**state, bias: state[bias].to_sparse()},
        {**state, bias: torch.empty(3, device="meta")},
        {**state, bias: state[bias].half()},
        {**state, bias: huge},
        {**state, bias: torch.zeros(1).half().expand(10**6, 10**6)},
        {**state, bias: 5},
        [1, 2],
        state[bias],
        {},
    ]
    found = []
    for value in others:
        for new in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=new)
            found.append(file.getvalue())
    return [*found, *payloads(canary)]


@st.composite
def changed_archives(draw, whole: bytes, canary: Path):
    """A zip file as torch writes it, of which a member is another, or is packed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = draw(st.sampled_from(sorted(members)))
    pickled = next(n for n in members if n.endswith("data.pkl"))
    what = draw(
        st.sampled_from(["code", "pickle", "bytes", "drop", "add", "bomb", "rename"])
    )
    packing = zipfile.ZIP_STORED
    if what == "code":
        members[pickled] = draw(st.sampled_from(payloads(canary)))
    elif what == "pickle":
        members[pickled] = draw(changed_bytes(members[pickled]))
    elif what == "bytes":
        members[name] = draw(changed_bytes(members[name]))
    elif what == "drop":
        del members[name]
    elif what == "rename":
        others = ["../" + name, "/tmp/x", "data.pkl", "constants.pkl", name.upper()]
        members[draw(st.sampled_from(others))] = members.pop(name)
    elif what == "add":
        members["archive/code/x.py"] = b"raise SystemExit"
    else:
        members[name] = bytes(draw(st.sampled_from([2**16, 2**22])))
        packing = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return file.getvalue()


@pytest.fixture(scope="module")
def torch_inputs(place):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    canary = place / "canary"
    return canary, torch_files(torch, canary)


@inputs(long=6_000)
@given(st.data())
def test_torch_files(place, torch_inputs, data):
    canary, found = torch_inputs
    whole = data.draw(st.sampled_from(found))
    how = data.draw(st.sampled_from(["as it is", "bytes", "archive", "archive"]))
    if how == "archive":
        archives = [file for file in found if zipfile.is_zipfile(io.BytesIO(file))]
        whole = data.draw(changed_archives(archives[0], canary))
    elif how == "bytes":
        whole = data.draw(changed_bytes(whole))
    path = place / data.draw(st.sampled_from(["x.pth", "x.pt", "x.pth.tar"]))
    path.write_bytes(whole)
    read = functools.partial(read_weights, path)
    check_weights(read_or_refused(".pth", read, path, (WeightsError,)))
    assert not canary.exists()


def test_payloads_would_run(place, torch_inputs):
    """Else that they were not run would mean nothing."""
    import pickle

    canary, _ = torch_inputs
    for payload in payloads(canary)[:5]:
        pickle.loads(payload)
        assert canary.exists()
        canary.unlink()
        path = place / "payload.pth"
        path.write_bytes(payload)
        with pytest.raises(WeightsError):
            read_weights(path)
        assert not canary.exists()


def test_a_torch_archive_that_unpacks_to_more_is_refused(place, torch_inputs):
    whole = torch_inputs[1][0]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    path = place / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data if "data/" not in name else bytes(2**22))
    words = r"bomb.pth .* it would unpack to \d"
    with pytest.raises(WeightsError, match=words):
        read_weights(path)
    # For Python this is no archive then; for torch it is.
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\x05\x06ab"
    assert not zipfile.is_zipfile(path)
    with pytest.raises(WeightsError, match="bomb.pth"):
        read_or_refused(".pth", lambda: read_weights(path), path, ())


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "pickled, words",
    [
        (b"cbuiltins\nbytearray\n\x8a\x05\0\xe4\x0b\x54\x02\x85R.", "bytearray"),
        (b"X\x08\0\0\0builtinsX\x09\0\0\0bytearray\x93.", "STACK_GLOBAL"),
        (b"(X\x01\0\0\0aictorch._utils\n_rebuild_qtensor\n.", "INST"),
        (b"ctorch\nFloatStorage\n\x8a\x05\0\xe4\x0b\x54\x02\x85R.", "not read it"),
    ],
)
def test_a_few_bytes_do_not_fill_the_memory(place, torch_inputs, pickled, words, new):
    """`bytearray(10**10)` is among what torch.load with weights_only=True may make."""
    pickled, path = b"\x80\x02" + pickled, place / "small.pth"
    old = torch_inputs[1][1]
    if new:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (("data.pkl", pickled), ("version", b"3")):
                archive.writestr(f"archive/{name}", data)
    else:  # the fourth of five pickles
        start = old.index(b"\x80\x02", old.index(b"long") + 1)
        path.write_bytes(old[:start] + pickled + b"\x80\x02].")
    with pytest.raises(WeightsError, match=words):
        read_or_refused(".pth", lambda: read_weights(path), path, ())


def test_a_pickle_of_many_keys_with_one_hash_is_refused(place, torch_inputs):
    """Python takes hours for a million of them."""
    # Nor is a key that has itself inside, twice sixty times over.
    nested = b"".join(
        b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
    )
    # The same where each is remembered twice, the second time behind the first.
    aliased = b"".join(
        b"r" + bytes([2 * i, 0, 0, 0]) + b"q" + bytes([2 * i + 1]) + b"h"
        + bytes([2 * i + 1]) + b"\x86"
        for i in range(60)
    )  # fmt: skip
    keys = [(i * (2**61 - 1)).to_bytes(11, "little") for i in range(1, 30_000)]
    pickled = b"\x80\x02}(" + b"".join(b"\x8a\x0b" + k + b"N" for k in keys) + b"u."
    path = place / "keys.pth"
    for data, words in (
        (pickled, "what it pickles has more than 131,072 bytes"),
        (b"\x80\x02}K\x01\x85" + nested + b"Ns.", "it repeats more than 20 of its"),
        (b"\x80\x02}K\x01\x85" + aliased + b"Ns.", "it repeats more than 20 of its"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", b"3")
        with pytest.raises(WeightsError, match=words):
            read_or_refused(".pth", lambda: read_weights(path), path, ())


def test_an_old_file_of_torch_that_is_a_tar_archive_too_is_refused(place, torch_inputs):
    """Such ones torch reads by yet another way."""
    old = bytearray(torch_inputs[1][1])
    old[100:156], old[156:157], old[329:345] = b"0" * 48 + b" " * 8, b"0", b"0" * 16
    old[148:156] = b"%06o\0 " % sum(old[:512])
    path = place / "tar.pth"
    path.write_bytes(old)
    assert tarfile.is_tarfile(path)
    with pytest.raises(WeightsError, match="no file of torch.save begins so"):
        read_weights(path)


# --- .npz ---------------------------------------------------------------------------


def npz_of(arrays, packing=zipfile.ZIP_STORED) -> bytes:
    """As np.savez, but of members that are bytes already too."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            if isinstance(array, bytes):
                member.write(array)
            else:
                np.lib.format.write_array(member, np.asarray(array))
            archive.writestr(f"{name}.npy", member.getvalue())
    return file.getvalue()


def npy_that_says(
    header: str, data: bytes = b"", version: bytes = b"\x01\x00"
) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


HEADERS = st.sampled_from(
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-5,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2**62, 2**62), }",
        "{'descr': '<U999999999', 'fortran_order': False, 'shape': (1000,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
        "{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': ()}",
        "{'descr': '|V1', 'fortran_order': False, 'shape': (3, 0, 999999999), }",
        "[" * 5000,
        "",
    ]
)


@functools.cache
def executed_pickle() -> bytes:
    """An array of objects, which only pickle could read."""
    header = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    return npy_that_says(header, b"cos\nsystem\n(S'exit 1'\ntR.")


@st.composite
def npz_files(draw, arrays) -> bytes:
    """An array of another type, shape or values, or none; bytes changed."""
    arrays = dict(arrays)
    packing = draw(st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED]))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(arrays)))
        array = arrays[name]
        what = draw(
            st.sampled_from(["drop", "value", "type", "shape", "other", "raw", "pack"])
        )
        if what == "drop" and len(arrays) > 1:
            del arrays[name]
        elif what == "raw":
            raw = [executed_pickle(), npy_that_says(draw(HEADERS), bytes(64)), b"text"]
            arrays[name] = draw(st.sampled_from(raw))
        elif what == "pack":
            others = [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED]
            packing = draw(st.sampled_from(others))
        elif isinstance(array, bytes):
            continue
        elif what == "value" and array.size and array.dtype.kind in "fiu":
            array = np.array(array)
            numbers = [0, -1, 3, 2**31 - 1, math.nan, math.inf, -math.inf, 1e300]
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                number = np.array(draw(st.sampled_from(numbers))).astype(array.dtype)
            array.reshape(-1)[draw(st.integers(0, array.size - 1))] = number
            arrays[name] = array
        elif what == "type":
            types = [
                ">f4",
                "<f8",
                "f2",
                "c8",
                "?",
                "i1",
                "<u8",
                "<U3",
                "S3",
            ]
            type_ = draw(st.sampled_from(types))
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # What NumPy does not convert it says as any of these.
                with contextlib.suppress(ValueError, TypeError, RuntimeError):
                    arrays[name] = array.astype(type_)
        elif what == "shape":
            changes = [
                np.expand_dims(array, 0),
                array.reshape(-1),
                array.reshape(1, -1),
            ]
            if array.ndim:
                changes += [array[:0], array[..., :-1], array.T]
                changes += [np.concatenate([array, array])]
            arrays[name] = draw(st.sampled_from(changes))
        else:
            others = [np.float32(1), np.array([]), np.array("x"), np.zeros((2, 3, 4))]
            arrays[name] = draw(st.sampled_from(others))
    data = npz_of(arrays, packing)
    return draw(changed_bytes(data)) if draw(st.booleans()) else data


@functools.cache
def predictions_arrays():
    rng = np.random.default_rng(0)
    logs = np.log(rng.dirichlet(np.ones(6), (2, 4))).astype(np.float32)
    thumbnails = rng.integers(0, 256, (4, 4, 4, 3), np.uint8)
    predictions = Predictions(
        *(logs[0], logs[1], 10, np.arange(4), tuple("abcdef"), "four pictures"),
        thumbnails,
    )
    return {k: np.asarray(v) for k, v in vars(predictions).items()}


@inputs(long=10_000)
@given(npz_files(predictions_arrays()))
def test_predictions(place, data):
    path = place / "predictions.npz"
    path.write_bytes(data)
    read = functools.partial(load_predictions, path)
    found = read_or_refused("predictions.npz", read, path, (PredictionsError,))
    if found is None:
        return
    shape = len(found.labels), len(found.class_names)
    assert found.centre.shape == shape and found.best.shape == shape
    assert 0 <= found.labels.min() <= found.labels.max() < shape[1]
    assert np.isfinite(found.best).all()
    np.testing.assert_allclose(np.exp(found.best).sum(axis=1), 1, atol=0.002)
    assert found.num_views == 1 if found.views is None else found.num_views in (9, 10)


def test_errors_of_predictions_that_were_read(place):
    """What has been read can be computed with."""
    path = place / "whole.npz"
    path.write_bytes(npz_of(predictions_arrays()))
    assert set(errors(load_predictions(path))) >= {"loss", "views_top1_error"}


@functools.cache
def index_arrays():
    rng = np.random.default_rng(0)
    index = Index(
        features=rng.normal(size=(5, 8)).astype(np.float32),
        pixels=rng.integers(0, 256, (5, 3 * PIXELS**2)).astype(np.uint8),
        labels=np.array([0, 1, 2, 0, 1], np.int32),
        class_names=("a", "b", "c"),
        probe=rng.normal(size=8).astype(np.float32),
        layer="fc7",
        source="fake",
        split="train",
    )
    return {k: np.asarray(v) for k, v in vars(index).items()}


@inputs(long=6_000)
@given(npz_files(index_arrays()))
def test_indexes(place, data):
    path = place / "index.npz"
    path.write_bytes(data)
    read = functools.partial(load_index, path)
    found = read_or_refused("index.npz", read, path, (RetrievalError,))
    if found is not None:
        count, width = found.features.shape
        assert found.pixels.shape == (count, 3 * PIXELS**2)
        assert found.probe.shape == (width,)
        assert np.isfinite(found.probe).all() and np.isfinite(found.features).all()
        assert [found.class_names[k] for k in found.labels]


@functools.cache
def codes_arrays():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 8)).astype(np.float32)
    coder = Coder(
        *(rng.normal(size=s).astype(np.float32) for s in [(8,), (8, 12), (12,)])
    )
    codes = Codes.of(coder, features)
    checksum = np.uint32(codes.checksum)
    return {"packed": codes.packed, "checksum": checksum, **vars(coder)}


@inputs(long=6_000)
@given(npz_files(codes_arrays()))
def test_codes(place, data):
    path = place / "codes.npz"
    path.write_bytes(data)
    read = functools.partial(load_codes, path)
    found = read_or_refused("codes.npz", read, path, (RetrievalError,))
    if found is not None:
        width = len(found.coder.mean)
        assert found.packed.shape[1] == -(-found.coder.bits // 8)
        assert not found.are_of(np.zeros((len(found.packed), width), np.float32))


@functools.cache
def statistics_arrays():
    return {
        "mean_image": np.full((34, 34, 3), 99, np.float32),
        "pca_std_255": np.array([1, 2, 3], np.float32),
        "pca_vectors": np.eye(3, dtype=np.float32),
        "num_examples": np.int64(7),
    }


@inputs(long=7_000)
@given(npz_files(statistics_arrays()))
def test_statistics(place, data):
    path = place / "statistics.npz"
    path.write_bytes(data)
    read = functools.partial(statistics.load, path)
    found = read_or_refused("statistics.npz", read, path, (DataError,))
    if found is not None:
        side = len(found.mean_image)
        assert found.mean_image.shape == (side, side, 3) and found.num_examples >= 1
        assert all(np.isfinite(v).all() for v in vars(found).values())


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (bytes(MORE_SPACE // 32), "would unpack to 134,"),
        (
            npy_that_says(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (10**12,), }".replace(
                    "10**12", "1000000000000"
                ),
                bytes(64),
            ),
            "says that it has 4,000,000,000,000 bytes; it has",
        ),
        (
            npy_that_says(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(64)
            ),
            "says that it has 8 bytes; it has 64",
        ),
        (executed_pickle(), "Object arrays cannot be loaded"),
    ],
    ids=["bomb", "header", "less", "pickle"],
)
def test_memory_is_asked_for_after_sizes_are_compared(place, member, words):
    path = place / "bomb.npz"
    arrays = {**predictions_arrays(), "centre": member}
    path.write_bytes(npz_of(arrays, zipfile.ZIP_DEFLATED))
    with pytest.raises(PredictionsError, match=words):
        load_predictions(path)


# --- text of a workdir --------------------------------------------------------------


def small_config():
    """Of a network that is quickly made, on pictures that are always there."""
    config = common.get_config()
    config.data.source = "fake"
    config.data.image_size, config.data.crop_size = 34, 32
    config.data.batch_size = 8
    config.model.variant, config.model.init = "cifar", "he"
    config.model.width, config.model.num_classes = 1 / 16, 1000
    return config


CONFIG = experiment.as_json(small_config())


@inputs(long=6_000)
@given(changed_json(CONFIG))
def test_configs_of_workdirs(place, data):
    workdir = place / "configs"
    workdir.mkdir(exist_ok=True)
    path = workdir / "config.json"
    path.write_bytes(data)
    read = functools.partial(experiment.read_config, workdir)
    found = read_or_refused("config.json", read, path, (ConfigError,))
    if found is None:
        return
    assert isinstance(found["data"]["batch_size"], int)
    # With its network a config is valid, or refused in words.
    own = experiment.with_network_of(small_config(), workdir)
    with contextlib.suppress(ConfigError):
        experiment.validate(own, devices=False)
        experiment.make_model(own, 10)


@inputs(long=6_000)
@given(changed_json(["a", "b", "größer", "n01440764"]))
def test_class_names(place, data):
    path = place / "classes.json"
    path.write_bytes(data)
    read = functools.partial(experiment.read_class_names, place)
    found = read_or_refused("classes.json", read, path, (ConfigError,))
    assert found is None or all(isinstance(name, str) for name in found)


RECORDS = [
    {"step": 5, "epoch": 0.5, "train/loss": 2.3, "train/top1_error": 0.9, "lr": 0.01}
    | {"images_per_sec": 100.0, "data_wait_frac": 0.1},
    {"step": 10, "epoch": 1.0, "eval/loss": 2.2, "eval/top1_error": 0.8}
    | {"eval/top5_error": 0.5, "eval/count": 100, "eval/views_loss": 2.1}
    | {"eval/views_top1_error": 0.7, "eval/views_top5_error": 0.4},
    {"step": 15, "epoch": 1.5, "train/loss": None},
]


@st.composite
def changed_lines(draw, lines) -> bytes:
    texts = [json.dumps(line).encode() for line in lines]
    at = draw(st.integers(0, len(lines) - 1))
    texts[at] = draw(changed_json(lines[at]))
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\x0b", b""]))
    return end.join(texts) + end


@inputs(long=7_000)
@given(changed_lines(RECORDS), st.integers(0, 2))
def test_records(place, data, times):
    path = place / "metrics.jsonl"
    path.write_bytes(data)
    read = functools.partial(read_metrics, path)
    found = read_or_refused("metrics.jsonl", read, path, (ValueError,))
    if found is None:
        return
    assert all(isinstance(v, int | float) for r in found for v in r.values())
    report._errors_in_words(found, top5=True)
    starts = [findings.Times(0, 2**62, {"total": 9.0, "training": 5.0})] * times
    config = {"data": {"batch_size": 8, "eval_split": ""}}
    config |= {"num_epochs": 2.0, "eval_views": 10}
    run = findings.Run(
        *(place, config, found, starts, 0, {}, [], [*"abcdef"], None),
    )
    report_page._headline(run)
    findings.time_spent(run)
    assert run.training_pictures is None or run.training_pictures >= 0


TIMES = [
    {"first_step": 0, "last_step": 10, "seconds": {"total": 9.5, "training": 7.0}},
    {"first_step": 10, "last_step": 20, "seconds": {"total": 8, "compiling": 1.5}},
]


@inputs(long=6_000)
@given(changed_lines(TIMES))
def test_times(place, data):
    path = place / "times.jsonl"
    path.write_bytes(data)
    found = read_or_refused("times.jsonl", lambda: read_times(path), path, ())
    assert found is not None
    run = findings.Run(
        *(place, {"data": {"batch_size": 8}}, [], found, 0, {}, [], [], None)
    )
    spent = findings.time_spent(run)
    assert spent.total is None or 0 <= spent.total
    assert all(part.seconds >= 0 for part in spent.parts)
    assert spent.unrecorded_steps >= 0


# --- checkpoints --------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(place):
    """A workdir with one checkpoint, as training leaves it."""
    workdir = place / "run"
    config = small_config()
    settings = experiment.model_settings(config, 10)
    state = {"step": np.int32(3), **_variables(settings, 32)}
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        checkpoints.save(
            *(3, jax.tree.map(jax.numpy.asarray, state)),
            metadata={"config": CONFIG, "versions": {"jax": "0"}},
            top1_error=0.5,
        )
    experiment.write_config(workdir, config)
    experiment.write_class_names(workdir, [f"class {k}" for k in range(10)])
    statistics.Statistics(**statistics_arrays()).save(workdir / "statistics.npz")
    return workdir


def test_the_whole_run_is_read(whole_run):
    weights = experiment.read_network(whole_run)
    check_weights(weights)
    assert weights.settings["num_classes"] == 10


def signed(step: Path, changes=None) -> None:
    """A manifest that matches the files of a step, whatever they are."""
    names = [p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()]
    files = {}
    for name in sorted(set(names) - {MANIFEST}):
        data = (step / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        files[name] = {"sha256": digest, "size": len(data)}
    body = {"files": files, "format": 1, "top1_error": 0.5}
    write_manifest(step, body if changes is None else changes(body))


def write_manifest(step: Path, body) -> None:
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        body = body | {"sha256": digest}
    text = json.dumps(body, indent=1, sort_keys=True)
    (step / MANIFEST).write_text(text)


@inputs(long=3_000, short=25)
@given(data=st.data())
def test_manifests(place, whole_run, data):
    """Signed again: a sum in a file that anyone can write proves nothing."""
    folder = place / "manifests"
    step = folder / "3"
    if not step.exists():
        shutil.copytree(whole_run / "checkpoints" / "3", step)
        os.mkfifo(place / "pipe")
    signed(step)
    body = json.loads((step / MANIFEST).read_text())
    if data.draw(st.booleans()):
        names = [
            "../secret",
            "/dev/zero",
            str(place / "pipe"),
            "state",
            "",
            ".",
            "\x00",
        ]
        name = data.draw(st.sampled_from([*names, "x" * 300, "state/../state/d"]))
        size = data.draw(st.sampled_from([0, 1, 10**400, -1]))
        body["files"][name] = {"size": size, "sha256": hashlib.sha256().hexdigest()}
    else:
        body = data.draw(changed_tree(body))
    write_manifest(step, body)
    if data.draw(st.integers(0, 3)) == 0:
        text = (step / MANIFEST).read_bytes()
        (step / MANIFEST).write_bytes(data.draw(changed_bytes(text)))
    saved = _opened(folder)
    found = read_or_refused(
        "manifest.json", lambda: saved.metadata(3), folder, (CheckpointError,)
    )
    saved._problems.clear()
    assert found is None or found["config"] == CONFIG


@functools.cache
def _opened(folder):
    """The same Checkpointer for all: opening one takes longer than all else."""
    return Checkpointer(folder, read_only=True)


@inputs(long=1_000, short=10)
@given(data=st.data())
def test_checkpoints(place, whole_run, data):
    """Any file of a step, its bytes or its JSON, and a manifest that matches it."""
    workdir = place / "copy"
    if workdir.exists():
        shutil.rmtree(workdir)
    shutil.copytree(whole_run, workdir)
    step = workdir / "checkpoints" / "3"
    _harm(data.draw, place, step)
    if data.draw(st.integers(0, 4)):
        signed(step)
    read = functools.partial(experiment.read_network, workdir)
    found = read_or_refused("checkpoint", read, workdir, (CheckpointError,))
    check_weights(found)


def _harm(draw, place, step):
    names = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
    name = draw(st.sampled_from([n for n in names if n.name != MANIFEST]))
    path = step / name
    data = path.read_bytes()
    try:
        tree = json.loads(data)
    except ValueError:
        tree = None
    what = draw(
        st.sampled_from(
            [
                "bytes",
                "bytes",
                "json",
                "json",
                "json",
                "drop",
                "link",
                "pipe",
                "folder",
                "name",
            ]
        )
    )
    if what == "json" and tree is not None:
        path.write_bytes(draw(changed_json(tree)))
    elif what == "drop":
        path.unlink()
    elif what == "link":
        path.unlink()
        targets = ["/dev/zero", "..", str(path), str(place / "secret"), "missing"]
        path.symlink_to(draw(st.sampled_from(targets)))
    elif what == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif what == "folder":
        path.unlink()
        path.mkdir()
    elif what == "name":
        names = ["03", "9" * 200, "-1", "3.0", "4"]
        step.with_name(draw(st.sampled_from(names))).mkdir()
    else:
        path.write_bytes(draw(changed_bytes(data)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../secret", "cannot be read"),
        ("/dev/zero", "cannot be read"),
        ("pipe", "is neither a file nor a folder"),
        ("endless", "is neither a file nor a folder"),
    ],
)
def test_a_manifest_opens_only_what_lies_in_its_step(place, whole_run, name, words):
    """Not even to compare it: /dev/zero has no end, and a pipe none either."""
    folder = place / "links"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole_run / "checkpoints", folder)
    (folder / "secret").write_bytes(b"")
    if name == "pipe":
        os.mkfifo(folder / "3" / "pipe")
    if name == "endless":
        (folder / "3" / "endless").symlink_to("/dev/zero")
    entry = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    signed(folder / "3", lambda body: body["files"].update({name: entry}) or body)
    with (
        Checkpointer(folder, read_only=True) as saved,
        _in_time(),
        pytest.raises(CheckpointError, match=f"'{name}' {words}"),
    ):
        saved.metadata(3)


def test_arrays_far_larger_than_their_files_are_refused(place, whole_run):
    """Zeros take nearly no room on the disk."""
    folder = place / "zeros"
    zeros = {"kernel": jax.numpy.zeros((2**12, 2**13))}
    with Checkpointer(folder) as saved:
        saved.save(1, {"params": zeros}, metadata={})
        with pytest.raises(CheckpointError, match="would unpack to 134,217,728 bytes"):
            saved.restore_params()


# --- archives and records of pictures -----------------------------------------------


def tar_of(files) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


@functools.cache
def archives() -> tuple[bytes, bytes]:
    """Tiny ones of ILSVRC-2012's layout."""
    wnids = classes.wnids()[:2]
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": b"picture" for i in range(2)})
        for wnid in wnids
    }
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 4)]
    return tar_of(inner), tar_of(dict.fromkeys(names, b"picture"))


@st.composite
def changed_tars(draw, whole: bytes) -> bytes:
    """Headers changed, mostly with a checksum that is right again."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(whole))
    data = bytearray(whole)
    places = [
        at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"
    ]
    at = draw(st.sampled_from(places))
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100)}
    start, size = fields[
        draw(st.sampled_from(["name", "size", "size", "type", "link"]))
    ]
    values = [
        *(b"77777777777\0", b"00000000000\0", b"\x80" + b"\0" * 7 + b"\x7f" * 4),
        *(
            b"\xff" * 12,
            b"-0000000001\0",
            b"x" * 12,
            b"L",
            b"x",
            b"g",
            b"S",
            b"1",
            b"5",
        ),
        *(b"../../../etc/passwd\0", b"K", b"V", b"\xff\xfe", b"7"),
    ]
    value = draw(st.sampled_from(values))[:size]
    data[at + start : at + start + len(value)] = value
    header = bytearray(data[at : at + 512])
    header[148:156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


@inputs(long=4_000)
@given(data=st.data())
def test_archives(place, data):
    source = place / "archives"
    source.mkdir(exist_ok=True)
    train, validation = archives()
    if data.draw(st.booleans()):
        train = data.draw(changed_tars(train))
    else:
        validation = data.draw(changed_tars(validation))
    (source / originals.ARCHIVES["train"]).write_bytes(train)
    (source / originals.ARCHIVES["validation"]).write_bytes(validation)
    read = functools.partial(originals.find, source)
    found = read_or_refused("archives of pictures", read, source, (DataError,))
    for split in found.values() if found else ():
        for i in range(len(split)):
            with contextlib.suppress(OSError):
                split.read(i)


@functools.cache
def examples() -> list[bytes]:
    """Records as tfds keeps them."""
    from alexnet_jax.data.sources import example_message

    wnid = classes.wnids()[0]
    found = []
    for i in range(3):
        message = example_message()()
        features = message.features.feature
        features["label"].int64_list.value.append(0)
        features["file_name"].bytes_list.value.append(f"{wnid}_{i}.JPEG".encode())
        features["image"].bytes_list.value.append(b"picture")
        found.append(message.SerializeToString())
    return found


def _originals(path, kind, offsets, sizes) -> originals.Originals:
    count = len(offsets)
    return originals.Originals(
        *("records", kind, (str(path),), np.zeros(count, np.int32)),
        *(np.array([b"x"] * count), np.array(offsets), np.array(sizes)),
        np.full(count, -1, np.int16),
    )


@inputs(long=4_000)
@given(data=st.data())
def test_tfrecords(place, data):
    path = place / "x.tfrecord"
    records_ = [*examples()]
    at = data.draw(st.integers(0, 2))
    if data.draw(st.booleans()):
        records_[at] = data.draw(changed_bytes(records_[at]))
    whole = b"".join(
        struct.pack("<Q", len(r)) + bytes(4) + r + bytes(4) for r in records_
    )
    if data.draw(st.booleans()):
        whole = data.draw(changed_bytes(whole))
    path.write_bytes(whole)
    read = functools.partial(originals._tfrecord_spans, path)
    spans = read_or_refused("tfrecord", read, path, (DataError,))
    if spans:
        table = _originals(path, "tfrecord", *zip(*spans, strict=True))
        for i in range(len(table)):
            with _in_time(), contextlib.suppress(OSError, DataError):
                table.read(i)


@functools.cache
def array_record(folder: Path) -> bytes:
    from array_record.python import array_record_module

    path = folder / "whole.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in examples():
        writer.write(record)
    writer.close()
    return path.read_bytes()


@inputs(long=3_000)
@given(data=st.data())
def test_array_records(place, data):
    path = place / "x.array_record"
    path.write_bytes(data.draw(changed_bytes(array_record(place))))
    originals._reader.cache_clear()
    table = _originals(path, "array_record", [0, 1, 2], [1, 1, 1])
    at = data.draw(st.integers(0, 2))
    read_or_refused("array_record", lambda: table.read(at), "", (OSError, DataError))


@functools.cache
def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
    found = []
    for mode, kinds in (
        ("RGB", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "ICO"]),
        ("CMYK", ["JPEG", "TIFF"]),
        ("L", ["JPEG", "PNG"]),
        ("P", ["PNG", "GIF"]),
        ("I;16", ["PNG"]),
        ("RGBA", ["PNG", "WEBP"]),
    ):
        for kind in kinds:
            file = io.BytesIO()
            picture.convert("L" if mode == "I;16" else mode).convert(mode).save(
                file, kind
            )
            found.append(file.getvalue())
    return found


@inputs(long=10_000, short=40)
@given(data=st.data())
def test_pictures(data):
    whole = data.draw(st.sampled_from(pictures()))
    changed = data.draw(changed_bytes(whole))
    read = functools.partial(images.decode, changed, 16, "picture.jpg")
    found = read_or_refused("pictures", read, "picture.jpg", (DataError,))
    if found is not None:
        assert found.shape == (16, 16, 3) and found.dtype == np.uint8


# --- files that never end --------------------------------------------------------------


@pytest.mark.parametrize(
    "name, read",
    [
        ("config.json", experiment.read_config),
        ("classes.json", experiment.read_class_names),
        ("checkpoints/3/manifest.json", experiment.load),
        ("statistics.npz", experiment.load),
        ("metrics.jsonl", lambda run: read_metrics(run / "metrics.jsonl")),
        ("times.jsonl", lambda run: read_times(run / "times.jsonl")),
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_not_read(name, read, make, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    make(run / name)
    with pytest.raises((ValueError, CheckpointError), match="no regular file"):
        read(run)


# --- no code from files -------------------------------------------------------------

PICKLES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"),
    *("joblib", "jsonpickle", "pandas"),
}
RUN_OR_UNPACK = {"extract", "extractall", "unpack_archive"}
SHIPPED = sorted(
    path
    for folder in ("alexnet_jax", "configs", "launch", "benchmarks", "notebooks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".ipynb")
)


def code_of(path: Path) -> str:
    """A module's text, or that of a notebook's cells without lines for the shell."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    lines = (
        line
        for cell in cells
        if cell["cell_type"] == "code"
        for line in "".join(cell["source"]).splitlines()
    )
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def dangers(code: str) -> list[str]:
    """What in a module could run code that it reads, or put files anywhere."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in PICKLES:
                found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _dangerous_call(node)
    return found


def _dangerous_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    keywords = {
        k.arg: k.value.value if isinstance(k.value, ast.Constant) else "unknown"
        for k in node.keywords
    }
    found = []
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        found.append(name)
    if last in RUN_OR_UNPACK or name in ("yaml.load", "yaml.unsafe_load"):
        found.append(name)
    if keywords.get("allow_pickle", False) is not False:
        found.append(f"{name}(allow_pickle)")
    if keywords.get("shell", False) is not False:
        found.append(f"{name}(shell)")
    if (
        name in ("torch.load", "torch.hub.load")
        and keywords.get("weights_only") is not True
    ):
        found.append(name)
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_reads_what_can_run(path):
    assert dangers(code_of(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import joblib.numpy_pickle",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=wanted)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(file)",
        "subprocess.run(line, shell=True)",
        "archive.extractall(folder)",
        "tar.extract(member)",
    ],
)
def test_what_can_run_would_be_found(code):
    assert dangers(code)
    assert not dangers("net.eval(); torch.load(p, weights_only=True); re.compile('x')")
