"""Writes a trained network for other programs, and reads theirs.

python -m alexnet_jax.export --workdir=DIR --out=FILE.safetensors
python -m alexnet_jax.export --workdir=DIR --out=FILE.safetensors --names=torchvision
python -m alexnet_jax.export --workdir=DIR --out=FILE.onnx

DIR is the workdir of a run, or a file of weights: .safetensors, .pth, .caffemodel (with
--variant=caffe or caffenet if it does not say which).

.safetensors: weights, settings, mean and class names, for `alexnet_jax.load(FILE)`;
with --names=torchvision (variant owt) for torchvision's AlexNet. .onnx: the input
`images` is float32 [batch, 3, side, side], RGB from 0 to 255, the central view of a
picture; the mean is subtracted inside. The output is `logits` [batch, classes].
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax import pretrained, signals, variants
from alexnet_jax.data.paths import path_argument, require_writable_file
from alexnet_jax.experiment import read_network
from alexnet_jax.pictures import exit_status
from alexnet_jax.pretrained.torchvision import VARIANT

SUFFIXES = (".safetensors", ".onnx")


def export(
    source: Path,
    out: Path,
    *,
    names: str = "alexnet_jax",
    step: int | None = None,
    variant: str | None = None,
) -> None:
    """Writes the network of a workdir, or of a file of weights, to `out`.

    Args:
      source: of what `experiment.load` takes.
      out: `.safetensors` or `.onnx`; its folder is made.
      names: of `.safetensors`, see `pretrained.save_safetensors`.
      step, variant: as `experiment.load`.

    Raises:
      WeightsError: for another suffix, or what cannot be written in that form.
      PathError: (an OSError) `out` cannot be written.
      FileNotFoundError, CheckpointError: as `experiment.load`.
    """
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise pretrained.WeightsError(
            f"--out={out} must end in {' or '.join(SUFFIXES)}."
        )
    if suffix == ".onnx" and names != "alexnet_jax":
        raise pretrained.WeightsError(f"--names={names} is of .safetensors, not {out}.")
    require_writable_file(out)
    weights = read_network(source, step=step, variant=variant)
    if names == "torchvision":
        _require_full_width(source, weights)
    if suffix == ".safetensors":
        pretrained.save_safetensors(out, weights, names=names)
        return
    pretrained.export_onnx(
        out,
        weights.make_model(),
        weights.variables,
        mean=weights.mean,
        crop_size=weights.crop_size,
        class_names=weights.class_names,
    )


def _require_full_width(source: Path, weights: pretrained.Weights) -> None:
    """Raises WeightsError for layers that torchvision's AlexNet has in another width."""
    network = weights.make_model().network
    own = {row.name: row.features for row in network.layers[:-1]}
    table = {row.name: row.features for row in variants.get(VARIANT).layers[:-1]}
    if network.name == VARIANT and own != table:
        raise pretrained.WeightsError(
            f"{source} has {', '.join(map(str, own.values()))} features a layer; "
            f"torchvision's AlexNet has {', '.join(map(str, table.values()))} and could "
            "not read them. Leave --names out: alexnet_jax.load reads any width."
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m alexnet_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--workdir",
        type=path_argument,
        required=True,
        help="folder of a run, or a file",
    )
    made.add_argument("--out", type=path_argument, required=True, metavar="FILE")
    made.add_argument("--names", choices=pretrained.NAMES, default=pretrained.NAMES[0])
    made.add_argument("--step", type=int, help="which checkpoint; else the best")
    made.add_argument("--variant", help="of a file that does not say it")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(argv)
    return exit_status(lambda: _export(options))


def _export(options: argparse.Namespace) -> bool:
    export(
        options.workdir,
        options.out,
        names=options.names,
        step=options.step,
        variant=options.variant,
    )
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:,.1f} MB)")
    return True


if __name__ == "__main__":
    signals.run(main)
