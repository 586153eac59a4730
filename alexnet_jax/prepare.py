"""Prepares data once, before training.

python -m alexnet_jax.prepare textures [--data_dir=DIR]
    Draws the embedded data set now instead of at its first use, and shows that
    neither colours nor a linear function of the pixels can tell its classes.

python -m alexnet_jax.prepare statistics --source=folder:PATH [--data_dir=DIR]
    [--split=train] [--image_size=256] [--max_examples=N]
    Computes the mean image and the colour PCA and stores them beside the data.
"""

import os
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from alexnet_jax.data import eval_batches, sources, statistics

# Flags of its own, not absl's global ones: several command lines of this package
# may be imported into one process and use the same names.
FLAGS = flags.FlagValues()


def _define_flags() -> None:
    flags.DEFINE_string(
        "source",
        None,
        "folder:PATH, textures or the name of a tfds data set.",
        flag_values=FLAGS,
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Directory of tfds data sets; default: TFDS_DATA_DIR or ~/tensorflow_datasets.",
        flag_values=FLAGS,
    )
    flags.DEFINE_string(
        "split", "train", "Split to compute statistics of.", flag_values=FLAGS
    )
    for name, default, text in (
        ("image_size", 256, "Side of the pictures in pixels."),
        ("max_examples", None, "Use only as many pictures, evenly spread."),
        ("workers", os.cpu_count() or 1, "Decoding threads."),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=FLAGS)
    flags.DEFINE_boolean(
        "help", False, "Show this help.", short_name="h", flag_values=FLAGS
    )


_define_flags()


def _textures() -> None:
    from alexnet_jax.data.textures import baselines

    print(
        "error by chance 0.900; these must stay near it, both chosen on the test split:"
    )
    train, test = _features("train"), _features("test")
    for name, error in (
        ("linear in the pixels", baselines.linear_error),
        ("colours only", baselines.color_error),
    ):
        result = error(train[name], train["label"], test[name], test["label"])
        print(f"error, {name:21s} {result:.3f}")


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


def _statistics() -> None:
    if not FLAGS.source:
        raise ValueError("--source is missing: folder:PATH or a tfds data set")
    source = sources.open_source(
        FLAGS.source,
        FLAGS.split,
        data_dir=FLAGS.data_dir,
        image_size=FLAGS.image_size,
    )
    path = statistics.statistics_path(source)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission")  # before the long pass
    count = min(source.num_examples, FLAGS.max_examples or source.num_examples)
    print(f"{source.description}: {count:,} of {source.num_examples:,} pictures")
    started = time.perf_counter()
    from tqdm import tqdm

    with tqdm(total=count, unit=" pictures", disable=not sys.stderr.isatty()) as bar:
        result = statistics.compute(
            source,
            max_examples=FLAGS.max_examples,
            workers=FLAGS.workers,
            progress=bar.update,
        )
    result.save(path)
    seconds = time.perf_counter() - started
    means = result.mean_image.mean(axis=(0, 1))
    print(f"mean of R, G, B               {_numbers(means)}  (0..255)")
    print(f"standard deviations along PCA {_numbers(result.pca_std_255)}  (ascending)")
    print(f"wrote {path} ({seconds:.0f} s)")


def _numbers(values: np.ndarray) -> str:
    return "  ".join(f"{value:7.3f}" for value in values)


COMMANDS: dict[str, Callable[[], None]] = {
    "statistics": _statistics,
    "textures": _textures,
}


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status, 1 after an error in words."""
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
        COMMANDS[words[0]]()
    except (flags.Error, ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
