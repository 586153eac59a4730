"""Checks of a data set before a long run: mistakes that nothing else shows.

With wrong or missing labels, classes in another order, images that are not shuffled or
statistics of other data, training runs, and ends at a bad error rate.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np

from alexnet_jax.data import statistics
from alexnet_jax.data.augment import IMAGENET_MEAN_255, IMAGENET_PCA_STD_255
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import OFFICIAL_COUNTS, wnids, words
from alexnet_jax.data.loader import train_order
from alexnet_jax.data.sources import Sample, Source, StoredSource, match_classes, overlap
from alexnet_jax.data.sources.source import some

_CHUNK = 256  # records that a thread reads at a time
# Images of the check of pixel values, and of the check of statistics.
_FEW, _SAMPLE = 256, 2000
# Label entropies are of at most so many batches of at most so many labels; smaller
# batches than the last number tell nothing.
_NUM_BATCHES, _BATCH_SIZE, _FEWEST = 100, 128, 8
# Median over images of (brightest - darkest value), in grey levels. Values of 14 bits in
# 16 that were cut to the upper 8 are 0 to 63, and a resize may go a little beyond.
_LEAST_RANGE = 80
# As a share of the evaluation images: published data sets have a few such images.
_MOST_IDENTICAL = 0.01
# Standard deviation of the mean of an image, in grey levels: about 37 for ImageNet.
_SPREAD_OF_MEANS = 40.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one check; level is "ok", "note" or "WRONG"."""

    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5s}  {self.text}"


class Split(NamedTuple):
    """A split, with the labels (int32 [n]) and hashes (uint64 [n]) of its stored images.

    There are no hashes if the source stores no images (fake).
    """

    source: Source
    labels: np.ndarray
    hashes: np.ndarray


