"""Files from anywhere run no code."""

import ast
import json
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
    torch.load(path, weights_only=False)  # else that it did not run would mean nothing
    assert canary.exists()


@pytest.mark.parametrize(
    "read", [statistics.load, load_predictions, load_index, load_codes]
)
def test_pickled_objects_in_an_npz_are_refused(read, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "arrays.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mean_image", "labels", "features", "mean", "centre", "kernel"):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.array([Payload(canary)], object))
    with pytest.raises(ValueError, match=r"arrays\.npz"):
        read(path)
    assert not canary.exists()


# No module reads what can run.

PICKLES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"),
    *("joblib", "jsonpickle", "pandas"),
}
UNPACK = {"extract", "extractall", "unpack_archive"}
RUN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.unsafe_load"),
}
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
    """Return what could run code that a module reads, or put files anywhere."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in PICKLES:
                found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            is_load = name in ("torch.load", "torch.hub.load")
            if (
                name in RUN
                or name.rpartition(".")[2] in UNPACK
                or keywords.get("allow_pickle", "False") != "False"
                or keywords.get("shell", "False") != "False"
                or (is_load and keywords.get("weights_only") != "True")
            ):
                found.append(ast.unparse(node))
    return found


def test_no_module_reads_what_can_run():
    assert {path: found for path in SHIPPED if (found := dangers(code_of(path)))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "eval(text)",
        "np.load(path, allow_pickle=wanted)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(line, shell=True)",
        "archive.extractall(folder)",
    ],
)
def test_code_that_can_run_is_found(code):
    assert dangers(code)
    assert not dangers("net.eval(); torch.load(p, weights_only=True); re.compile('x')")
