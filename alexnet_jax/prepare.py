"""Prepares data once, before training, and checks it.

python -m alexnet_jax.prepare imagenet --source=DIR --data_dir=DIR
    [--workers=N] [--max_unreadable=10] [--verify]
    Makes the tfds data set imagenet2012_256 of ILSVRC2012_img_train.tar and
    ILSVRC2012_img_val.tar (or of class folders, or of a prepared tfds imagenet2012)
    in --source, with its mean image and colour PCA. Started again it goes on.

python -m alexnet_jax.prepare check [--source=imagenet2012_256] [--data_dir=DIR]
    [--split=train] [--eval_split=validation] [--out=contact_sheet.png] [--partial]
    Counts, labels, order, shuffling, pixel values and statistics of a data set, images
    that are in both splits, and a picture of it; exit status 1 if something is wrong.
    Every file or record is read once. --partial accepts less than all of ImageNet.

python -m alexnet_jax.prepare textures [--data_dir=DIR]
    Draws the embedded data set now instead of at its first use, and shows that
    neither colours nor a linear function of the pixels can tell its classes.

python -m alexnet_jax.prepare statistics --source=folder:PATH [--data_dir=DIR]
    [--split=train] [--image_size=256] [--max_examples=N]
    Computes the mean image and the colour PCA and stores them beside the data.
"""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from alexnet_jax import signals
from alexnet_jax.data import (
    DataError,
    eval_batches,
    match_classes,
    sources,
    statistics,
)
from alexnet_jax.data.files import replacing
from alexnet_jax.data.paths import expanded, require_writable
from alexnet_jax.writers import progress, show_every_name

# Flags of its own, not absl's global ones: several command lines of this package
# may be imported into one process and use the same names.
FLAGS = flags.FlagValues()


def _define_flags() -> None:
    for name, default, text in (
        ("source", None, "Where the pictures are; see the command."),
        (
            "data_dir",
            None,
            "tfds directory; else TFDS_DATA_DIR, ~/tensorflow_datasets.",
        ),
        ("split", "train", "Split to compute statistics of, or to check."),
        ("eval_split", "validation", "Second split to check; empty: none."),
        ("out", "contact_sheet.png", "Where check draws pictures of the data."),
    ):
        flags.DEFINE_string(name, default, text, flag_values=FLAGS)
    for name, default, text, least in (
        ("image_size", 256, "Side of the pictures in pixels.", 1),
        ("max_examples", None, "Use only as many pictures, evenly spread.", 1),
        ("max_unreadable", 10, "Broken pictures to leave out before giving up.", 0),
        ("workers", os.cpu_count() or 1, "Processes or decoding threads.", 1),
    ):
        flags.DEFINE_integer(name, default, text, least, flag_values=FLAGS)
    for name, text in (
        ("verify", "Compare the archives' MD5 with the official ones first."),
        ("partial", "Fewer pictures than all of ImageNet are no mistake."),
    ):
        flags.DEFINE_boolean(name, False, text, flag_values=FLAGS)
    flags.DEFINE_boolean(
        "help", False, "Show this help.", short_name="h", flag_values=FLAGS
    )


_define_flags()


def _imagenet() -> int:
    from alexnet_jax.data.imagenet import preparation

    if not FLAGS.source:
        raise ValueError("--source is missing: the folder with the ImageNet archives")
    data_dir = sources.tfds_data_dir(FLAGS.data_dir)
    require_writable(data_dir)
    preparation.prepare(
        expanded(FLAGS.source).absolute(),
        data_dir.absolute(),
        workers=FLAGS.workers,
        max_unreadable=FLAGS.max_unreadable,
        verify=FLAGS.verify,
        log=_say,
        bar=progress,
    )
    _say("look at it before training:")
    _say(f"  python -m alexnet_jax.prepare check --data_dir={data_dir}")
    return 0


def _open(name: str, split: str) -> sources.Source:
    """A split of a data set, its pictures of --image_size."""
    return sources.open_source(
        name, split, data_dir=FLAGS.data_dir, image_size=FLAGS.image_size
    )


