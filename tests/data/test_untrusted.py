"""Files from anywhere run no code."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from alexnet_jax.analysis.codes import load_codes
from alexnet_jax.analysis.retrieval import load_index
from alexnet_jax.data import statistics
from alexnet_jax.models.weights import WeightsError, read_weights
from alexnet_jax.training.evaluate import load_predictions

ROOT = Path(__file__).parents[2]


class Payload:
    """Write a file when unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("in_a_zip", [True, False])
def test_pickled_code_in_a_pth_does_not_run(in_a_zip, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    state = {"features.0.weight": Payload(canary)}
    torch.save(state, path, _use_new_zipfile_serialization=in_a_zip)
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        read_weights(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the payload does run if it is allowed to
    assert canary.exists()


@pytest.mark.parametrize("read", [statistics.load, load_predictions, load_index, load_codes])
def test_pickled_objects_in_an_npz_are_refused(read, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "arrays.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mean_image", "labels", "features", "mean", "centre", "kernel"):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.array([Payload(canary)], object))
    with pytest.raises(ValueError, match=r"arrays\.npz"):
        read(path)
    assert not canary.exists()


# Calls and imports that could run code that a module reads, or put files anywhere.
DANGERS = re.compile(
    r"\b(import|from) (c?pickle|dill|cloudpickle|marshal|shelve|joblib|pandas)\b"
    r"|(?<![\w.])(eval|exec|__import__|os\.system|os\.popen)\("
    r"|yaml\.(unsafe_)?load\(|\.extract(all)?\(|unpack_archive\("
    r"|allow_pickle=(?!False)|shell=(?!False)"
    r"|torch\.(hub\.)?load\((?![^)]*weights_only=True)"
)
DANGEROUS_LINES = """from pickle import loads
import joblib.numpy_pickle
eval(text)
np.load(path, allow_pickle=wanted)
torch.load(path)
torch.load(path, weights_only=False)
subprocess.run(line, shell=True)
archive.extractall(folder)"""


def test_no_module_runs_code_from_files():
    for line in DANGEROUS_LINES.splitlines():
        assert DANGERS.search(line)
    assert not DANGERS.search("net.eval(); torch.load(p, weights_only=True)")
    found = {
        path: match[0]
        for folder in ("alexnet_jax", "configs", "launch", "benchmarks", "notebooks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".ipynb") and (match := DANGERS.search(path.read_text()))
    }
    assert found == {}
