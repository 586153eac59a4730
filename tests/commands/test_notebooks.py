"""The notebooks run from top to bottom, and their numbers hold."""

import os
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.speed.notebook_figures import RESULTS, images, named_figures

ROOT = Path(__file__).parents[2]
NAMES = (
    "01_quickstart",
    "02_lrn_and_pooling",
    "03_two_columns",
    "04_retrieval",
    "05_your_own_loop",
)
MACHINE_PATH = re.compile(r"(?<![\w.])(/(home|root|Users|tmp|mnt|work|opt)/|[A-Z]:\\\\)")


def read(name):
    import nbformat

    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_committed_without_outputs(name):
    import nbformat

    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert not MACHINE_PATH.search(cell.source), cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
            assert set(cell.metadata) <= {"figure"}, cell.id
            assert len(cell.source.splitlines()) <= 20, cell.id


def test_stored_figures_match_the_notebooks():
    named = [file for name in NAMES for file in named_figures(read(name))]
    assert sorted(named) == sorted(path.name for path in RESULTS.iterdir())
    assert all((RESULTS / file).stat().st_size < 150_000 for file in named)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a clone without trained runs; a run stays for the notebooks that follow."""
    root = tmp_path_factory.mktemp("clone")
    for folder in ("configs", "notebooks"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "installed").mkdir()
    (root / "installed" / "alexnet_jax").symlink_to(ROOT / "alexnet_jax")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, clone):
    import nbclient

    notebook = read(name)
    env = os.environ | {
        "PYTHONPATH": str(clone / "installed"),  # the package alone, as pip does
        "TFDS_DATA_DIR": str(clone / "data"),
        "IPYTHONDIR": str(clone / "ipython"),
        "JAX_PLATFORMS": "cpu",
    }
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": clone / "notebooks"}}
    )
    client.execute(env=env)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        if cell.id.endswith("-figure"):
            assert len(images(cell)) == 1, cell.id
    said = {cell.id: "".join(out.get("text", "") for out in cell.outputs) for cell in code}
    CONCLUSIONS[name](said)


def quickstart_holds(said):
    assert re.search(r"total +60,965,224 +724,406,816", said["create"])
    assert "cifar from" in said["train"]  # nothing was there: trained here


def lrn_and_pooling_hold(said):
    apart = [float(x) for x in re.findall(r"difference (\S+) of", said["loop"])]
    assert len(apart) == 2 and max(apart) < 1e-4
    assert "largest at a = 200; formula 200.0" in said["peak"]
    assert "largest at a = 90; formula 89.4" in said["peak"]


def two_columns_hold(said):
    apart = [
        re.search(r"apart by (?:at most )?(\S+)\n", said[cell]) for cell in ("logits", "same-step")
    ]
    assert all(found and float(found[1]) < 1e-12 for found in apart)
    assert said["exchanges"].count("all-gather") == 3
    assert said["exchanges"].count("reduce-scatter") == 3
    assert "{'conv3': '21,632', 'fc6': '4,608', 'fc7': '2,048'}" in said["shards"]
    assert "243.9 MB" in said["data-parallel"]


def retrieval_holds(said):
    shares = re.findall(r"(\S.*?) +nearest (\d+)%, of ten (\d+)%", said["share-figure"])
    trained, pixels, new = ((int(one), int(ten)) for _, one, ten in shares)
    assert min(trained) > 60 and max(*pixels, *new) < 35  # chance is 10


def own_loop_holds(said):
    last, average = map(int, re.findall(r": (\d+)% of 100 unseen", said["evaluate"]))
    assert 30 < last < average


CONCLUSIONS = dict(
    zip(
        NAMES,
        (quickstart_holds, lrn_and_pooling_hold, two_columns_hold, retrieval_holds, own_loop_holds),
        strict=True,
    )
)
