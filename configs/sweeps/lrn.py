"""With and without local response normalisation (the paper, section 3.3).

    python launch/sweep.py configs/sweeps/lrn.py --out=runs/lrn --seeds=0,1,2

The paper reports that without it the top-1 error is 1.4 points higher and the top-5 error
1.2. The original's logs have 42.03% without and 40.66% with it on ILSVRC-2012 (experiments
148 and 145).

This sweep runs anywhere and takes some minutes per run on two CPU cores. It trains the
narrow network of configs/quickstart.py on the embedded images. The results show that the
sweep works. They do not test the paper's claim. configs/sweeps/paper_table.py trains
the paper's own network on ImageNet, and configs/sweeps/cifar10_lrn.py trains on CIFAR-10.
"""

from alexnet_jax.sweeps import Sweep
from configs.sweeps import ablations


def get_sweep():
    return Sweep(
        about="Does response normalisation make the network better?",
        config="configs/quickstart.py",
        overrides=ablations.FROM_QUICKSTART,
        rows=ablations.rows("no LRN"),
        baseline=ablations.BASELINE,
        measured_on="the images of configs/quickstart.py, centre view",
        seeds=(0, 1, 2),
    )
