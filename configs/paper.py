"""The paper's network, training and data (Krizhevsky et al. 2012).

    python -m alexnet_jax.main --config=configs/paper.py --workdir=runs/paper

on a prepared `imagenet2012_256`; on a folder of pictures, add

    --config.data.source=folder:PATH --config.data.eval_split=val

With two devices or more the network is split into its two columns, as in 2012; with
one it is computed whole, and gives the same numbers.

Expected on ILSVRC-2012 (not run here; the original's log): top-1 error 40.7%, top-5
error 18.2% over ten views of the validation pictures after about 90 epochs.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.data.source = "imagenet2012_256"
    config.data.eval_split = "validation"
    config.parallel.mode = "columns"
    config.checkpoint.every_steps = 5000
    return config
