"""CIFAR-10 with and without response normalisation (the paper, section 3.3).

    python launch/sweep.py configs/sweeps/cifar10_lrn.py --out=runs/cifar10_lrn \
        --seeds=0,1,2 --set data.source=folder:PATH

PATH holds CIFAR-10 as for configs/cifar10_11.py. Each run takes 26 epochs, a twentieth of
cuda-convnet2's 520. `configs/sweeps/cifar10_lrn.py:520` trains all 520. The 13% network was
published with 160.

The paper reports a test error of 13% without and 11% with response normalisation, for a
four-layer network. cuda-convnet's two networks with these errors in their names differ in
more than the normalisation. The second row is a fair ablation: the 11% network without its
normalisation. The third row is the 13% network as it was published.
"""

import dataclasses

from alexnet_jax.sweeps import FinalError, Paper, Row, Sweep

PAPER = Paper(
    value=11.0, measured_on="CIFAR-10's test split, several views", source="the paper, section 3.3"
)


def get_sweep(num_epochs="26"):
    without = dataclasses.replace(PAPER, value=13.0, effect=2.0)
    return Sweep(
        about=(
            "Does response normalisation make a network for CIFAR-10 better? Trained for "
            f"{num_epochs} epochs; the published figures are of 520 and 160."
        ),
        config=f"configs/cifar10_11.py:{num_epochs}",
        rows=(
            Row("with LRN", paper=PAPER),
            Row("without LRN", {"model.overrides.lrn": False}, paper=without),
            Row('the "13%" network', config=f"configs/cifar10_13.py:{num_epochs}", paper=without),
        ),
        baseline="with LRN",
        metric=FinalError("eval/views_top1_error"),
        measured_on="CIFAR-10's test split, nine or ten views",
    )
