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
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alexnet_jax.analysis.retrieval import RetrievalError, rank, read_stored, search
from alexnet_jax.system.cli import progress
from alexnet_jax.system.files import atomic_write

# Training of an autoencoder.
STEPS, BATCH, LEARNING_RATE = 500, 256, 1e-2
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
            centred = jnp.asarray(features[i : i + _ROWS], jnp.float32) - self.mean
            # In full precision: a GPU's tensorfloat32 would give other bits than a CPU.
            inner = jnp.matmul(centred, self.kernel, precision=lax.Precision.HIGHEST)
            packed[i : i + _ROWS] = np.packbits(np.asarray(inner + self.bias > 0), axis=1)
        return packed


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
        with atomic_write(path) as file:
            np.savez(file, packed=self.packed, checksum=self.checksum, **vars(self.coder))


def _checksum(features: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(features).data)


def load_codes(path: str | os.PathLike[str]) -> Codes:
    """Read the file that `Codes.save` wrote.

    Raises:
      RetrievalError: the file is missing, unreadable or holds no codes.
    """
    found = read_stored(path, ("mean", "kernel", "bias", "packed", "checksum"))
    packed, checksum = found.pop("packed"), int(found.pop("checksum"))
    return Codes(Coder(**found), packed, checksum)


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
    features: np.ndarray, *, bits: int = 256, steps: int = STEPS, seed: int = 0
) -> Coder:
    """Train an autoencoder of features with a binary code in its middle.

    Features are centred and divided by one number, the root of their mean variance, so
    that the squared error stays proportional to Euclidean distance. Adam; the learning
    rate falls to 0 as half a cosine. The same features and seed give the same coder on
    the same machine.

    Args:
      features: float32 [N, D].
      bits: length of the code.
      steps: updates, each by `BATCH` rows drawn at random.
      seed: of the initial weights and of the rows.

    Raises:
      RetrievalError: the features are all the same or not finite.
    """
    wide_mean = features.mean(axis=0, dtype=np.float64)
    squares = np.einsum("nd,nd->", features, features, dtype=np.float64)
    variance = squares / features.size - np.mean(wide_mean**2)
    if not variance > 1e-9 * np.mean(wide_mean**2):  # NaN included
        raise RetrievalError(
            "the features are all the same, or not finite: codes need features that differ. Check the "
            "network with --mode=eval."
        )
    mean, scale = wide_mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
    network = _Autoencoder(bits)
    params = network.init(jax.random.key(seed), jnp.zeros((1, len(mean))))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

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
    with progress("codes", steps, "steps") as advance:
        for _ in range(steps):
            batch = features[rng.integers(0, len(features), BATCH)]
            params, opt_state = update(params, opt_state, batch)
            advance(1)
    trained = {name: np.asarray(value) for name, value in params["params"].items()}
    return Coder(mean, trained["kernel"] / scale, trained["bias"])


def nearest_codes(
    codes: np.ndarray, queries: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest codes by Hamming distance, exactly.

    Args:
      codes, queries: uint8 [N, bytes] and [Q, bytes].
      count: how many to find; n = min(count, N).

    Returns:
      (distances int [Q, n] in bits, rows int [Q, n]), the nearest first; ties by row.
    """
    bits, rows = search(_words(codes), _words(queries), count, _differing_bits)
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
