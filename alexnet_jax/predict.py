"""Print class names and probabilities for images, from a trained network.

python -m alexnet_jax.predict --workdir=DIR cat.jpg dog.png ...
python -m alexnet_jax.predict --workdir=DIR --format=json --figure=FILE.png *.jpg
python -m alexnet_jax.predict --workdir=DIR --feature_maps=FILE.png cat.jpg

The network sees the centre view of each image, as in the evaluation. The figure shows
the first 48 readable images; the feature maps, layer by layer, are of the first. An
unreadable image is named on standard error, and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax.analysis.features import BATCH, Extractor, read, save_figure
from alexnet_jax.data.imagenet import words
from alexnet_jax.data.images import short_names
from alexnet_jax.system import signals
from alexnet_jax.system.cli import exit_status, figure_file, parser, require_writable_file
from alexnet_jax.training.checkpoint import CheckpointError
from alexnet_jax.training.load import load

# Images in a figure.
MOST_DRAWN = 48


@dataclass(frozen=True)
class Prediction:
    """Class probabilities float32 [K] for one image.

    Attributes:
      picture: uint8 [S, S, 3], the central square.
      class_names: by label.
    """

    path: str
    probabilities: np.ndarray
    picture: np.ndarray
    class_names: Sequence[str]

    def best(self, count: int) -> list[int]:
        """Return the most probable labels, the best first; ties by label."""
        order = np.argsort(-self.probabilities, kind="stable")
        return order[:count].tolist()


def predict(
    workdir: Path, paths: Sequence[str], *, step: int | None = None
) -> Iterator[Prediction | Exception]:
    """Predict images in their order.

    Args:
      workdir: of a run, or a file of weights.
      paths: image files.
      step: which checkpoint; as for `load.load`.

    Yields:
      A prediction for each path, or the OSError or ValueError of an unreadable image.

    Raises:
      FileNotFoundError, CheckpointError: as `load.load`.
    """
    size = min(BATCH, len(paths))
    logits_of = Extractor(workdir, "logits", step=step, batch=size)
    for start in range(0, len(paths), size):
        part = paths[start : start + size]
        found = read(part, logits_of.image_size)
        whole = [image for image in found if not isinstance(image, Exception)]
        rows = iter(jax.nn.softmax(logits_of(whole)) if whole else ())
        for path, image in zip(part, found, strict=True):
            if isinstance(image, Exception):
                yield image
            else:
                chances = np.asarray(next(rows))
                yield Prediction(path, chances, image, logits_of.class_names)


def as_text(prediction: Prediction, top: int) -> str:
    """Return the image's path and a line per label, the best first."""
    chances, names = prediction.probabilities, prediction.class_names
    lines = [f"{100 * chances[k]:7.2f}%  {words(names[k])}" for k in prediction.best(top)]
    return "\n".join([prediction.path, *lines])


def as_json(prediction: Prediction, top: int) -> dict[str, Any]:
    """Return {"file", "labels": [{"label", "name", "words", "probability"}, ...]}."""
    names = prediction.class_names
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


def _draw(found: Sequence[Prediction], path: Path) -> None:
    # Here, because text and JSON need no matplotlib.
    from alexnet_jax.analysis.figures import best_labels

    figure = best_labels(
        np.stack([prediction.picture for prediction in found]),
        np.stack([prediction.probabilities for prediction in found]),
        [words(name) for name in found[0].class_names],
        titles=short_names([prediction.path for prediction in found]),
    )
    save_figure(figure, path)


def _draw_feature_maps(workdir: Path, step: int | None, image: np.ndarray, path: Path) -> None:
    from alexnet_jax.analysis.figures import feature_maps

    model, variables, preprocess = load(workdir, step=step)
    # Not jitted, because that would sort the layers by name.
    features: Any = model.apply(variables, preprocess(image), method="features")
    save_figure(feature_maps(image, features), path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("alexnet_jax.predict", __doc__, top=5)
    made.add_argument(
        "--feature_maps",
        type=figure_file,
        metavar="FILE.png",
        help="also draw what each layer makes of the first picture",
    )
    made.add_argument("pictures", nargs="+", metavar="PICTURE")
    options = made.parse_args(argv)
    if options.top < 1:
        made.error(f"--top={options.top} must be at least 1.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    options = _parse(argv)
    return exit_status(lambda: _predict(options), CheckpointError)


def _predict(options: argparse.Namespace) -> bool:
    """Print the labels of each image; return True if all could be read."""
    for path in filter(None, (options.figure, options.feature_maps)):
        require_writable_file(path)
    drawn: list[Prediction] = []
    all_read = True
    for found in predict(options.workdir, options.pictures, step=options.step):
        if isinstance(found, Exception):
            print(f"error: {found}", file=sys.stderr)
            all_read = False
            continue
        if options.format == "json":
            print(json.dumps(as_json(found, options.top)), flush=True)
        else:
            print(as_text(found, options.top), flush=True)
        if len(drawn) < MOST_DRAWN:
            drawn.append(found)
    if drawn and options.figure is not None:
        _draw(drawn, options.figure)
    if drawn and options.feature_maps is not None:
        _draw_feature_maps(options.workdir, options.step, drawn[0].picture, options.feature_maps)
    return all_read


if __name__ == "__main__":
    signals.run(main)
