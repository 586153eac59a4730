"""The ablations of the paper and of the original program's experiments, one per row.

    python launch/sweep.py configs/sweeps/ablations.py --out=DIR --seeds=0,1,2 \
        --set data.dir=DATA

This trains on a prepared `imagenet2012_256`. For a folder of images, add `--set
data.source=folder:PATH --set data.eval_split=val`. 25 networks of 90 epochs take weeks on
one GPU. `paper_table.py`, `layers.py`, `lrn.py` and `overlap.py` train parts of this table.
To combine rows, merge their overrides.

Published values are top-1 errors in per cent over ten views on ILSVRC-2012's validation
images, unless a row says otherwise. The values of "experiment N" are from the logs of the
original program (github.com/computerhistory/AlexNet-Source-Code). Its baseline is
experiment 145 with 40.66%, the run behind the paper's 40.7%. A published effect is the
row's error minus that of the run that its source compares it with. The effect is None if
the two runs differ in something else as well.

All rows have the schedule of configs/paper.py. The experiments' own schedule is in
configs/original.py. The row "original" and the rows with baseline="original" train the
networks of the experiments. The other rows train the network as the paper describes it. It
differs from the networks of experiment 145, and of those made from it, in its response
normalisation and in the initial weights of conv3 to conv5.

These experiments are left out:

- other learning rates over time (155 to 158, 169, 170, and 145 with the rate raised again)
- a low-resolution copy of the image (137)
- the cross-map LRN moved from after pool1 to directly after conv1 (131)
- other images faded in, and exchanges in 16 bits (both 170)
- four GPUs (130)
"""

from alexnet_jax.sweeps import FinalError, Paper, Row, Sweep

VALIDATION = "ILSVRC-2012 validation, ten views"
TEST_2010 = "ILSVRC-2010 test, ten views"
NOT_NAMED = "data that the paper does not name"
BASELINE = "paper"
# Changes to configs/quickstart.py, with which the results of its sweeps were measured. The
# paper's dropout takes five epochs. Every device computes both columns, and all devices
# share the batch.
FROM_QUICKSTART = {
    "num_epochs": 5.0,
    "model.overrides.dropout": 0.5,
    "parallel.mode": "data",
    "parallel.data": -1,
    "parallel.column": -1,
}


def _experiment(number, value, effect, measured_on=VALIDATION):
    source = f"original program, experiment {number}"
    return Paper(value, effect, measured_on, source)


def _columns(overrides):
    """Add mode data: a network of one column cannot be split into columns."""
    return overrides | {"parallel.mode": "data"}


ROWS = {
    row.name: row
    for row in (
        Row(BASELINE, paper=Paper(40.7, None, VALIDATION, "table 2")),
        # Section 3.1: tanh and sigmoid units.
        Row("tanh units", {"model.overrides.activation": "tanh"}),
        Row("sigmoid units", {"model.overrides.activation": "sigmoid"}),
        # Section 3.2: one GPU with half the kernels; columns without communication.
        Row(
            "one GPU",
            _columns({"model.variant": "one_gpu"}),
            _experiment("145-half", 39.17, 1.7, TEST_2010),
        ),
        Row("one column, whole", _columns({"model.overrides.columns": 1})),
        Row(
            "no column communication",
            _columns({"model.variant": "no_communication"}),
            _experiment(150, 41.83, 1.17),
            baseline="original",
        ),
        # Section 3.3: local response normalisation, and its place.
        Row(
            "no LRN",
            {"model.overrides.lrn": False},
            Paper(42.03, 1.4, VALIDATION, "section 3.3; its experiment 148"),
        ),
        Row("LRN before ReLU", {"model.overrides.norm_place": "before"}),
        Row("LRN after conv1 only", {"model.overrides.norm_layers": ("conv1",)}),
        Row("original", {"model.variant": "original"}, _experiment(145, 40.66, None)),
        Row(
            "original, LRN before ReLU",
            {"model.variant": "original", "model.overrides.norm_place": "before"},
            # effect=None: 166 also has other learning rates than 145.
            _experiment(166, 41.10, None),
            baseline="original",
        ),
        Row(
            "original, LRN after conv1 only",
            {"model.variant": "original", "model.overrides.norm_layers": ("conv1",)},
            # effect=None: no logged run has its learning rates and 145's network.
            _experiment(167, 40.49, None),
            baseline="original",
        ),
        Row("batch norm", {"model.overrides.normalization": "batch"}),
        # Section 3.4: pooling.
        Row(
            "no overlap",
            {"model.overrides.pool_window": 2},
            # It is from experiment 147, which also pads less: the row below.
            Paper(None, 0.4, VALIDATION, "section 3.4"),
        ),
        Row(
            "original, no overlap",
            {"model.variant": "no_overlap"},
            _experiment(147, 41.06, 0.40),
            baseline="original",
        ),
        Row("average pooling", {"model.overrides.pool_kind": "avg"}),
        # Section 4: augmentation and dropout.
        Row("no crops, no mirror images", {"augment.crop": False, "augment.flip": False}),
        Row(
            "no colour lighting",
            {"augment.lighting": 0.0},
            Paper(None, 1.0, NOT_NAMED, "section 4.1: over 1%", at_least=True),
        ),
        Row("no dropout", {"model.overrides.dropout": 0.0}),
        # Section 7: "removing any of the middle layers" costs about 2%.
        *(
            Row(
                f"without {layer}",
                {"model.overrides.skip": (layer,)},
                Paper(None, 2.0, NOT_NAMED, "section 7: about 2%"),
            )
            for layer in ("conv2", "conv3", "conv4", "conv5")
        ),
        # Section 6, without the pre-training on all of ImageNet.
        Row("six convolutions", {"model.variant": "six_conv"}, baseline="original"),
        # The network that followed AlexNet (Zeiler and Fergus 2013).
        Row("ZFNet", _columns({"model.variant": "zfnet"})),
    )
}


def rows(*names):
    """Return the baseline and the rows of these names."""
    return tuple(ROWS[name] for name in (BASELINE, *names))


def get_sweep():
    return Sweep(
        about="How much does each of the paper's choices contribute?",
        config="configs/paper.py",
        rows=tuple(ROWS.values()),
        baseline=BASELINE,
        measured_on=VALIDATION,
        metric=FinalError("eval/views_top1_error"),
    )
