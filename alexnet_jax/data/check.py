"""Checks of a data set before a long run: the mistakes that nothing else shows.

Wrong or missing labels, classes in another order, pictures that are not shuffled,
statistics of other data: training runs with all of them, and ends at a bad error rate.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np

from alexnet_jax.augment import (
    IMAGENET_MEAN_255,
    IMAGENET_PCA_STD_255,
)
from alexnet_jax.data import statistics
from alexnet_jax.data.errors import DataError
from alexnet_jax.data.imagenet import OFFICIAL_COUNTS, wnids, words
from alexnet_jax.data.loader import TrainOrder
from alexnet_jax.data.sources import (
    Sample,
    Source,
    StoredSource,
    match_classes,
    num_shared,
    shared_in_words,
    some,
)

BATCH_SIZE, NUM_BATCHES = 128, 100
_FEWEST = 8  # pictures in a batch, for its entropy to say anything
_CHUNK = 256  # records that a thread reads at a time
_SAMPLE = 2000  # pictures that the statistics are computed from again
_FEW = 256  # pictures whose pixel values are looked at
# Grey levels between the darkest and the brightest value of an image, in the median.
# Values of 14 bits in 16 that were cut to the upper 8 are 0 to 63, and a resize may go a
# little beyond; those of 12 bits are 0 to 15.
_LEAST_RANGE = 80
# As a share of the evaluation images: published data sets have a few such images.
_MOST_IDENTICAL = 0.01
# Of the mean of a picture over a data set, in grey levels: about 37 for ImageNet.
_SPREAD_OF_MEANS = 40.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found; level is "ok", "note" or "WRONG"."""

    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5s}  {self.text}"


