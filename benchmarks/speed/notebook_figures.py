"""Run the notebooks and keep the figures that the README shows.

    python -m benchmarks.speed.notebook_figures --out=benchmarks/results/notebooks

A code cell whose metadata has {"figure": "lrn.png"} makes that file. Notebooks that name
none are not run. A name that ends in .jpg is for a figure of photographs.
"""

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "notebooks"


def named_figures(notebook: Any) -> dict[str, Any]:
    """Return the cells that make a figure, by file name."""
    cells = [cell for cell in notebook.cells if "figure" in cell.metadata]
    return {cell.metadata["figure"]: cell for cell in cells}


def images(cell: Any) -> list[bytes]:
    """Return the PNG files among the outputs of a cell that was run."""
    found = [out["data"] for out in cell.outputs if "data" in out]
    return [base64.b64decode(data["image/png"]) for data in found if "image/png" in data]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of figures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        figures = named_figures(notebook)
        if not figures:
            continue
        print(f"running {path.name} ...", flush=True)
        resources = {"metadata": {"path": str(path.parent)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
        for name, cell in figures.items():
            [png] = images(cell)
            image = Image.open(io.BytesIO(png)).convert("RGB")
            image.save(options.out / name, quality=75, optimize=True)
            size = (options.out / name).stat().st_size
            print(f"wrote {options.out / name} ({size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
