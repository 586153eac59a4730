"""Train cuda-convnet's "13%" network on CIFAR-10, from a folder of images.

    python -m alexnet_jax.main --config=configs/cifar10_13.py --workdir=runs/cifar10_13 \
        --config.data.source=folder:PATH

Three things differ from configs/cifar10_11.py:

- The network is that of `layers-conv-local-13pct.cfg`. It has no normalisation and a
  narrower third layer.
- The run takes 160 epochs. The learning rate is divided by ten after 140 and after 150.
  cuda-convnet trains the first 100 epochs on four fifths of the training images.
- The test averages ten views: the centre, the four corners, and the mirror images of these
  five.

`--config=configs/cifar10_13.py:16` trains for 16 epochs.

Expected after 160 epochs: 13% test error over ten views. This has not been run here.
"""

from configs import cifar10_11

DROPS, EPOCHS = (140, 150), 160


def get_config(num_epochs=str(EPOCHS)):
    config = cifar10_11.get_config(num_epochs)
    config.model.variant = "cifar_13"
    config.schedule.drop_epochs = tuple(config.num_epochs * epoch / EPOCHS for epoch in DROPS)
    config.eval_views = 10
    return config
