"""Two classifiers that must fail on the textures: by colour, and linear in pixels.

    python -m benchmarks.speed.texture_baselines [--data_dir=DIR]

They show that a network which learns this data set has learned local structure. Both are
given every advantage: their one free number is chosen on the test images.
"""

import argparse

import numpy as np

from alexnet_jax.data import eval_batches, open_source

_REGULARIZATIONS = (0.01, 0.1, 1.0)


def pixel_features(images: np.ndarray, side: int = 32) -> np.ndarray:
    """Average uint8 [N, S, S, 3] down to `side`: float64 [N, side * side * 3], 0..1.

    `side` must divide S.
    """
    count, size = images.shape[:2]
    cell = size // side
    cells = images.reshape(count, side, cell, side, cell, 3)
    sums = cells.sum(axis=(2, 4), dtype=np.uint32)
    return (sums / (255.0 * cell * cell)).reshape(count, -1)


def color_features(images: np.ndarray) -> np.ndarray:
    """Return [N, 57]: 3 means, 6 entries of the covariance, 3 histograms of 16 bins."""
    rows = []
    for image in images:
        pixels = image.reshape(-1, 3)[::3]  # a third of them says as much
        bins = [np.bincount(pixels[:, c] >> 4, minlength=16) for c in range(3)]
        share = np.concatenate(bins) / len(pixels)
        covariance = np.cov(pixels.T / 255.0)[np.triu_indices(3)]
        rows.append(np.concatenate([pixels.mean(axis=0) / 255, covariance, share]))
    return np.stack(rows)


def linear_error(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Return the error in [0, 1] of ridge regression, one output per class.

    Args:
      train, test: features, float [N, D].
      train_labels, test_labels: int [N].
    """
    mean = train.mean(axis=0)
    train, test = train - mean, test - mean
    classes = np.unique(train_labels)
    targets = (train_labels[:, None] == classes) - 1 / len(classes)
    gram = train.T @ train
    scale = np.trace(gram) / len(gram)
    errors = []
    for strength in _REGULARIZATIONS:
        ridge = gram + strength * scale * np.eye(len(gram), dtype=gram.dtype)
        weights = np.linalg.solve(ridge, train.T @ targets)
        guesses = classes[(test @ weights).argmax(axis=1)]
        errors.append(np.mean(guesses != test_labels))
    return float(min(errors))


def color_error(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Return the error of the better of two classifiers; arguments as for `linear_error`.

    They are the nearest class mean, and the quadratic one of a Gaussian per class.
    """
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-9
    train, test = (train - mean) / std, (test - mean) / std
    classes = np.unique(train_labels)
    means = np.stack([train[train_labels == k].mean(axis=0) for k in classes])
    distances = ((test[:, None, :] - means) ** 2).sum(axis=2)
    errors = [np.mean(classes[distances.argmin(axis=1)] != test_labels)]
    for shrinkage in _REGULARIZATIONS:
        scores = []
        for k, center in zip(classes, means, strict=True):
            covariance = np.cov(train[train_labels == k].T)
            covariance += shrinkage * np.eye(len(center))
            centered = test - center
            solved = np.linalg.solve(covariance, centered.T).T
            log_det = np.linalg.slogdet(covariance)[1]
            scores.append(-(centered * solved).sum(axis=1) - log_det)
        guesses = classes[np.argmax(scores, axis=0)]
        errors.append(np.mean(guesses != test_labels))
    return float(min(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data_dir", help="as of `alexnet_jax.prepare`")
    options = parser.parse_args()
    splits = []
    for split in ("train", "test"):
        # In parts: all images would take 1 GB.
        source = open_source("textures", split, data_dir=options.data_dir)
        parts = []
        with eval_batches(source, batch_size=100) as batches:
            for batch in batches:
                images = batch["image"][batch["mask"] > 0]
                labels = batch["label"][batch["mask"] > 0]
                parts.append((pixel_features(images), color_features(images), labels))
        splits.append([np.concatenate(part) for part in zip(*parts, strict=True)])
    (pixels, colors, labels), (test_pixels, test_colors, test_labels) = splits
    linear = linear_error(pixels, labels, test_pixels, test_labels)
    color = color_error(colors, labels, test_colors, test_labels)
    print("error by chance 0.900; these must stay near it, both chosen on the test split:")
    print(f"error, linear in the pixels  {linear:.3f}")
    print(f"error, colours only          {color:.3f}")


if __name__ == "__main__":
    main()
