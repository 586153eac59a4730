"""Caffe's bvlc_alexnet: its network and its solver.

    python -m alexnet_jax.main --config=configs/caffe.py --workdir=runs/caffe

on a prepared `imagenet2012_256`; on a folder of images, add

    --config.data.source=folder:PATH --config.data.eval_split=val

Constants: `models/bvlc_alexnet/solver.prototxt` and `train_val.prototxt` of
github.com/BVLC/caffe: batch 256; learning rate 0.01, of the biases 0.02, divided by ten
every 100,000 iterations, which are 20 epochs of 256; 450,000 iterations, 90 epochs;
momentum 0.9; weight decay 0.0005, none on the biases; random crops of 227 of 256 and
mirror images, no colour noise. The variant `caffe` has the starts: fc6 and fc7 from
N(0, 0.005), biases of 0.1.

Three things are not as there: the shorter side becomes 256 and the central square is
taken (there all is squashed to 256 x 256), the images are shuffled anew every epoch,
and the centre of the mean image is subtracted from every crop (there the part that the
crop was cut from).

Expected on the 50,000 validation images of ILSVRC-2012, not run here: top-1 error
42.9% and top-5 19.8% on the centre view (its readme: 57.1% and 80.2% right).
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
