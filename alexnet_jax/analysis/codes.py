"""Short binary codes of features: an autoencoder, Hamming search and a second look.

"Computing similarity by using Euclidean distance between two 4096-dimensional,
real-valued vectors is inefficient, but it could be made efficient by training an
auto-encoder to compress these vectors to short binary codes" (the paper, section 6.1).

The codes are rounded to 0 or 1 in the forward pass of training and not in the backward
pass (Krizhevsky and Hinton, Using very deep autoencoders for content-based image
retrieval, ESANN 2011), where semantic hashing had added noise (Salakhutdinov and
Hinton 2009).
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alexnet_jax.analysis.retrieval import (
    QUERIES,
    RetrievalError,
    check_queries,
    keep_nearest,
    nearest,
    rank,
)
from alexnet_jax.data.files import read_npz, replacing

# Codes that are compared with the queries at once.
BLOCK = 16384
# Updates of a coder in training.
STEPS = 500
# Features that are encoded at once.
_ROWS = 4096


@dataclass(frozen=True)
class Coder:
    """The encoder of a trained autoencoder: which side of `bits` planes features lie.

    Attributes:
      mean: float32 [D], of the features that it was trained on.
      kernel: float32 [D, bits].
      bias: float32 [bits].
    """

    mean: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    @property
    def bits(self) -> int:
        """Length of a code."""
        return len(self.bias)

    def encode(self, features: np.ndarray) -> np.ndarray:
        """float32 [N, D] -> uint8 [N, ceil(bits / 8)], the first bit the highest.

        Bits that fill the last byte are 0, as `np.packbits` has it.

        Raises:
          RetrievalError: for features of another length.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise RetrievalError(
                f"features are {features.shape}; for this coder they must be [N, "
                f"{len(self.mean)}]."
            )
        packed = np.empty((len(features), -(-self.bits // 8)), np.uint8)
        for i in range(0, len(features), _ROWS):
            part = jnp.asarray(features[i : i + _ROWS], jnp.float32)
            bits = _bits(part, self.mean, self.kernel, self.bias)
            packed[i : i + _ROWS] = np.packbits(np.asarray(bits), axis=1)
        return packed


@jax.jit
def _bits(
    features: jax.Array, mean: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    # In full precision: a GPU's tensorfloat32 would give other bits than a CPU.
    centred = features - mean
    return jnp.matmul(centred, kernel, precision=lax.Precision.HIGHEST) + bias > 0


@dataclass(frozen=True)
class Codes:
    """Codes of the rows of an index, and what made them.

    Attributes:
      coder: for queries.
      packed: uint8 [N, ceil(bits / 8)], of `Coder.encode`.
      checksum: of the features, see `checksum_of`.
    """

    coder: Coder
    packed: np.ndarray
    checksum: int

    @classmethod
    def of(cls, coder: Coder, features: np.ndarray) -> "Codes":
        """The codes of features [N, D]."""
        return cls(coder, coder.encode(features), checksum_of(features))

    def are_of(self, features: np.ndarray) -> bool:
        """Whether they are of these features [N, D], to the bit."""
        shape = (len(self.packed), len(self.coder.mean))
        return shape == features.shape and self.checksum == checksum_of(features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz, whole or not at all, for `load_codes` and NumPy."""
        checksum = np.uint32(self.checksum)
        with replacing(path) as file:
            np.savez(file, packed=self.packed, checksum=checksum, **vars(self.coder))


def checksum_of(features: np.ndarray) -> int:
    """The CRC-32 of an array's bytes, row after row."""
    return zlib.crc32(np.ascontiguousarray(features).data)


def load_codes(path: str | os.PathLike[str]) -> Codes:
    """Reads what `Codes.save` has written; never through pickle.

    Raises:
      RetrievalError: if there is no such file, or something else in it.
    """
    names = [field.name for field in dataclasses.fields(Coder)]
    found = read_npz(path, [*names, "packed", "checksum"], RetrievalError)
    missing = [name for name in (*names, "packed", "checksum") if name not in found]
    if missing:
        raise RetrievalError(
            f"{path} holds no codes: it has no {', '.join(missing)}. Remove it, and it "
            "is made again."
        )
    coder = Coder(**{name: found[name] for name in names})
    return Codes(coder, found["packed"], int(found["checksum"]))


class _Autoencoder(nn.Module):
    """Features to a binary code and back by the same weights.

    With weights of their own for the way back features come back better, but more of
    that is in weights that Hamming distance does not know.
    """

    bits: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[1]
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (width, self.bits)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.bits,))
        gain = self.param("gain", nn.initializers.constant(self.bits**-0.5), ())
        offset = self.param("offset", nn.initializers.zeros, (width,))
        code = nn.sigmoid(features @ kernel + bias)
        rounded = code + lax.stop_gradient(jnp.round(code) - code)
        return gain * (2 * rounded - 1) @ kernel.T + offset


def train_coder(
    features: np.ndarray,
    *,
    bits: int = 256,
    rows: np.ndarray | None = None,
    steps: int = STEPS,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Coder:
    """Trains an autoencoder of features with a binary code in its middle.

    Features are centred and divided by one number, the root of their mean variance, so
    that the squared error is Euclidean distance and no feature counts more than it does
    there. Adam, the learning rate falling to 0 as half a cosine. The same features and
    seed give the same coder on the same machine.

    Args:
      features: float32 [N, D].
      bits: length of the code, less than that of the features themselves, 32 D.
      rows: int, those that are learnt from; None: all.
      steps: updates, each by `batch_size` rows drawn at random.
      learning_rate: Adam's, at the start.
      seed: of the start and of the rows.
      progress: called with the number of steps done since its last call.

    Raises:
      RetrievalError: for a code that is no shorter, or features that are not finite or
        all the same.
    """
    mean, scale = _standard(features if rows is None else features[rows], bits)
    width = features.shape[1]
    network = _Autoencoder(bits)
    params = network.init(jax.random.key(seed), jnp.zeros((1, width)))
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.adam(schedule)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, batch):
        inputs = (batch - mean) / scale

        def loss_fn(params):
            return jnp.mean((network.apply(params, inputs) - inputs) ** 2)

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = rng.integers(0, len(features if rows is None else rows), batch_size)
        batch = features[drawn if rows is None else rows[drawn]]
        params, opt_state = update(params, opt_state, batch)
        if progress is not None:
            progress(1)
    trained = params["params"]
    return Coder(
        mean=mean,
        kernel=np.asarray(trained["kernel"]) / scale,
        bias=np.asarray(trained["bias"]),
    )


def _standard(features: np.ndarray, bits: int) -> tuple[np.ndarray, np.float32]:
    """The mean [D] of the features, and the root of their mean variance."""
    if features.ndim != 2 or 0 in features.shape:
        raise RetrievalError(f"features are {features.shape}; they must be [N, D].")
    width = features.shape[1]
    if not 1 <= bits < 32 * width:
        raise RetrievalError(
            f"a code of {bits} bits: it must have at least 1 and be shorter than the "
            f"features, {width:,} numbers of 32 bits."
        )
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.einsum("nd,nd->", features, features, dtype=np.float64)
    variance = squares / features.size - np.mean(mean**2)
    if not np.isfinite(variance):
        raise RetrievalError("features are not finite: infinite or NaN.")
    if variance <= 1e-9 * np.mean(mean**2):
        raise RetrievalError("features are all the same: there is nothing to encode.")
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def nearest_codes(
    codes: np.ndarray, queries: np.ndarray, count: int, *, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes by Hamming distance, exactly.

    Blocks of the codes go to the device one after the other, as words of 32 bits; there
    differing bits are found by XOR and counted.

    Args:
      codes: uint8 [N, bytes].
      queries: uint8 [Q, bytes].
      count: how many to find; at most N are.

    Returns:
      (distances int [Q, n] in bits, rows int [Q, n]), the nearest first; of equal
      distances the smaller row.

    Raises:
      RetrievalError: for queries of another length than the codes.
    """
    check_queries(queries, codes, "these codes")
    count = min(count, len(codes))
    block = max(min(block, len(codes)), count)
    words, asked = _words(codes), _words(queries)
    distances = np.zeros((len(queries), count), np.int32)
    rows = np.zeros((len(queries), count), np.int32)
    for i in range(0, len(queries), QUERIES):
        part = asked[i : i + QUERIES]
        best = jnp.full((len(part), count), jnp.inf)
        places = jnp.zeros((len(part), count), jnp.int32)
        for first in range(0, len(codes), block):
            start = min(first, len(codes) - block)
            there = words[start : start + block]
            best, places = _merge(best, places, part, there, start, first)
        distances[i : i + QUERIES], rows[i : i + QUERIES] = best, places
    return distances, rows


def _words(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, bytes] -> uint32 [N, words], filled up with zeros."""
    whole = np.zeros((len(packed), -(-packed.shape[1] // 4) * 4), np.uint8)
    whole[:, : packed.shape[1]] = packed
    return whole.view(np.uint32)


@jax.jit
def _merge(
    best: jax.Array,
    rows: jax.Array,
    queries: jax.Array,
    part: jax.Array,
    start: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The nearest of those so far and of a block of the codes, [Q, n] each."""
    here = jnp.zeros((len(queries), len(part)), jnp.uint32)
    for word in range(part.shape[1]):
        differing = queries[:, word, None] ^ part[:, word]
        here += lax.population_count(differing)
    # As float32, exact up to 2^24 bits: integers would be sorted whole.
    return keep_nearest(best, rows, here.astype(jnp.float32), start, first)


def shortlist(
    features: np.ndarray,
    codes: Codes,
    queries: np.ndarray,
    count: int,
    *,
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest by Euclidean distance among the `size` nearest by code.

    Args:
      features: float32 [N, D].
      codes: of these.
      queries: float32 [Q, D].
      count: how many to find; at most `size` and N are.

    Returns:
      (distances float64 [Q, n], rows int [Q, n]), as `retrieval.nearest`.
    """
    _, rows = nearest_codes(codes.packed, codes.coder.encode(queries), size)
    return rank(features, queries, rows, count)


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the rows `wanted` [Q, K] that are among those `found` [Q, n]."""
    hits = [np.isin(w, f).mean() for f, w in zip(found, wanted, strict=True)]
    return float(np.mean(hits))


def recall_of_rows(
    features: np.ndarray,
    codes: Codes,
    rows: np.ndarray,
    *,
    among: Sequence[int],
    count: int = 10,
) -> list[float]:
    """How many of the `count` exact neighbours of some rows are among the nearest codes.

    A row is not its own neighbour.

    Args:
      features, codes: of an index.
      rows: int [Q], the queries.
      among: of how many nearest codes, one answer each.
    """
    count = min(count, len(features) - 1)
    _, exact = nearest(features, features[rows], count + 1)
    _, found = nearest_codes(codes.packed, codes.packed[rows], max(among) + 1)
    exact, found = _without(exact, rows), _without(found, rows)
    return [recall(found[:, :most], exact) for most in among]


def _without(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[Q, n] -> [Q, n - 1], each query's own row left out, or else the last."""
    others = found != rows[:, None]
    others[:, -1] &= ~others.all(axis=1)
    return found[others].reshape(len(found), -1)
