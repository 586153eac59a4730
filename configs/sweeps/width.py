"""The paper's network at a quarter, a half and all of its width.

    python launch/sweep.py configs/sweeps/width.py --out=runs/width --seeds=0,1,2
    python launch/sweep.py configs/sweeps/width.py --out=runs/width \
        --set data.source=folder:PATH num_epochs=30.0

The width is the fraction of features in every layer but the classifier. All rows use He
initialisation, which trains at any width. The paper has no such experiment.

This sweep runs anywhere on the embedded images of configs/quickstart.py. At a quarter of
the width a run takes some minutes on two CPU cores, at full width some ten times as long.
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
