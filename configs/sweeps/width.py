"""A narrower network.

    python launch/sweep.py configs/sweeps/width.py --out=runs/width --seeds=0,1,2
    python launch/sweep.py configs/sweeps/width.py --out=runs/width \
        --set data.source=folder:PATH num_epochs=30.0

The paper's network with a quarter and a half of its features in every layer but the
classifier, all from He's start, which trains at any width. Runs anywhere on the embedded
images of configs/quickstart.py: a quarter takes some minutes on two CPU cores, the whole
some ten times as long. The paper has no such experiment.
"""

from alexnet_jax.sweeps import Row, Sweep
from configs.sweeps import ablations

WIDTHS = (0.25, 0.5, 1.0)


def get_sweep():
    return Sweep(
        about="How much worse is a narrower network?",
        config="configs/quickstart.py",
        overrides={"model.init": "he", **ablations.FROM_QUICKSTART},
        rows=tuple(Row(f"width {w:g}", {"model.width": w}) for w in WIDTHS),
        baseline="width 1",
        measured_on="the images of configs/quickstart.py, centre view",
    )
