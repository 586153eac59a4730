"""ILSVRC-2012: its classes, its archives, and the data set `imagenet2012_256`.

`classes` has the words and the official validation labels, `originals` finds the images
in archives, class folders or tfds, and `preparation` stores them once as 256 x 256 images
in a tfds data set, as the paper did.
"""

from alexnet_jax.data.imagenet.classes import OFFICIAL_COUNTS, class_words, named_wnid, wnids, words

__all__ = ["OFFICIAL_COUNTS", "class_words", "named_wnid", "wnids", "words"]
