"""Says what is in pictures: class names and probabilities from a trained network.

python -m alexnet_jax.predict --workdir=DIR cat.jpg dog.png ...
python -m alexnet_jax.predict --workdir=DIR --format=json --figure=FILE.png *.jpg

The centre view of each picture, as the evaluation sees it. A picture that cannot be
read is named on standard error, the others are done, and the exit status is 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from alexnet_jax import ops
from alexnet_jax.checkpoint import CheckpointError
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import load_picture, short_names
from alexnet_jax.experiment import ConfigError, load, read_class_names, read_config

# Pictures that go through the network at once.
BATCH = 64
# A figure of more would be too long to look at.
MOST_DRAWN = 48


@dataclass(frozen=True)
class Prediction:
    """What a network says about one picture.

    Attributes:
      probabilities: float32 [K], their sum is 1.
      picture: uint8 [S, S, 3], the square that was looked at.
    """

    path: str
    probabilities: np.ndarray
    picture: np.ndarray

    def best(self, count: int) -> list[int]:
        """The most probable labels, the best first; of equal ones the smaller."""
        order = np.argsort(-self.probabilities, kind="stable")
        return order[:count].tolist()


def class_names(workdir: Path, count: int) -> list[str]:
    """What a run's labels mean: `count` names, "class 3" where the run does not say."""
    known = read_class_names(workdir) or []
    return [*known[:count], *(f"class {k}" for k in range(len(known), count))]


def predict(
    workdir: Path, paths: Sequence[str], *, step: int | None = None
) -> Iterator[Prediction | Exception]:
    """Looks at pictures, in their order.

    Args:
      workdir: of a run.
      paths: picture files.
      step: which checkpoint; as `experiment.load`.

    Yields:
      A prediction for each path, or the OSError or ValueError of a picture that cannot
      be read.

    Raises:
      FileNotFoundError, CheckpointError: as `experiment.load`.
    """
    model, variables, preprocess = load(workdir, step=step)
    side = (read_config(workdir) or {})["data"]["image_size"]
    apply = jax.jit(model.apply, compiler_options=ops.compiler_options())
    size = min(BATCH, len(paths))
    for start in range(0, len(paths), size):
        found: list[np.ndarray | Exception] = []
        for path in paths[start : start + size]:
            try:
                found.append(load_picture(path, side))
            except (OSError, ValueError) as error:
                found.append(error)
        whole = [p for p in found if not isinstance(p, Exception)]
        if whole:
            # The last batch is filled up: one program for all.
            filled = whole + [whole[-1]] * (size - len(whole))
            logits = apply(variables, preprocess(filled))
            rows = iter(np.asarray(jax.nn.softmax(logits.astype("float32"))))
        for path, picture in zip(paths[start : start + size], found, strict=True):
            if isinstance(picture, Exception):
                yield picture
            else:
                yield Prediction(path, next(rows), picture)


def as_text(prediction: Prediction, names: Sequence[str], top: int) -> str:
    """The picture's path and a line a label, the best first."""
    best = prediction.best(top)
    lines = [f"{100 * prediction.probabilities[k]:7.2f}%  {names[k]}" for k in best]
    return "\n".join([prediction.path, *lines])


def as_json(prediction: Prediction, names: Sequence[str], top: int) -> dict[str, Any]:
    """{"file", "labels": [{"label", "name", "words", "probability"}, ...]}."""
    return {
        "file": prediction.path,
        "labels": [
            {
                "label": k,
                "name": names[k],
                "words": words(names[k]),
                "probability": float(prediction.probabilities[k]),
            }
            for k in prediction.best(top)
        ],
    }


def _draw(found: Sequence[Prediction], names: Sequence[str], path: Path) -> None:
    # matplotlib is not needed to say what is in a picture.
    from alexnet_jax.analysis import best_labels

    figure = best_labels(
        np.stack([prediction.picture for prediction in found]),
        np.stack([prediction.probabilities for prediction in found]),
        names,
        titles=short_names([prediction.path for prediction in found]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="which checkpoint; else the best")
    parser.add_argument("--top", type=int, default=5, help="labels a picture")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE.png",
        help=f"draw the pictures, at most {MOST_DRAWN}, above bars of their labels",
    )
    options = parser.parse_args(argv)
    if options.top < 1:
        parser.error(f"--top={options.top} must be at least 1.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(argv)
    logging.set_verbosity(logging.WARNING)
    drawn: list[Prediction] = []
    names: list[str] = []
    readable: list[str] = []
    unread = 0
    try:
        for found in predict(options.workdir, options.pictures, step=options.step):
            if isinstance(found, Exception):
                print(f"error: {found}", file=sys.stderr)
                unread += 1
                continue
            if not names:
                names = class_names(options.workdir, len(found.probabilities))
                readable = [words(name) for name in names]
            if options.format == "json":
                print(json.dumps(as_json(found, names, options.top)), flush=True)
            else:
                print(as_text(found, readable, options.top), flush=True)
            if options.figure is not None and len(drawn) < MOST_DRAWN:
                drawn.append(found)
        if drawn and options.figure is not None:
            _draw(drawn, readable, options.figure)
    except BrokenPipeError:  # "| head" has seen enough; nothing is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
