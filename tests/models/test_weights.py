"""Our own `.safetensors`, the command `export`, and files that cannot be used."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from PIL import Image
from safetensors.numpy import load_file, save_file

from alexnet_jax import export, load
from alexnet_jax.models.weights import SUFFIXES, Weights, WeightsError, read_weights
from alexnet_jax.models.weights.safetensors import save_safetensors
from tests.models import networks


def test_torchvision_has_no_lrn(tmp_path):
    weights = networks.random_weights(variant="owt", width=1 / 16, lrn=True)
    with pytest.raises(WeightsError, match="no network like variant owt with lrn chang"):
        save_safetensors(tmp_path / "x.safetensors", weights, names="torchvision")


def own_weights(**changes) -> Weights:
    mean = networks.raw_images("random", 32)[0].astype(np.float32)
    settings = {"variant": "cifar", "num_classes": 3, "width": 0.25, **changes}
    return networks.random_weights(mean=mean, class_names=("cat", "dog", "größer"), **settings)


def test_own_safetensors_hold_all_that_load_returns(tmp_path):
    weights = own_weights(normalization="batch", skip=["conv3"], dtype="bfloat16")
    path = tmp_path / "net.safetensors"
    save_safetensors(path, weights)
    found = read_weights(path, variant="cifar")
    assert found.class_names == weights.class_names
    np.testing.assert_array_equal(found.mean, weights.mean)
    assert "batch_stats" in found.variables
    networks.assert_same_weights(found, weights)
    model, variables, preprocess = load(path)
    assert model == weights.make_model()
    raw = networks.raw_images("random", 32)[1]
    batch = raw.astype(np.float32)[None] - weights.mean
    np.testing.assert_array_equal(preprocess(Image.fromarray(raw)), batch)
    jax.tree.map(np.testing.assert_array_equal, variables, weights.variables)
    # A mean colour is subtracted everywhere.
    save_safetensors(path, dataclasses.replace(weights, mean=networks.MEAN))
    _, _, preprocess = load(path)
    np.testing.assert_array_equal(preprocess(raw), (raw - networks.MEAN)[None])


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


def test_run_exports_to_safetensors_and_these_to_onnx(workdir, tmp_path, capsys):
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
    raw = networks.raw_images("random", weights.image_size)[0]
    image = preprocess(raw)
    np.testing.assert_array_equal(prepare(raw), image)
    start = (weights.image_size - weights.crop_size) // 2
    centre = slice(start, start + weights.crop_size)
    (found,) = networks.run_onnx(graph, raw[None, centre, centre])
    wanted = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=networks.TOLERANCE)


def test_mistakes_give_one_line(workdir, tmp_path, tmp_path_factory, capsys):
    names = "--names=torchvision"
    narrow = tmp_path_factory.mktemp("narrow") / "narrow.safetensors"
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


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".h5", ""])
def test_files_of_another_format_are_refused(suffix, tmp_path):
    if suffix.startswith(".p"):
        pytest.importorskip("torch", reason="torch is not installed")
    page = tmp_path / f"page{suffix}"
    networks.refused(page, "there is no such file")
    page.write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
    if suffix in SUFFIXES:
        networks.refused(page, "<!DOCTYPE html>", "Was it downloaded whole?")
    else:
        networks.refused(page, ".caffemodel", f"got {suffix or 'no suffix'}")


def test_wrong_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, own_weights())
    whole, leaves = path.read_bytes(), load_file(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    networks.refused(path, "holds weights of variant cifar; got variant='owt'", variant="owt")
    path.write_bytes(whole[:-5])
    networks.refused(path, "is no .safetensors that can be read", "not fully covered")
    save_file(leaves, path)
    networks.refused(path, "written neither by alexnet_jax nor from torchvision's", "params/")
    save_file({f"{who}.classifier.6.bias": networks.MEAN for who in ("model", "ema")}, path)
    networks.refused(path, "holds both 'ema.classifier.6.bias' and 'model.classifier.6.bias' for")
    kernel = "params/conv2/kernel"
    left = {k: v for k, v in leaves.items() if k not in (kernel, "mean")}
    for tensors, words in (
        (left, f"variant cifar: missing {kernel}, mean."),
        (leaves | {"more": networks.MEAN}, "unexpected more."),
        (leaves | {"mean": networks.MEAN[:2]}, "of another shape mean [2] instead of [3]."),
    ):
        save_file(tensors, path, metadata)
        networks.refused(path, words)
    record = json.loads(metadata["alexnet_jax"])
    for change, words in (
        ({"version": 2}, "expected version 1"),
        ({"settings": {"variant": "cifar", "depth": 5}}, "'depth'"),
    ):
        save_file(leaves, path, {"alexnet_jax": json.dumps(record | change)})
        networks.refused(path, "metadata 'alexnet_jax' cannot be used", words)


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    for package in ("torch", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "alexnet_jax.models.weights.onnx", raising=False)
    pth, own = tmp_path / "x.pth", tmp_path / "x.safetensors"
    pth.touch()
    networks.refused(pth, "needs torch: pip install")
    save_safetensors(own, own_weights())
    assert export.main([f"--workdir={own}", f"--out={tmp_path / 'x.onnx'}"]) == 1
    assert "needs onnx: pip install" in capsys.readouterr().err