def _check() -> int:
    from alexnet_jax.analysis import contact_sheet
    from alexnet_jax.data import check

    name = FLAGS.source or "imagenet2012_256"
    out = Path(FLAGS.out)
    if out.suffix not in (".png", ".jpg", ".pdf") or not out.absolute().parent.is_dir():
        raise ValueError(
            f"--out={out} must be a .png, .jpg or .pdf file in a folder that exists"
        )
    if not FLAGS.split:
        raise ValueError("--split is empty: which split is trained on?")
    require_writable(out.absolute().parent)
    train, evaluation = (
        _open(name, split) if split else None
        for split in (FLAGS.split, FLAGS.eval_split)
    )
    assert train is not None  # its split is named
    if evaluation is not None:
        with contextlib.suppress(DataError):  # `examine` says it
            evaluation = match_classes(evaluation, train.class_names)
    findings, labels, hashes = [], [], []
    for source in filter(None, (train, evaluation)):
        _say(source.description)
        if source.left_out:
            _say(f"WARNING: {source.left_out}")
        with progress(
            "reading labels and images", source.num_examples, "records"
        ) as bar:
            of_split = check.read_records(source, FLAGS.workers, bar)
        labels.append(of_split[0])
        hashes.append(of_split[1])
    for finding in check.examine(
        train, evaluation, labels, hashes, partial=FLAGS.partial, workers=FLAGS.workers
    ):
        _say(str(finding))
        findings += [finding.level] if finding.level else []
    figure = contact_sheet(train, labels[0], evaluation, labels[-1])
    with replacing(out) as file:
        figure.savefig(file, format=out.suffix.removeprefix("."), dpi=110)
    _say(f"look at {out}: each pair must show what its title says")
    wrong = findings.count("WRONG")
    _say(f"{wrong} of {len(findings)} checks failed" if wrong else "all checks passed")
    return 1 if wrong else 0


def _textures() -> int:
    from alexnet_jax.data.textures import baselines

    train, test = _features("train"), _features("test")
    print(
        "error by chance 0.900; these must stay near it, both chosen on the test split:"
    )
    for name, error in (
        ("linear in the pixels", baselines.linear_error),
        ("colours only", baselines.color_error),
    ):
        result = error(train[name], train["label"], test[name], test["label"])
        print(f"error, {name:21s} {result:.3f}")
    return 0


def _features(split: str) -> dict[str, np.ndarray]:
    """What the baselines see, gathered in parts: all pictures would take 1 GB."""
    from alexnet_jax.data.textures import baselines

    source = sources.open_source("textures", split, data_dir=FLAGS.data_dir)
    print(f"{source.description}: {source.num_examples:,} pictures")
    parts = []
    with eval_batches(source, batch_size=100, workers=FLAGS.workers) as batches:
        for batch in batches:
            real = batch["mask"] > 0
            images = batch["image"][real]
            parts.append(
                {
                    "linear in the pixels": baselines.pixel_features(images),
                    "colours only": baselines.color_features(images),
                    "label": batch["label"][real],
                }
            )
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def _statistics() -> int:
    if not FLAGS.source:
        raise ValueError("--source is missing: folder:PATH or a tfds data set")
    source = _open(FLAGS.source, FLAGS.split)
    path = statistics.statistics_path(source)
    require_writable(path.parent)  # before the long pass
    count = min(source.num_examples, FLAGS.max_examples or source.num_examples)
    print(f"{source.description}: {count:,} of {source.num_examples:,} pictures")
    if source.left_out:
        print(f"WARNING: {source.left_out}")
    started = time.perf_counter()
    with progress("mean image and colour PCA", count, "pictures") as bar:
        result = statistics.compute(
            source,
            max_examples=FLAGS.max_examples,
            workers=FLAGS.workers,
            progress=bar,
        )
    result.save(path)
    seconds = time.perf_counter() - started
    means = result.mean_image.mean(axis=(0, 1))
    print(f"mean of R, G, B               {_numbers(means)}  (0..255)")
    print(f"standard deviations along PCA {_numbers(result.pca_std_255)}  (ascending)")
    print(f"wrote {path} ({seconds:.0f} s)")
    return 0


def _numbers(values: np.ndarray) -> str:
    return "  ".join(f"{value:7.3f}" for value in values)


def _say(text: str) -> None:
    tqdm.write(text)
    sys.stdout.flush()


COMMANDS: dict[str, Callable[[], int]] = {
    "imagenet": _imagenet,
    "check": _check,
    "statistics": _statistics,
    "textures": _textures,
}


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status, 1 after an error in words."""
    show_every_name()
    warnings.filterwarnings("ignore", module="PIL")  # an error says all that matters
    for name in FLAGS:
        FLAGS[name].unparse()  # back to its default: main may be called again
    try:
        words = FLAGS(argv)[1:]
        if FLAGS.help:
            print(__doc__, FLAGS.main_module_help() or FLAGS.get_help(), sep="\n")
            return 0
        if len(words) != 1 or words[0] not in COMMANDS:
            raise ValueError(
                f"expected one command of {', '.join(COMMANDS)}; got "
                f"{' '.join(words) or 'none'} (--help shows more)"
            )
        return COMMANDS[words[0]]()
    except (flags.Error, ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signals.run(lambda: main(sys.argv))
