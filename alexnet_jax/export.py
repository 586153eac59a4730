"""Write a trained network for other programs, and read theirs.

python -m alexnet_jax.export --workdir=DIR --out=FILE.safetensors
python -m alexnet_jax.export --workdir=DIR --out=FILE.safetensors --names=torchvision
python -m alexnet_jax.export --workdir=DIR --out=FILE.onnx

DIR is the workdir of a run, or a file of weights: .safetensors, .pth or .caffemodel
(with --variant=caffe or caffenet if the file does not name its network).

.safetensors: weights, settings, mean and class names, for `alexnet_jax.load(FILE)`;
with --names=torchvision (variant owt) for torchvision's AlexNet. .onnx: the input
`images` is float32 [batch, 3, side, side], RGB from 0 to 255, the central crop of an
image; the network subtracts the mean. The output is `logits` [batch, classes].
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.models import variants
from alexnet_jax.models import weights as weights_lib
from alexnet_jax.models.weights.torchvision import VARIANT
from alexnet_jax.system import signals
from alexnet_jax.system.cli import exit_status, path_argument, require_writable_file
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.load import read_network

SUFFIXES = (".safetensors", ".onnx")


def export(
    source: Path,
    out: Path,
    *,
    names: str = "alexnet_jax",
    step: int | None = None,
    variant: str | None = None,
) -> None:
    """Write the network of a workdir, or of a file of weights, to `out`.

    Args:
      source: the workdir or file, as for `loading.load`.
      out: a `.safetensors` or `.onnx`; its folder is created.
      names: tensor names of a `.safetensors`, see `weights_lib.save_safetensors`.
      step, variant: as `loading.load`.

    Raises:
      WeightsError: for another suffix, or a network that the format cannot hold.
      PathError: (an OSError) `out` cannot be written.
      FileNotFoundError, CheckpointError: as `loading.load`.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise weights_lib.WeightsError(
            f"--out={out} must end in {' or '.join(SUFFIXES)}."
        )
    if suffix == ".onnx" and names != "alexnet_jax":
        raise weights_lib.WeightsError(
            f"--names={names} is for .safetensors; got --out={out}."
        )
    require_writable_file(out)
    weights = read_network(source, step=step, variant=variant)
    if names == "torchvision":
        _require_full_width(source, weights)
    if suffix == ".safetensors":
        weights_lib.save_safetensors(out, weights, names=names)
        return
    weights_lib.export_onnx(
        out,
        weights.make_model(),
        weights.variables,
        mean=weights.mean,
        crop_size=weights.crop_size,
        class_names=weights.class_names,
    )


def _require_full_width(source: Path, weights: weights_lib.Weights) -> None:
    """Raise WeightsError for layers that torchvision's AlexNet has in another width."""
    network = weights.make_model().network
    own = {row.name: row.features for row in network.layers[:-1]}
    table = {row.name: row.features for row in variants.get(VARIANT).layers[:-1]}
    if network.name == VARIANT and own != table:
        raise weights_lib.WeightsError(
            f"{source} has {', '.join(map(str, own.values()))} features per layer; "
            f"torchvision's AlexNet has {', '.join(map(str, table.values()))} and could "
            "not read them. Leave --names out: alexnet_jax.load reads any width."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="folder of a run, or a file",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE")
    names = weights_lib.NAMES
    parser.add_argument("--names", choices=names, default=names[0])
    parser.add_argument("--step", type=int, help="which checkpoint; else the best")
    parser.add_argument("--variant", help="of a file that does not name its network")
    options = parser.parse_args(argv)

    def run() -> bool:
        out = options.out
        export(
            options.workdir,
            out,
            names=options.names,
            step=options.step,
            variant=options.variant,
        )
        print(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")
        return True

    return exit_status(run, CheckpointError)


if __name__ == "__main__":
    signals.run(main)
