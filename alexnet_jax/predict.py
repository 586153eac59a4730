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

# One readable image: its path, raw image uint8 [S, S, 3] and class probabilities float32 [K].
Prediction = tuple[str, np.ndarray, np.ndarray]


def predict(logits_of: Extractor, paths: Sequence[str]) -> Iterator[Prediction | Exception]:
    """Yield a prediction for each path, or the OSError or ValueError of an unreadable image."""
    for start in range(0, len(paths), BATCH):
        part = paths[start : start + BATCH]
        found = read(part, logits_of.image_size)
        whole = [image for image in found if not isinstance(image, Exception)]
        rows = iter(np.asarray(jax.nn.softmax(logits_of(whole))) if whole else ())
        for path, image in zip(part, found, strict=True):
            yield image if isinstance(image, Exception) else (path, image, next(rows))


def best_labels(
    probabilities: np.ndarray, class_names: list[str], count: int
) -> list[dict[str, Any]]:
    """Return label, name, words and probability of the best classes; ties by label."""
    order = np.argsort(-probabilities, kind="stable")
    return [
        {
            "label": k,
            "name": class_names[k],
            "words": words(class_names[k]),
            "probability": float(probabilities[k]),
        }
        for k in order[:count].tolist()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    made = parser("alexnet_jax.predict", __doc__, top=5)
    made.add_argument(
        "--feature_maps",
        type=figure_file,
        metavar="FILE.png",
        help="also draw what each layer makes of the first image",
    )
    made.add_argument("images", nargs="+", metavar="IMAGE")
    options = made.parse_args(argv)
    if options.top < 1:
        made.error(f"--top={options.top} must be at least 1.")
    return exit_status(lambda: _predict(options), CheckpointError)


def _predict(options: argparse.Namespace) -> bool:
    """Print the labels of each image; return True if all could be read."""
    for path in filter(None, (options.figure, options.feature_maps)):
        require_writable_file(path)
    size = min(BATCH, len(options.images))
    logits_of = Extractor(options.workdir, "logits", step=options.step, batch=size)
    drawn: list[Prediction] = []
    all_read = True
    for found in predict(logits_of, options.images):
        if isinstance(found, Exception):
            print(f"error: {found}", file=sys.stderr)
            all_read = False
            continue
        path, _, probabilities = found
        labels = best_labels(probabilities, logits_of.class_names, options.top)
        if options.format == "json":
            print(json.dumps({"file": path, "labels": labels}), flush=True)
        else:
            lines = [f"{100 * label['probability']:7.2f}%  {label['words']}" for label in labels]
            print("\n".join([path, *lines]), flush=True)
        if len(drawn) < MOST_DRAWN:
            drawn.append(found)
    if drawn and options.figure is not None:
        _draw(drawn, logits_of.class_names, options.figure)
    if drawn and options.feature_maps is not None:
        _draw_feature_maps(options.workdir, options.step, drawn[0][1], options.feature_maps)
    return all_read


def _draw(drawn: Sequence[Prediction], class_names: list[str], path: Path) -> None:
    # Imported here: text and JSON need no matplotlib.
    from alexnet_jax.analysis import figures

    paths, images, probabilities = zip(*drawn, strict=True)
    names = [words(name) for name in class_names]
    titles = short_names(paths)
    drawing = figures.best_labels(np.stack(images), np.stack(probabilities), names, titles=titles)
    save_figure(drawing, path)


def _draw_feature_maps(workdir: Path, step: int | None, image: np.ndarray, path: Path) -> None:
    from alexnet_jax.analysis import figures

    model, variables, preprocess = load(workdir, step=step)
    # Not jitted, because that would sort the layers by name.
    features: Any = model.apply(variables, preprocess(image), method="features")
    save_figure(figures.feature_maps(image, features), path)


if __name__ == "__main__":
    signals.run(main)
