"""Prepare data once, before training, and check it.

python -m alexnet_jax.prepare imagenet --source=DIR --data_dir=DIR
    [--workers=N] [--max_unreadable=10] [--verify]
    Make the tfds data set imagenet2012_256 from ILSVRC2012_img_train.tar and
    ILSVRC2012_img_val.tar (or from class folders, or a prepared tfds imagenet2012) in
    --source, with its mean image and colour PCA. Started again it resumes.

python -m alexnet_jax.prepare check [--source=imagenet2012_256] [--data_dir=DIR]
    [--split=train] [--eval_split=validation] [--out=contact_sheet.png] [--partial]
    Check counts, labels, order, shuffling, pixel values and statistics of a data set and
    look for images that are in both splits; draw some of it. The exit status is 1 if
    something is wrong. Every file or record is read once.

python -m alexnet_jax.prepare textures [--data_dir=DIR]
    Draw the embedded data set now instead of at its first use.

python -m alexnet_jax.prepare statistics --source=folder:PATH [--data_dir=DIR]
    [--split=train] [--image_size=256] [--max_examples=N]
    Compute the mean image and the colour PCA and store them beside the data.
"""

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from alexnet_jax.data import (
    DataError,
    match_classes,
    open_source,
    sources,
    statistics,
    warnings_about,
)
from alexnet_jax.data.sources.tfds import tfds_data_dir
from alexnet_jax.system import signals
from alexnet_jax.system.cli import (
    exit_status,
    expanded,
    progress,
    require_writable,
    require_writable_file,
)
from alexnet_jax.system.files import atomic_write

_say = functools.partial(print, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help shows all)")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--source", help="folder of images, or name of a data set; see the command")
    add("--data_dir", help="tfds directory; else TFDS_DATA_DIR, ~/tensorflow_datasets")
    add("--split", default="train", help="split to check or to compute statistics of")
    add("--eval_split", default="validation", help="second split to check; empty: none")
    add("--out", type=Path, default="contact_sheet.png", help="figure that check draws")
    add("--image_size", type=_count, default=256, help="side of the images")
    add("--max_examples", type=_count, help="use so many images, evenly spread")
    add("--max_unreadable", type=int, default=10, help="broken images to leave out")
    add("--workers", type=_count, default=os.cpu_count() or 1, help="processes or threads")
    add("--verify", action="store_true", help="compare the MD5 of the archives first")
    add("--partial", action="store_true", help="accept less than all of ImageNet")
    return parser.parse_args(argv)


def _imagenet(options: argparse.Namespace) -> bool:
    from alexnet_jax.data.imagenet import preparation

    if not options.source:
        raise ValueError("--source is missing. Name the folder with the ImageNet archives")
    data_dir = tfds_data_dir(options.data_dir)
    preparation.prepare(
        expanded(options.source).absolute(),
        data_dir.absolute(),
        workers=options.workers,
        max_unreadable=options.max_unreadable,
        verify=options.verify,
        log=_say,
    )
    _say("look at it before training:")
    _say(f"  python -m alexnet_jax.prepare check --data_dir={data_dir}")
    return True


def _open(options: argparse.Namespace, name: str, split: str) -> sources.Source:
    size = options.image_size
    return open_source(name, split, data_dir=options.data_dir, image_size=size)


def _check(options: argparse.Namespace) -> bool:
    from alexnet_jax.analysis.figures import contact_sheet
    from alexnet_jax.data import check

    out = options.out
    if out.suffix not in (".png", ".jpg", ".pdf"):
        raise ValueError(f"--out={out} must be a .png, .jpg or .pdf file")
    require_writable_file(out)
    name = options.source or "imagenet2012_256"
    train, evaluation = _open(options, name, options.split), None
    if options.eval_split:
        evaluation = _open(options, name, options.eval_split)
        with contextlib.suppress(DataError):  # `examine` reports it
            evaluation = match_classes(evaluation, train.class_names)
    for line in warnings_about(train, evaluation):
        _say(line)
    splits: list[check.Split] = []
    for source in filter(None, (train, evaluation)):
        _say(source.description)
        with progress("reading labels and images", source.num_examples, "records") as bar:
            splits.append(check.read_split(source, options.workers, bar))
    levels = []
    for finding in check.examine(*splits, partial=options.partial, workers=options.workers):
        _say(str(finding))
        levels.append(finding.level)
    figure = contact_sheet(train, splits[0].labels, evaluation, splits[-1].labels)
    with atomic_write(out) as file:
        figure.savefig(file, format=out.suffix.removeprefix("."), dpi=110)
    _say(f"look at {out}: each pair must show what its title says")
    wrong = levels.count("WRONG")
    _say(f"{wrong} of {len(levels)} checks failed" if wrong else "all checks passed")
    return not wrong


def _textures(options: argparse.Namespace) -> bool:
    for split in ("train", "test"):
        source = _open(options, "textures", split)
        _say(f"{source.description}: {source.num_examples:,} images")
    return True


def _statistics(options: argparse.Namespace) -> bool:
    if not options.source:
        raise ValueError("--source is missing. Give folder:PATH or the name of a tfds data set")
    source = _open(options, options.source, options.split)
    path = source.statistics_path
    if path is None:
        raise DataError(
            f"--source={options.source} has no folder to keep statistics in. Give folder:PATH or "
            "the name of a tfds data set"
        )
    require_writable(path.parent)  # before the long pass
    count = min(source.num_examples, options.max_examples or source.num_examples)
    _say(f"{source.description}: {count:,} of {source.num_examples:,} images")
    for line in warnings_about(source):
        _say(line)
    started = time.perf_counter()
    with progress("mean image and colour PCA", count, "images") as bar:
        result = statistics.compute(
            source, max_examples=count, workers=options.workers, progress=bar
        )
    result.save(path)
    for what, values in (
        ("mean of R, G, B, 0..255", result.mean_image.mean((0, 1))),
        ("standard deviations along PCA, ascending", result.pca_std_255),
    ):
        _say(f"{what}: {'  '.join(f'{value:.3f}' for value in values)}")
    _say(f"wrote {path} ({time.perf_counter() - started:.0f} s)")
    return True


COMMANDS = {
    "imagenet": _imagenet,
    "check": _check,
    "statistics": _statistics,
    "textures": _textures,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 1 after a user error."""

    def run() -> bool:
        options = _parse(argv)
        return COMMANDS[options.command](options)

    return exit_status(run)


if __name__ == "__main__":
    signals.run(main)
