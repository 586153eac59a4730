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

from alexnet_jax.models.weights import WeightsError
from alexnet_jax.models.weights.safetensors import save_safetensors
from alexnet_jax.system import signals
from alexnet_jax.system.cli import exit_status, path_argument, require_writable_file
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.load import read_network


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=path_argument, required=True, help="folder of a run, or a file")
    add("--out", type=path_argument, required=True, metavar="FILE")
    add("--names", choices=["alexnet_jax", "torchvision"], default="alexnet_jax")
    add("--step", type=int, help="which checkpoint; else the best")
    add("--variant", help="of a file that does not name its network")
    options = parser.parse_args(argv)
    return exit_status(lambda: _export(options), CheckpointError)


def _export(options: argparse.Namespace) -> bool:
    out, suffix = options.out, options.out.suffix.lower()
    if suffix not in (".safetensors", ".onnx"):
        raise WeightsError(f"--out={out} must end in .safetensors or .onnx.")
    if suffix == ".onnx" and options.names != "alexnet_jax":
        raise WeightsError(f"--names={options.names} is for .safetensors; got --out={out}.")
    require_writable_file(out)
    weights = read_network(options.workdir, step=options.step, variant=options.variant)
    width = weights.settings.get("width") or 1.0
    if options.names == "torchvision" and width != 1:
        raise WeightsError(
            f"{options.workdir} has layers of width {width:g}, which torchvision's AlexNet could "
            "not read. Leave --names out: alexnet_jax.load reads any width."
        )
    if suffix == ".safetensors":
        save_safetensors(out, weights, names=options.names)
    else:
        try:
            from alexnet_jax.models.weights.onnx import export_onnx
        except ImportError as error:
            raise WeightsError(
                'writing ONNX needs onnx: pip install "alexnet_jax[onnx]", or onnx itself.'
            ) from error
        export_onnx(out, weights)
    print(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")
    return True


if __name__ == "__main__":
    signals.run(main)
