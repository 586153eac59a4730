"""The constants of local response normalisation, one at a time (the paper, section 3.3).

    python launch/sweep.py configs/sweeps/lrn_constants.py --out=runs/lrn_constants

The paper chose k = 2, n = 5, alpha = 1e-4 and beta = 0.75 on a validation set and publishes
no error of other values. The original program multiplies the mean of the squares by alpha,
not their sum: a fifth of the paper's alpha. Caffe has k = 1, and its window crosses the
columns.

Runs anywhere, some minutes per run on two CPU cores, on the embedded images; see
configs/sweeps/lrn.py for what that does and does not say. On other data:
`--set data.source=folder:PATH`.
"""

from alexnet_jax.sweeps import Row, Sweep
from configs.sweeps import ablations


def get_sweep():
    values = {
        "lrn_size": (3, 9),
        "lrn_k": (1.0, 4.0),
        "lrn_alpha": (2e-5, 5e-4),
        "lrn_beta": (0.5, 1.0),
        "lrn_alpha_mode": ("mean",),
        "lrn_per_column": (False,),
    }
    rows = [
        Row(f"{name}={value}", {f"model.overrides.{name}": value})
        for name, several in values.items()
        for value in several
    ]
    return Sweep(
        about="How much do the constants of response normalisation matter?",
        config="configs/quickstart.py",
        # On two devices in mode columns the window could not cross the columns.
        overrides=ablations.FROM_QUICKSTART,
        rows=(Row("paper"), *rows),
        baseline="paper",
        measured_on="the images of configs/quickstart.py, centre view",
        seeds=(0, 1, 2),
    )