def read_records(
    source: Source, workers: int, progress: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of all examples, and a number that only identical images share.

    Args:
      workers: reading threads.
      progress: called with the number of records read since its last call.

    Returns:
      labels: int32 [n], in the order of storage.
      hashes: uint64 [n], of the stored bytes; empty if the source stores none (fake).
    """
    labels = np.empty(source.num_examples, np.int32)
    stored = source if isinstance(source, StoredSource) else None
    hashes = np.empty(len(labels) if stored else 0, np.uint64)

    def read(first: int) -> int:
        part = range(first, min(first + _CHUNK, len(labels)))
        if stored is None:
            labels[part] = source.labels_of(np.asarray(part))
        else:
            for index in part:
                labels[index], data = stored.record(index)
                digest = hashlib.blake2b(data, digest_size=8).digest()
                hashes[index] = int.from_bytes(digest, "little")
        return len(part)

    pool = futures.ThreadPoolExecutor(workers)
    try:
        for done in pool.map(read, range(0, len(labels), _CHUNK)):
            progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return labels, hashes


def examine(
    train: Source,
    evaluation: Source | None,
    labels: Sequence[np.ndarray],
    hashes: Sequence[np.ndarray],
    *,
    partial: bool = False,
    workers: int = 2,
) -> Iterator[Finding]:
    """All checks, one after the other.

    Args:
      train, evaluation: the splits; the second with the labels of the first, unless
        its classes are other ones.
      labels, hashes: of each split, as `read_records` gives them.
      partial: less than all of ImageNet is no mistake.
      workers: decoding threads.
    """
    is_imagenet = set(train.class_names) <= set(wnids())
    yield _class_order(train, is_imagenet, partial)
    splits = [("train", train, labels[0])]
    if evaluation is not None:
        yield _same_classes(train, evaluation)
        yield from _in_both(train, evaluation, hashes)
        name = "validation" if is_imagenet else "evaluation"
        splits.append((name, evaluation, labels[1]))
    for split, source, of_split in splits:
        if is_imagenet:
            yield _official_count(split, len(of_split), partial)
        yield from _histogram(split, source, of_split)
        yield _pixel_values(split, source)
    chance = _by_chance(labels[0])
    yield _shuffling(labels[0], chance)
    yield _order_of_storage(labels[0], chance)
    yield from _statistics(train, is_imagenet, workers)


def _class_order(train: Source, is_imagenet: bool, partial: bool) -> Finding:
    names = train.class_names
    if list(names) != sorted(names) and not is_imagenet:
        return Finding("note", f"{len(names):,} classes, not in alphabetical order")
    if is_imagenet and names != wnids():
        missing = sorted(set(wnids()) - set(names))
        return Finding(
            "note" if partial and list(names) == sorted(names) else "WRONG",
            f"class order: {len(names):,} classes, ImageNet has 1,000 in the order of "
            f"their WNIDs; missing {some(missing)}: labels are not the published ones",
        )
    first, last = (
        f"{name} ({words(name)})" if is_imagenet else name
        for name in (names[0], names[-1])
    )
    return Finding(
        "ok", f"class order: {len(names):,} classes, 0 is {first}, the last is {last}"
    )


def _same_classes(train: Source, evaluation: Source) -> Finding:
    try:
        match_classes(evaluation, train.class_names)
    except DataError as error:
        return Finding("WRONG", str(error))
    return Finding("ok", "labels mean the same classes in both splits")


def _in_both(
    train: Source, evaluation: Source, hashes: Sequence[np.ndarray]
) -> Iterator[Finding]:
    """Evaluation images that are training images: by place, else by content."""
    if shared := num_shared(train, evaluation):
        yield Finding("WRONG", shared_in_words(shared, train, evaluation))
        return
    if not isinstance(train, StoredSource) or not isinstance(evaluation, StoredSource):
        return
    found = np.flatnonzero(np.isin(hashes[1], hashes[0]))
    if not len(found):
        yield Finding(
            "ok",
            f"no evaluation image is byte for byte a training image ({len(hashes[1]):,} "
            f"compared with {len(hashes[0]):,})",
        )
        return
    first = int(found[0])
    twin = int(np.flatnonzero(hashes[0] == hashes[1][first])[0])
    yield Finding(
        "WRONG" if len(found) >= _MOST_IDENTICAL * len(hashes[1]) else "note",
        f"{len(found):,} of {len(hashes[1]):,} evaluation images are byte for byte "
        f"training images, such as {evaluation.name_of(first)} and {train.name_of(twin)}: "
        "their error is not that of unseen images. Take them out of one split",
    )


def _official_count(split: str, count: int, partial: bool) -> Finding:
    official = OFFICIAL_COUNTS[split]
    if count == official:
        return Finding("ok", f"{split}: {count:,} pictures, all of ILSVRC-2012")
    level = "note" if partial else "WRONG"
    hint = "" if partial else " (--partial accepts that)"
    text = f"{split}: {count:,} pictures, ILSVRC-2012 has {official:,}{hint}"
    return Finding(level, text)


def _histogram(split: str, source: Source, labels: np.ndarray) -> Iterator[Finding]:
    counts = np.bincount(labels, minlength=source.num_classes)
    present = np.flatnonzero(counts)
    text = (
        f"{split}: {len(labels):,} pictures, a class has {counts[present].min():,} to "
        f"{counts.max():,}, median {np.median(counts[present]):,.0f}"
    )
    if len(present) == 1:
        name = source.class_names[present[0]]
        yield Finding("WRONG", f"{split}: every picture has the same label, {name}")
        return
    absent = [source.class_names[k] for k in np.flatnonzero(counts == 0)]
    # A small evaluation split may lack classes; a training split must not.
    if absent:
        level = "WRONG" if split == "train" else "note"
        yield Finding(level, f"{text}; no pictures of {some(absent)}")
    else:
        yield Finding("ok", text)
    for line in _bars(counts):
        yield Finding("", line)


def _pixel_values(split: str, source: Source) -> Finding:
    """Images that hardly vary were most likely of more than 8 bits a value."""
    sample = Sample(source, _FEW)
    side = source.image_size
    ranges = []
    for index in range(sample.num_examples):
        image = np.empty((1, side, side, 3), np.uint8)
        sample.fetch(np.array([index]), image, np.empty(1, np.int32))
        ranges.append(int(image.max()) - int(image.min()))
    median = float(np.median(ranges))
    text = (
        f"{split}: an image spans {median:.0f} of 255 grey levels (median of "
        f"{len(ranges):,})"
    )
    if median >= _LEAST_RANGE:
        return Finding("ok", text)
    return Finding(
        "WRONG",
        f"{text}: the images hardly vary; expected at least {_LEAST_RANGE}. Were values of "
        "10 to 16 bits cut to 8? Scale them to 0..255 and save the images again",
    )


def _bars(counts: np.ndarray, rows: int = 8, width: int = 40) -> list[str]:
    """A histogram of the classes' numbers of pictures, in text."""
    edges = np.unique(np.linspace(counts.min(), counts.max() + 1, rows + 1).astype(int))
    if len(edges) < 3:
        return []
    classes = np.histogram(counts, edges)[0]
    return [
        f"{low:6,} to {high - 1:6,} pictures: {number:5,} classes "
        + "#" * int(np.ceil(width * number / classes.max()))
        for low, high, number in zip(edges, edges[1:], classes, strict=False)
    ]


def label_entropy(batches: np.ndarray) -> float:
    """Mean entropy in bits of the labels of each batch, int [batches, batch size]."""
    total = 0.0
    for batch in batches:
        share = np.unique(batch, return_counts=True)[1] / len(batch)
        total -= float((share * np.log2(share)).sum())
    return total / len(batches)


def _batches_of(labels: np.ndarray) -> np.ndarray:
    """`labels` from the front as at most NUM_BATCHES whole batches."""
    size = _batch_size(labels)
    count = min(NUM_BATCHES, len(labels) // size)
    return labels[: count * size].reshape(count, size)


def _batch_size(labels: np.ndarray) -> int:
    """Of which there are several: one batch of all would look well mixed."""
    return min(BATCH_SIZE, max(1, len(labels) // 8))


def _by_chance(labels: np.ndarray) -> float:
    """The entropy of batches drawn at random, of which an example comes once."""
    rng = np.random.default_rng(0)
    return label_entropy(_batches_of(rng.permutation(labels)))


def _shuffling(labels: np.ndarray, chance: float) -> Finding:
    """What training will see: the loader's first batches."""
    size = _batch_size(labels)
    if size < _FEWEST:
        return Finding("note", "shuffling: too few pictures to tell")
    order = TrainOrder(len(labels), batch_size=size, seed=0)
    count = min(NUM_BATCHES, len(labels) // size)
    found = label_entropy(np.stack([labels[order[step]] for step in range(count)]))
    text = (
        f"shuffling: the labels of the first {count} batches of {size} hold "
        f"{found:.2f} bits each, at random {chance:.2f}"
    )
    return Finding("ok" if found > 0.9 * chance > 0 else "WRONG", text)


def _order_of_storage(labels: np.ndarray, chance: float) -> Finding:
    """Matters to readers that shuffle little, and to slices such as train[:10%]."""
    if _batch_size(labels) < _FEWEST:
        return Finding("note", "order of storage: too few pictures to tell")
    found = label_entropy(_batches_of(labels))
    if found > 0.9 * chance:
        return Finding("ok", f"order of storage: shuffled as well ({found:.2f} bits)")
    return Finding(
        "note",
        f"order of storage: sorted by class ({found:.2f} bits of {chance:.2f}); "
        "training shuffles by itself, a slice such as train[:10%] is a few classes",
    )


def _statistics(train: Source, is_imagenet: bool, workers: int) -> Iterator[Finding]:
    path = train.statistics_path
    if path is None or not path.exists():
        yield Finding(
            "note",
            "statistics: none beside the data; training computes them from at most "
            "10,000 pictures (python -m alexnet_jax.prepare statistics --source=... stores "
            "those of all)",
        )
        return
    stored = statistics.load(path, train.image_size)
    if stored.split_examples != train.num_examples:
        yield Finding(
            "WRONG",
            f"statistics: {path} is of {stored.extent}, the split has "
            f"{train.num_examples:,}: training does not use it. {statistics.COMPUTE_AGAIN}",
        )
        return
    count = min(_SAMPLE, train.num_examples)
    again = statistics.compute(train, max_examples=count, workers=workers)
    mean, new_mean = (s.mean_image.mean((0, 1)) for s in (stored, again))
    # Four standard errors; of all pictures again the same numbers must come.
    same = count == train.num_examples == stored.num_examples
    tolerance = 0.01 if same else 4 * _SPREAD_OF_MEANS / np.sqrt(count)
    share = 1e-3 if same else 0.15
    near = bool(
        np.abs(mean - new_mean).max() < tolerance
        and np.allclose(stored.pca_std_255, again.pca_std_255, rtol=share)
    )
    yield Finding(
        "ok" if near else "WRONG",
        f"statistics: stored (of {stored.extent}) mean "
        f"{_numbers(mean)}, PCA {_numbers(stored.pca_std_255)}; of {count:,} pictures "
        f"again {_numbers(new_mean)}, {_numbers(again.pca_std_255)}",
    )
    if is_imagenet:
        yield Finding(
            "note",
            f"statistics: the original's (2012) mean {_numbers(IMAGENET_MEAN_255)}, "
            f"PCA {_numbers(IMAGENET_PCA_STD_255)}",
        )


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.1f}" for value in values)
