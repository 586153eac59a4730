"""Short binary codes of features: an autoencoder, Hamming search, exact re-ranking.

"Computing similarity by using Euclidean distance between two 4096-dimensional,
real-valued vectors is inefficient, but it could be made efficient by training an
auto-encoder to compress these vectors to short binary codes" (the paper, section 6.1).

Training rounds the codes to 0 or 1 in the forward pass, but not in the backward pass
(Krizhevsky and Hinton, Using very deep autoencoders for content-based image retrieval,
ESANN 2011).
"""

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

from alexnet_jax.analysis.retrieval import RetrievalError, nearest, rank, search
from alexnet_jax.system.files import atomic_write, read_npz

# Codes on the device at once.
BLOCK = 16384
# Updates of an autoencoder in training.
STEPS = 500
# Rows that are encoded at once.
_ROWS = 4096


@dataclass(frozen=True)
class Coder:
    """The encoder of a trained autoencoder: on which side of each plane features lie.

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
        """Return the codes uint8 [N, ceil(bits / 8)] of features float32 [N, D]."""
        packed = np.empty((len(features), -(-self.bits // 8)), np.uint8)
        for i in range(0, len(features), _ROWS):
            part = jnp.asarray(features[i : i + _ROWS], jnp.float32)
            bits = _bits(part, self.mean, self.kernel, self.bias)
            packed[i : i + _ROWS] = np.packbits(np.asarray(bits), axis=1)
        return packed


@jax.jit
def _bits(features: jax.Array, mean: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    # In full precision: a GPU's tensorfloat32 would give other bits than a CPU.
    centred = features - mean
    return jnp.matmul(centred, kernel, precision=lax.Precision.HIGHEST) + bias > 0


@dataclass(frozen=True)
class Codes:
    """The codes of an index, uint8 [N, ceil(bits / 8)], and the coder for queries.

    `checksum` is the CRC-32 of the features that were encoded.
    """

    coder: Coder
    packed: np.ndarray
    checksum: int

    @classmethod
    def of(cls, coder: Coder, features: np.ndarray) -> "Codes":
        """Return the codes of features [N, D]."""
        return cls(coder, coder.encode(features), _checksum(features))

    def are_of(self, features: np.ndarray) -> bool:
        """Return True if these features [N, D] were encoded, to the bit."""
        shape = (len(self.packed), len(self.coder.mean))
        return shape == features.shape and self.checksum == _checksum(features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz atomically, for `load_codes` and NumPy."""
        checksum = np.uint32(self.checksum)
        with atomic_write(path) as file:
            np.savez(file, packed=self.packed, checksum=checksum, **vars(self.coder))


def _checksum(features: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(features).data)


def load_codes(path: str | os.PathLike[str]) -> Codes:
    """Read the file that `Codes.save` wrote; never through pickle.

    Raises:
      RetrievalError: the file is missing, unreadable or holds no codes.
    """
    names = ("mean", "kernel", "bias", "packed", "checksum")
    found = read_npz(path, names, RetrievalError)
    if missing := [name for name in names if name not in found]:
        raise RetrievalError(
            f"{path} holds no codes: it has no {', '.join(missing)}. Remove it, and it "
            "is made again."
        )
    coder = Coder(found["mean"], found["kernel"], found["bias"])
    return Codes(coder, found["packed"], int(found["checksum"]))


