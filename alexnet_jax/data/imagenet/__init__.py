"""ILSVRC-2012: its classes, its archives, and the data set `imagenet2012_256`.

`classes` has the words and the official validation labels, `originals` finds the
pictures in archives, class folders or tfds, `preparation` makes 256 x 256 pictures of
them once, as the paper did, and stores them as a tfds data set.
"""

from alexnet_jax.data.imagenet.classes import (
    OFFICIAL_COUNTS,
    class_words,
    named_wnid,
    wnids,
    words,
)

__all__ = ["OFFICIAL_COUNTS", "class_words", "named_wnid", "wnids", "words"]