def read_split(source: Source, workers: int, progress: Callable[[int], object]) -> Split:
    """Read all records of a source once, in threads.

    Args:
      progress: called with the number of records read since its last call.
    """
    everything = np.arange(source.num_examples)
    if not isinstance(source, StoredSource):
        return Split(source, source.labels_of(everything), np.empty(0, np.uint64))
    labels = np.empty(len(everything), np.int32)
    hashes = np.empty(len(everything), np.uint64)

    def read(part: np.ndarray) -> int:
        for index in part.tolist():
            labels[index], data = source.record(index)
            digest = hashlib.blake2b(data, digest_size=8).digest()
            hashes[index] = int.from_bytes(digest, "little")
        return len(part)

    pool = futures.ThreadPoolExecutor(workers)
    try:
        for done in pool.map(read, np.array_split(everything, -(-len(everything) // _CHUNK))):
            progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return Split(source, labels, hashes)


def examine(
    train: Split, evaluation: Split | None = None, *, partial: bool = False, workers: int = 2
) -> Iterator[Finding]:
    """Make all checks, one after the other.

    Args:
      train, evaluation: the splits; the second with the labels of the first, unless its
        classes are other ones.
      partial: accept less than all of ImageNet.
      workers: decoding threads.
    """
    class_names = train.source.class_names
    is_imagenet = set(class_names) <= set(wnids())
    yield _class_order(class_names, is_imagenet, partial)
    splits = {"train": train}
    if evaluation is not None:
        splits["validation" if is_imagenet else "evaluation"] = evaluation
        try:
            match_classes(evaluation.source, class_names)
            yield Finding("ok", "labels mean the same classes in both splits")
        except DataError as error:
            yield Finding("WRONG", str(error))
        yield from _in_both(train, evaluation)
    for name, split in splits.items():
        if is_imagenet:
            count, official = len(split.labels), OFFICIAL_COUNTS[name]
            text = f"{name}: {count:,} images, ILSVRC-2012 has {official:,}"
            if count == official:
                yield Finding("ok", text)
            elif partial:
                yield Finding("note", text)
            else:
                yield Finding("WRONG", f"{text} (--partial accepts that)")
        yield _counts(name, split)
        yield _pixel_values(name, split.source)
    yield from _order(train.labels)
    yield from _statistics(train.source, is_imagenet, workers)


def _class_order(names: tuple[str, ...], is_imagenet: bool, partial: bool) -> Finding:
    is_sorted = list(names) == sorted(names)
    if is_imagenet and names != wnids():
        missing = sorted(set(wnids()) - set(names))
        return Finding(
            "note" if partial and is_sorted else "WRONG",
            f"class order: {len(names):,} classes, ImageNet has 1,000 in the order of "
            f"their WNIDs; missing {some(missing)}: labels are not the published ones",
        )
    if not is_sorted:
        return Finding("note", f"{len(names):,} classes, not in alphabetical order")
    first, last = (
        f"{name} ({words(name)})" if is_imagenet else name for name in (names[0], names[-1])
    )
    return Finding("ok", f"class order: {len(names):,} classes, 0 is {first}, the last is {last}")


def _in_both(train: Split, evaluation: Split) -> Iterator[Finding]:
    """Look for evaluation images that are training images: by place, else by content."""
    ours, others = train.source, evaluation.source
    if message := overlap(ours, others):
        yield Finding("WRONG", message)
    elif isinstance(ours, StoredSource) and isinstance(others, StoredSource):
        found = np.flatnonzero(np.isin(evaluation.hashes, train.hashes))
        total = len(evaluation.hashes)
        text = f"{len(found):,} of {total:,} evaluation images are byte for byte training images"
        if not len(found):
            yield Finding("ok", text)
            return
        twin = np.flatnonzero(train.hashes == evaluation.hashes[found[0]])[0]
        yield Finding(
            "WRONG" if len(found) >= _MOST_IDENTICAL * total else "note",
            f"{text}, for example {others.name_of(int(found[0]))} and "
            f"{ours.name_of(int(twin))}: their error is not that of unseen images. Take "
            "them out of one split",
        )


def _counts(name: str, split: Split) -> Finding:
    class_names = split.source.class_names
    counts = np.bincount(split.labels, minlength=len(class_names))
    present, absent = np.flatnonzero(counts), np.flatnonzero(counts == 0)
    if len(present) == 1:
        label = class_names[present[0]]
        return Finding("WRONG", f"{name}: every image has the same label, {label}")
    text = (
        f"{name}: {len(split.labels):,} images, a class has {counts[present].min():,} to "
        f"{counts.max():,}, median {np.median(counts[present]):,.0f}"
    )
    if not len(absent):
        return Finding("ok", text)
    # A small evaluation split may lack classes; a training split must not.
    level = "WRONG" if name == "train" else "note"
    return Finding(level, f"{text}; no images of {some([class_names[k] for k in absent])}")


def _pixel_values(name: str, source: Source) -> Finding:
    """Look for images that hardly vary: most likely they had more than 8 bits."""
    sample = Sample(source, _FEW)
    image = np.empty((1, source.image_size, source.image_size, 3), np.uint8)
    ranges = []
    for index in range(sample.num_examples):
        sample.fetch(np.array([index]), image, np.empty(1, np.int32))
        ranges.append(np.ptp(image))
    median = np.median(ranges)
    text = f"{name}: an image spans {median:.0f} of 255 grey levels (median of {len(ranges):,})"
    if median >= _LEAST_RANGE:
        return Finding("ok", text)
    return Finding(
        "WRONG",
        f"{text}: the images hardly vary; expected at least {_LEAST_RANGE}. Were values of "
        "10 to 16 bits cut to 8? Scale them to 0..255 and save the images again",
    )


def label_entropy(batches: np.ndarray) -> float:
    """Return the mean entropy of the labels in a batch, in bits; int [batches, size]."""
    shares = [np.unique(b, return_counts=True)[1] / len(b) for b in batches]
    return float(np.mean([-(share * np.log2(share)).sum() for share in shares]))


def _order(labels: np.ndarray) -> Iterator[Finding]:
    """Compare the labels in batches with those of batches drawn at random."""
    # Several batches: one batch of all examples would look well mixed.
    size = min(_BATCH_SIZE, max(1, len(labels) // 8))
    if size < _FEWEST:
        yield Finding("note", "shuffling and order of storage: too few images to tell")
        return
    count = min(_NUM_BATCHES, len(labels) // size)

    def entropy(labels: np.ndarray) -> float:
        return label_entropy(labels[: count * size].reshape(count, size))

    chance = entropy(np.random.default_rng(0).permutation(labels))
    shuffled = entropy(labels[train_order(len(labels), 0)(0, count * size)])
    yield Finding(
        "ok" if shuffled > 0.9 * chance > 0 else "WRONG",
        f"shuffling: the labels of the first {count} batches of {size} hold {shuffled:.2f} "
        f"bits each, at random {chance:.2f}",
    )
    stored = entropy(labels)
    text = f"order of storage: {stored:.2f} bits, at random {chance:.2f}"
    if stored > 0.9 * chance:
        yield Finding("ok", text)
    else:
        slices = (
            "training shuffles by itself, but a slice, for example train[:10%], is a few classes"
        )
        yield Finding("note", f"{text}; sorted by class: {slices}")


def _statistics(train: Source, is_imagenet: bool, workers: int) -> Iterator[Finding]:
    path, total = train.statistics_path, train.num_examples
    if path is None or not path.exists():
        yield Finding(
            "note",
            "statistics: none beside the data; training computes them from at most "
            "10,000 images (python -m alexnet_jax.prepare statistics --source=... stores "
            "those of all)",
        )
        return
    stored = statistics.load(path, train.image_size)
    if stored.split_examples != total:
        yield Finding(
            "WRONG",
            f"statistics: {path} is of {stored.extent}, the split has {total:,}: training "
            f"does not use it. {statistics.COMPUTE_AGAIN}",
        )
        return
    again = statistics.compute(train, max_examples=_SAMPLE, workers=workers)
    mean, new_mean = (s.mean_image.mean((0, 1)) for s in (stored, again))
    # All images again must give the same numbers; a sample, within four standard errors.
    count = again.num_examples
    same = count == total == stored.num_examples
    tolerance = 0.01 if same else 4 * _SPREAD_OF_MEANS / np.sqrt(count)
    near = np.abs(mean - new_mean).max() < tolerance and np.allclose(
        stored.pca_std_255, again.pca_std_255, rtol=1e-3 if same else 0.15
    )
    yield Finding(
        "ok" if near else "WRONG",
        f"statistics: stored (of {stored.extent}) mean "
        f"{_numbers(mean, stored.pca_std_255)}; of {count:,} images again "
        f"{_numbers(new_mean, again.pca_std_255)}",
    )
    if is_imagenet:
        official = _numbers(IMAGENET_MEAN_255, IMAGENET_PCA_STD_255)
        yield Finding("note", f"statistics: the original's (2012) mean {official}")


def _numbers(mean: np.ndarray, pca_std: np.ndarray) -> str:
    texts = (" ".join(f"{v:.1f}" for v in values) for values in (mean, pca_std))
    return ", PCA ".join(texts)
