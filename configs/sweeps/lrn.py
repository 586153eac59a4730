"""With and without local response normalisation (the paper, section 3.3).

    python launch/sweep.py configs/sweeps/lrn.py --out=runs/lrn --seeds=0,1,2

The paper: without it the top-1 error is 1.4 points higher, the top-5 error 1.2. The
original's logs: 42.03% against 40.66% on ILSVRC-2012 (experiments 148 and 145).

As it stands it runs anywhere, some minutes per run on two CPU cores: the narrowed
network and the embedded images of configs/quickstart.py, which say whether the sweep
works, not whether the paper is right. On ImageNet, the paper's own network and training:
configs/sweeps/paper_table.py. On CIFAR-10: configs/sweeps/cifar10_lrn.py.
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
