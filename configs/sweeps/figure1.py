"""How much sooner ReLU learns than saturating units (the paper, figure 1).

    python launch/sweep.py configs/sweeps/figure1.py --out=runs/figure1 \
        --set data.source=folder:PATH

PATH holds CIFAR-10 as for configs/cifar10.py. Each seed takes eleven runs. ReLU and tanh
have three learning rates each, sigmoid has four, and the best one counts. One more run
trains sigmoid for longer at its best rate. A run ends at 25% training error, or after 20
epochs (ReLU, sigmoid) or 60 (tanh, the longer sigmoid). An epoch takes half a minute to a
minute on two CPU cores, so the sweep takes hours. `configs/sweeps/figure1.py:sigmoid` trains
one kind of unit alone, `:relu,tanh` two.

The paper reports that a four-layer network with ReLU reaches 25% training error six times
sooner than one with tanh. Each has its own learning rate, and there is no regularisation.
The paper does not publish that network. The stand-in is cuda-convnet's "18%" network
(configs/cifar10.py, three convolutions and a classifier) with other units, without weight
decay and without augmentation. Sigmoids are not in the figure. They hardly learn with the
initial weights of the table, N(0, 0.01).
"""

from alexnet_jax.sweeps import EpochsTo, Paper, Row, Sweep

TARGET = 0.25


def get_sweep(units="relu,tanh,sigmoid"):
    chosen = units.split(",")
    unknown = sorted(set(chosen) - {"relu", "tanh", "sigmoid"})
    if unknown:
        raise ValueError(f"unknown units {', '.join(unknown)}; choose from relu, tanh and sigmoid.")
    return Sweep(
        about="How many epochs until a training error of 25%, by the kind of unit?",
        config="configs/cifar10.py",
        overrides={
            "num_epochs": 60.0,
            "stop_at_train_error": TARGET,
            "schedule.name": "constant",
            "schedule.drop_epochs": (),
            "optim.weight_decay": 0.0,
            "optim.layer_weight_decay": False,
            "log_every_steps": 98,  # a quarter of an epoch
            "eval_every_epochs": 0.0,
        },
        rows=tuple(row for row in _rows() if row.name.split()[0] in chosen),
        baseline="relu" if "relu" in chosen else chosen[0],
        metric=EpochsTo(TARGET),
        compare="ratio",
        measured_on="CIFAR-10's training split, a stand-in network",
    )


def _rows():
    tanh = Paper(
        effect=6.0,
        measured_on="CIFAR-10, an unpublished four-layer network",
        source="the paper, section 3.1 and figure 1",
    )
    sigmoids = {"model.overrides.activation": "sigmoid"}
    return (
        Row("relu", {"num_epochs": 20.0}, search={"optim.learning_rate": (1e-3, 3e-3, 1e-2)}),
        Row(
            "tanh",
            {"model.overrides.activation": "tanh"},
            search={"optim.learning_rate": (3e-3, 1e-2, 3e-2)},
            paper=tanh,
        ),
        Row("sigmoid for longer", {**sigmoids, "optim.learning_rate": 1e-1}),
        Row(
            "sigmoid",
            {**sigmoids, "num_epochs": 20.0},
            search={"optim.learning_rate": (3e-2, 1e-1, 3e-1, 1.0)},
        ),
    )
