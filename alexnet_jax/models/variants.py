"""The networks as tables: one row per layer, in the order of section 3.5 of the paper.

A row gives the name, features, kernel, stride and padding of a layer, which features of
the layer before it sees, its initial weights, and in `then` the stages that follow.
`layers` explains each field. An ablation changes rows (`ablations`).

Sources:

- "the paper": Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep
  convolutional neural networks", NIPS 2012;
- "the original": layer files of the original program, released by the Computer History
  Museum, with the number of the experiment;
- Caffe: the definitions of `bvlc_alexnet` and `bvlc_reference_caffenet`;
- torchvision's AlexNet, after Krizhevsky, "One weird trick for parallelizing
  convolutional neural networks", arXiv:1404.5997;
- cuda-convnet and cuda-convnet2: `layers-18pct.cfg`, `layers-conv-local-13pct.cfg` and
  `layers-cifar10-11pct.cfg`, their examples for CIFAR-10;
- Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014.
"""

from alexnet_jax.models.layers import (
    Activation,
    Conv,
    Dense,
    Dropout,
    Local,
    Lrn,
    Pool,
    Variant,
    WithinMapLrn,
)

# fmt: off

RELU = Activation("relu")                         # section 3.1
PAPER_LRN = Lrn(5, k=2.0, alpha=1e-4, beta=0.75)  # section 3.3
OVERLAPPING = Pool(window=3, stride=2)            # section 3.4
PAPER_DROPOUT = Dropout(0.5, scale_at="test")     # section 4.2
INVERTED_DROPOUT = Dropout(0.5, scale_at="train")

NORM_POOL = (RELU, PAPER_LRN, OVERLAPPING)
POOLED = (RELU, OVERLAPPING)
DROPPED = (RELU, PAPER_DROPOUT)

