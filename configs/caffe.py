"""Train Caffe's bvlc_alexnet: its network with its solver.

    python -m alexnet_jax.main --config=configs/caffe.py --workdir=runs/caffe

This trains on a prepared `imagenet2012_256`. For a folder of images, add

    --config.data.source=folder:PATH --config.data.eval_split=val

The constants are from `models/bvlc_alexnet/solver.prototxt` and `train_val.prototxt` of
github.com/BVLC/caffe:

- batch 256; 450,000 iterations, which are 90 epochs
- learning rate 0.01 for weights and 0.02 for biases; both are divided by ten every
  100,000 iterations, which are 20 epochs
- momentum 0.9; weight decay 0.0005, but none on biases
- random crops of 227 of 256, and mirror images; no colour noise
- initial weights of the variant `caffe`: N(0, 0.005) in fc6 and fc7, and biases of 0.1
  where the paper has 1

Three things differ from Caffe:

- The shorter side is resized to 256 and the central square is kept. Caffe squashes the
  whole image to 256 x 256.
- The images are shuffled anew every epoch.
- The centre of the mean image is subtracted from every crop. Caffe subtracts the part of
  the mean image that lies where the crop was cut.

Expected on the 50,000 validation images of ILSVRC-2012: top-1 error 42.9% and top-5 error
19.8% on the centre view. The readme of bvlc_alexnet reports accuracies of 57.1% and 80.2%.
This recipe has not been run here on all of ImageNet.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.data.source = "imagenet2012_256"
    config.data.eval_split = "validation"
    config.data.batch_size = 256
    config.data.crop_size = 227
    config.augment.lighting = 0.0
    config.model.variant = "caffe"
    config.optim.bias_lr_mult = 2.0
    config.optim.decay_bias = False
    config.schedule.name = "fixed"
    config.schedule.drop_epochs = (20.0, 40.0, 60.0, 80.0)
    config.checkpoint.every_steps = 5000
    return config
