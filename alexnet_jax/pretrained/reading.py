"""Reads weights from a file, of whichever format."""

import os
from pathlib import Path

from alexnet_jax import variants
from alexnet_jax.pretrained import caffe, safetensors, torchvision
from alexnet_jax.pretrained.files import Weights, WeightsError

# `.pth.tar` is what pytorch/examples writes.
_READERS = {
    ".safetensors": safetensors.read,
    ".caffemodel": caffe.read,
    ".pth.tar": torchvision.read,
    ".pth": torchvision.read,
    ".pt": torchvision.read,
}
SUFFIXES = tuple(_READERS)


def read_weights(
    path: str | os.PathLike[str], *, variant: str | None = None
) -> Weights:
    """Reads a file of weights.

    Args:
      path: a `.caffemodel` (bvlc_alexnet and CaffeNet, any number of classes), a
        `.pth`, `.pt` or `.pth.tar` of torchvision's AlexNet (needs torch), or a
        `.safetensors` of torchvision's or of our own names. The format goes by the
        suffix.
      variant: which network. Only a `.caffemodel` that holds no normalisation layers
        needs it ("caffe" or "caffenet"); any other file says so itself, and is refused
        if it says something else. Narrower networks of the same layers do as well.

    Returns:
      The weights. A foreign file of 1,000 classes is taken to know ImageNet's, in the
      order of their WNIDs.

    Raises:
      WeightsError: (a ValueError) if there is no such file, if it is of another format
        or variant, or damaged; and which tensors are missing, unexpected or of another
        shape.
      ValueError: if there is no variant of that name.
    """
    path = Path(path)
    name = path.name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file.")
    if suffix is None:
        raise WeightsError(
            f"{path}: files of weights are {', '.join(SUFFIXES)}; got "
            f"{path.suffix or 'no suffix'}."
        )
    if variant is not None:
        variants.get(variant)  # a name that there is
    return _READERS[suffix](path, variant)