# Layers from section 3.5, initial weights and biases from section 5. Images of 224
# pixels give 55 x 55 only if the last window may hang over the edge, as in the original.
PAPER = Variant("paper", columns=2, grid=55, crop_size=224, layers=(
    Conv("conv1",  96, 11, stride=4, padding="ceil", then=NORM_POOL),
    Conv("conv2", 256,  5, padding=2, sees="own", bias=1.0, then=NORM_POOL),
    Conv("conv3", 384,  3, padding=1),
    Conv("conv4", 384,  3, padding=1, sees="own", bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", bias=1.0, then=POOLED),
    Dense("fc6", 4096, bias=1.0, then=DROPPED),
    Dense("fc7", 4096, bias=1.0, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# The paper's one-GPU network (section 3.2): half the kernels, except in the last
# convolution and the fully connected layers, for a similar number of parameters.
ONE_GPU = Variant("one_gpu", columns=1, grid=55, crop_size=224, layers=(
    Conv("conv1",  48, 11, stride=4, padding="ceil", then=NORM_POOL),
    Conv("conv2", 128,  5, padding=2, sees="own", bias=1.0, then=NORM_POOL),
    Conv("conv3", 192,  3, padding=1),
    Conv("conv4", 192,  3, padding=1, sees="own", bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", bias=1.0, then=POOLED),
    Dense("fc6", 4096, bias=1.0, then=DROPPED),
    Dense("fc7", 4096, bias=1.0, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# The original's experiment 145, whose logged errors are the paper's. It differs from the
# paper's text: layer 1 normalises before its activation; alpha is divided by the window;
# layer 2 normalises once more, within each map; conv3 to conv5 start with larger weights.
_MEAN_LRN = Lrn(5, k=2.0, alpha=1e-4, beta=0.75, alpha_mode="mean")
_WITHIN_MAP = WithinMapLrn(5, k=1.0, alpha=1e-3, beta=0.75)
_FIRST = (_MEAN_LRN, OVERLAPPING, RELU)
_SECOND = (RELU, _MEAN_LRN, _WITHIN_MAP, OVERLAPPING)
_LAST = (OVERLAPPING, RELU)
ORIGINAL = Variant("original", columns=2, grid=55, crop_size=224, layers=(
    Conv("conv1",  96, 11, stride=4, padding="ceil", then=_FIRST),
    Conv("conv2", 256,  5, padding=2, sees="own", bias=1.0, then=_SECOND),
    Conv("conv3", 384,  3, padding=1, weight_std=0.03),
    Conv("conv4", 384,  3, padding=1, sees="own", weight_std=0.03, bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", weight_std=0.03, bias=1.0, then=_LAST),
    Dense("fc6", 4096, bias=1.0, then=DROPPED),
    Dense("fc7", 4096, bias=1.0, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# Experiment 150: "like #145 but with no column communication". The columns meet only in
# the classifier. A wider conv2 and fc6 keep the number of parameters similar.
NO_COMMUNICATION = Variant("no_communication", columns=2, grid=55, crop_size=224, layers=(
    Conv("conv1",  96, 11, stride=4, padding="ceil", then=_FIRST),
    Conv("conv2", 320,  5, padding=2, sees="own", bias=1.0, then=_SECOND),
    Conv("conv3", 384,  3, padding=1, sees="own", weight_std=0.03),
    Conv("conv4", 384,  3, padding=1, sees="own", weight_std=0.03, bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", weight_std=0.03, bias=1.0, then=_LAST),
    Dense("fc6", 8192, sees="own", bias=1.0, then=DROPPED),
    Dense("fc7", 4096, sees="own", bias=1.0, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# Experiment 146, the paper's "1 CNN*": "an extra sixth convolutional layer over the
# last pooling layer" (section 6).
SIX_CONV = Variant("six_conv", columns=2, grid=55, crop_size=224, layers=(
    Conv("conv1",  96, 11, stride=4, padding="ceil", then=_FIRST),
    Conv("conv2", 256,  5, padding=2, sees="own", bias=1.0, then=_SECOND),
    Conv("conv3", 384,  3, padding=1, weight_std=0.03),
    Conv("conv4", 384,  3, padding=1, sees="own", weight_std=0.03, bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", weight_std=0.03, bias=1.0, then=_LAST),
    Conv("conv6", 256,  3, padding=1, weight_std=0.03, bias=1.0),
    Dense("fc6", 4096, bias=1.0, then=DROPPED),
    Dense("fc7", 4096, bias=1.0, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# Experiment 147: pooling without overlap that rounds up, and less padding in conv2 and
# conv5. Grids: 55, pooled 28; 26, pooled 13; 13; 13; 11, pooled 6.
_PAIRS = Pool(window=2, stride=2, ceil=True)
_LAST_147 = (_PAIRS, RELU)
_SECOND_147 = (RELU, _MEAN_LRN, _WITHIN_MAP, _PAIRS)
NO_OVERLAP = Variant("no_overlap", columns=2, grid=55, crop_size=224, layers=(
    Conv("conv1",  96, 11, stride=4, padding="ceil", then=(_MEAN_LRN, _PAIRS, RELU)),
    Conv("conv2", 256,  5, padding=1, sees="own", bias=1.0, then=_SECOND_147),
    Conv("conv3", 384,  3, padding=1, weight_std=0.03),
    Conv("conv4", 384,  3, padding=1, sees="own", weight_std=0.03, bias=1.0),
    Conv("conv5", 256,  3, padding=0, sees="own", weight_std=0.03, bias=1.0, then=_LAST_147),
    Dense("fc6", 4096, bias=1.0, then=DROPPED),
    Dense("fc7", 4096, bias=1.0, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# bvlc_alexnet. Its 227 pixels without padding are the paper's 224 with three pixels of
# padding. k is 1, alpha is divided by the window, and the window crosses columns.
CAFFE_LRN = Lrn(5, k=1.0, alpha=1e-4, beta=0.75, alpha_mode="mean", per_column=False)
_CAFFE_NORM_POOL = (RELU, CAFFE_LRN, OVERLAPPING)
_INVERTED = (RELU, INVERTED_DROPOUT)
CAFFE = Variant("caffe", columns=2, grid=55, crop_size=227, layers=(
    Conv("conv1",  96, 11, stride=4, then=_CAFFE_NORM_POOL),
    Conv("conv2", 256,  5, padding=2, sees="own", bias=0.1, then=_CAFFE_NORM_POOL),
    Conv("conv3", 384,  3, padding=1),
    Conv("conv4", 384,  3, padding=1, sees="own", bias=0.1),
    Conv("conv5", 256,  3, padding=1, sees="own", bias=0.1, then=POOLED),
    Dense("fc6", 4096, weight_std=0.005, bias=0.1, then=_INVERTED),
    Dense("fc7", 4096, weight_std=0.005, bias=0.1, then=_INVERTED),
    Dense("fc8", 1000, then=()),
))

# bvlc_reference_caffenet: bvlc_alexnet, but it pools before LRN and has biases of 1.
_POOL_NORM = (RELU, OVERLAPPING, CAFFE_LRN)
CAFFENET = Variant("caffenet", columns=2, grid=55, crop_size=227, layers=(
    Conv("conv1",  96, 11, stride=4, then=_POOL_NORM),
    Conv("conv2", 256,  5, padding=2, sees="own", bias=1.0, then=_POOL_NORM),
    Conv("conv3", 384,  3, padding=1),
    Conv("conv4", 384,  3, padding=1, sees="own", bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", bias=1.0, then=POOLED),
    Dense("fc6", 4096, weight_std=0.005, bias=1.0, then=_INVERTED),
    Dense("fc7", 4096, weight_std=0.005, bias=1.0, then=_INVERTED),
    Dense("fc8", 1000, then=()),
))

# One column, no LRN, dropout before fc6 and fc7: AlexNet as it is usually listed today.
# Its weights start as the paper's, not as torch's. `sees` matters only if an ablation sets
# `columns`.
_POOL_DROP = (RELU, OVERLAPPING, INVERTED_DROPOUT)
ONE_TOWER = Variant("one_tower", columns=1, grid=55, crop_size=224, layers=(
    Conv("conv1",  96, 11, stride=4, padding=2, then=POOLED),
    Conv("conv2", 256,  5, padding=2, sees="own", bias=1.0, then=POOLED),
    Conv("conv3", 384,  3, padding=1),
    Conv("conv4", 384,  3, padding=1, sees="own", bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", bias=1.0, then=_POOL_DROP),
    Dense("fc6", 4096, bias=1.0, then=_INVERTED),
    Dense("fc7", 4096, bias=1.0),
    Dense("fc8", 1000, then=()),
))

# torchvision's AlexNet. "One weird trick" itself has 384 features in conv4.
OWT = Variant("owt", columns=1, grid=55, crop_size=224, layers=(
    Conv("conv1",  64, 11, stride=4, padding=2, then=POOLED),
    Conv("conv2", 192,  5, padding=2, sees="own", bias=1.0, then=POOLED),
    Conv("conv3", 384,  3, padding=1),
    Conv("conv4", 256,  3, padding=1, sees="own", bias=1.0),
    Conv("conv5", 256,  3, padding=1, sees="own", bias=1.0, then=_POOL_DROP),
    Dense("fc6", 4096, bias=1.0, then=_INVERTED),
    Dense("fc7", 4096, bias=1.0),
    Dense("fc8", 1000, then=()),
))

# Zeiler and Fergus's network: a smaller kernel and stride in conv1. Their grids (110, 55,
# 26, 13, 6) need pooling that rounds up.
_ZFNET_POOL_NORM = (RELU, Pool(window=3, stride=2, ceil=True), Lrn(per_column=False))
ZFNET = Variant("zfnet", columns=1, grid=110, crop_size=224, layers=(
    Conv("conv1",  96, 7, stride=2, padding=1, then=_ZFNET_POOL_NORM),
    Conv("conv2", 256, 5, stride=2, then=_ZFNET_POOL_NORM),
    Conv("conv3", 384, 3, padding=1),
    Conv("conv4", 384, 3, padding=1),
    Conv("conv5", 256, 3, padding=1, then=POOLED),
    Dense("fc6", 4096, then=DROPPED),
    Dense("fc7", 4096, then=DROPPED),
    Dense("fc8", 1000, then=()),
))

# cuda-convnet's "18%" network for CIFAR-10: pooling rounds up, and weight decay is 0.004
# in the convolutions and 1 in the classifier. It trains without augmentation.
_MAX = Pool(window=3, stride=2, kind="max", ceil=True)
_AVG = Pool(window=3, stride=2, kind="avg", ceil=True)
_CIFAR_LRN = WithinMapLrn(3, k=1.0, alpha=5e-5, beta=0.75)
_FIRST_18 = (RELU, _MAX, _CIFAR_LRN)
_SECOND_18 = (RELU, _AVG, _CIFAR_LRN)
CIFAR = Variant("cifar", columns=1, grid=32, crop_size=32, layers=(
    Conv("conv1", 32, 5, padding=2, weight_std=1e-4, weight_decay=0.004, then=_FIRST_18),
    Conv("conv2", 32, 5, padding=2, weight_decay=0.004, then=_SECOND_18),
    Conv("conv3", 64, 5, padding=2, weight_decay=0.004, then=(RELU, _AVG)),
    Dense("fc10", 10, weight_decay=1.0, then=()),
))

# cuda-convnet2's "11%" network for CIFAR-10: two convolutions and two locally connected
# layers, on crops of 24 x 24 pixels.
_WIDE_LRN = Lrn(9, k=1.0, alpha=1e-3, beta=0.75, alpha_mode="mean")
_FIRST_11 = (RELU, _MAX, _WIDE_LRN)
_SECOND_11 = (RELU, _WIDE_LRN, _MAX)
CIFAR_11 = Variant("cifar_11", columns=1, grid=24, crop_size=24, layers=(
    Conv("conv1", 64, 5, padding=2, weight_std=1e-4, weight_decay=0.0, then=_FIRST_11),
    Conv("conv2", 64, 5, padding=2, weight_decay=0.0, then=_SECOND_11),
    Local("local3", 64, 3, padding=1, weight_std=0.04, weight_decay=0.004),
    Local("local4", 32, 3, padding=1, weight_std=0.04, weight_decay=0.004),
    Dense("fc10", 10, weight_decay=0.01, then=()),
))

# cuda-convnet's "13%" network: no normalisation, and a local3 of half the width.
CIFAR_13 = Variant("cifar_13", columns=1, grid=24, crop_size=24, layers=(
    Conv("conv1", 64, 5, padding=2, weight_std=1e-4, weight_decay=0.0, then=(RELU, _MAX)),
    Conv("conv2", 64, 5, padding=2, weight_decay=0.0, then=(RELU, _MAX)),
    Local("local3", 32, 3, padding=1, weight_std=0.04, weight_decay=0.004),
    Local("local4", 32, 3, padding=1, weight_std=0.04, weight_decay=0.004),
    Dense("fc10", 10, weight_decay=0.004, then=()),
))

VARIANTS: dict[str, Variant] = {table.name: table for table in (
    PAPER, ORIGINAL, NO_COMMUNICATION, SIX_CONV, NO_OVERLAP, ONE_GPU,
    CAFFE, CAFFENET, ONE_TOWER, OWT, ZFNET, CIFAR, CIFAR_13, CIFAR_11,
)}

# fmt: on


def get(name: str) -> Variant:
    """Return the table of that name.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in VARIANTS:
        raise ValueError(
            f"There is no variant {name!r}; the variants are {', '.join(VARIANTS)}. A table of "
            "your own is --config.model.variant=FILE.py:NAME, or create_model(TABLE)."
        )
    return VARIANTS[name]
