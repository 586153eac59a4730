"""CIFAR-10 with cuda-convnet's "13%" network, from a folder of pictures.

    python -m alexnet_jax.main --config=configs/cifar10_13.py --workdir=runs/cifar10_13 \
        --config.data.source=folder:PATH

As configs/cifar10_11.py, but for the network (`layers-conv-local-13pct.cfg`: no
normalisation, and a narrower third layer) and for the test, which averages ten views:
the centre, the four corners, and the five mirrored. `:26` makes it 26 epochs.

Expected after 520 epochs, not run here: 13% test error over ten views.
"""

from configs import cifar10_11


def get_config(num_epochs=str(cifar10_11.EPOCHS)):
    config = cifar10_11.get_config(num_epochs)
    config.model.variant = "cifar_13"
    config.eval_views = 10
    return config