class _Autoencoder(nn.Module):
    """Encode features as a binary code and decode it with the same weights.

    Separate decoder weights reconstruct better, but Hamming distance does not see what
    they learn.
    """

    bits: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = features.shape[1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.bits))
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
    """Train an autoencoder of features with a binary code in its middle.

    Features are centred and divided by one number, the root of their mean variance, so
    that the squared error stays proportional to Euclidean distance. Adam; the learning
    rate falls to 0 as half a cosine. The same features and seed give the same coder on
    the same machine.

    Args:
      features: float32 [N, D].
      bits: length of the code, shorter than the features themselves, 32 D.
      rows: int, the rows to learn from; None: all.
      steps: updates, each by `batch_size` rows drawn at random.
      learning_rate: at the start.
      seed: of the initial weights and of the rows.
      progress: called with the number of steps done since its last call.

    Raises:
      RetrievalError: the code is not shorter than the features, or these are all the
        same or not finite.
    """
    width = features.shape[1]
    if not 1 <= bits < 32 * width:
        raise RetrievalError(
            f"a code of {bits} bits: it must have at least 1 and be shorter than the "
            f"features, {width:,} numbers of 32 bits."
        )
    rows = np.arange(len(features)) if rows is None else rows
    known = features[rows]
    wide_mean = known.mean(axis=0, dtype=np.float64)
    squares = np.einsum("nd,nd->", known, known, dtype=np.float64)
    variance = squares / known.size - np.mean(wide_mean**2)
    if not variance > 1e-9 * np.mean(wide_mean**2):  # NaN included
        raise RetrievalError("features are all the same, or not finite.")
    scale = np.sqrt(variance).astype(np.float32)
    mean = wide_mean.astype(np.float32)
    network = _Autoencoder(bits)
    params = network.init(jax.random.key(seed), jnp.zeros((1, len(mean))))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

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
        batch = features[rows[rng.integers(0, len(rows), batch_size)]]
        params, opt_state = update(params, opt_state, batch)
        if progress is not None:
            progress(1)
    trained = params["params"]
    return Coder(
        mean=mean, kernel=np.asarray(trained["kernel"]) / scale, bias=np.asarray(trained["bias"])
    )


def nearest_codes(
    codes: np.ndarray, queries: np.ndarray, count: int, *, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest codes by Hamming distance, exactly.

    Args:
      codes: uint8 [N, bytes]; compared on the device in blocks.
      queries: uint8 [Q, bytes].
      count: how many to find; n = min(count, N).

    Returns:
      (distances int [Q, n] in bits, rows int [Q, n]), the nearest first; ties by row.
    """
    count = min(count, len(codes))
    bits, rows = search(_words(codes), _words(queries), count, block, _differing_bits)
    return bits.astype(np.int32), rows


def _differing_bits(queries: jax.Array, part: jax.Array) -> jax.Array:
    different = jnp.zeros((len(queries), len(part)), jnp.uint32)
    for word in range(part.shape[1]):
        different += lax.population_count(queries[:, word, None] ^ part[:, word])
    # As float32, exact up to 2^24 bits: top_k would sort integers whole.
    return different.astype(jnp.float32)


def _words(packed: np.ndarray) -> np.ndarray:
    """Return codes uint8 [N, bytes] as uint32 [N, words], padded with zeros."""
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return np.ascontiguousarray(padded).view(np.uint32)


def shortlist(
    features: np.ndarray, codes: Codes, queries: np.ndarray, count: int, *, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest by Euclidean distance among the `size` nearest by code.

    `features` and `codes` are of one index, `queries` are float32 [Q, D]. Returns
    (distances float64 [Q, n], rows int [Q, n]), as `retrieval.nearest`.
    """
    _, rows = nearest_codes(codes.packed, codes.coder.encode(queries), size)
    return rank(features, queries, rows, count)


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of the rows `wanted` [Q, K] that are among `found` [Q, n]."""
    hits = [np.isin(w, f).mean() for f, w in zip(found, wanted, strict=True)]
    return float(np.mean(hits))


def recall_of_rows(
    features: np.ndarray, codes: Codes, rows: np.ndarray, *, among: Sequence[int], count: int = 10
) -> list[float]:
    """Return the share of exact neighbours that the nearest codes hold.

    The queries are the rows int [Q] of an index; a row is not its own neighbour. The
    exact neighbours are the `count` nearest by features; there is one share for each
    number of nearest codes in `among`.
    """
    count = min(count, len(features) - 1)
    _, exact = nearest(features, features[rows], count + 1)
    _, found = nearest_codes(codes.packed, codes.packed[rows], max(among) + 1)
    exact, found = _without(exact, rows), _without(found, rows)
    return [recall(found[:, :most], exact) for most in among]


def _without(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Drop each query's own row, or else the last one: [Q, n] -> [Q, n - 1]."""
    others = found != rows[:, None]
    others[:, -1] &= ~others.all(axis=1)
    return found[others].reshape(len(found), -1)
