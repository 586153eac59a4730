"""Images and labels, from a disk to augmented batches. Nothing here imports TensorFlow.

`sources` opens a split (class folders, tfds data sets, the embedded textures, fake
data), `images` decodes and resizes, `loader` makes batches, `augment` crops them on the
device, and `statistics` computes the mean image and the colour PCA. `imagenet` prepares
ILSVRC-2012, and `check` looks for mistakes that nothing else would show.
"""

from alexnet_jax.data.errors import DataError
from alexnet_jax.data.loader import Batches, eval_batches, train_batches
from alexnet_jax.data.sources import match_classes, open_source, warnings_about

__all__ = [
    "Batches",
    "DataError",
    "eval_batches",
    "match_classes",
    "open_source",
    "train_batches",
    "warnings_about",
]
