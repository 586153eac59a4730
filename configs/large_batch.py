"""Batches of 32,768 by LARS: the paper's network with batch normalisation.

    python -m alexnet_jax.main --config=configs/large_batch.py \
        --workdir=runs/large_batch

You, Gitman and Ginsburg 2017, arXiv:1708.03888 (LARS), and You et al. 2017,
arXiv:1709.05011 (batches of 32K; 100 epochs of AlexNet in 11 minutes on 1,024 CPUs).
Constants: `models/alexnet_bn/solver_32k.prototxt` and its `train_val2_fp16.prototxt` of
github.com/borisgin/nvcaffe, by an author of the former: 100 epochs; polynomial of power
2; momentum 0.9; weight decay 0.0005; crops of 227, mirror images, no colour noise; fc6
and fc7 from N(0, 0.005) with biases of 0.1. There the warm-up is ten epochs, from a
thirty-second of the rate; in batches of 16,384 (`solver_16k.prototxt`) five, as here.

There the learning rate is 32 and the trust coefficient 0.001. Kernels see the product
only, 0.032; here it is 2.56 times 0.0125, because 2.56 is also what the parameters
without a trust ratio take: 0.01 at 128 examples, times 256. Batch normalisation is
after conv1 to conv4 there (in conv1 and conv2 after the pooling) and has no parameters;
here it takes the places of the paper's response normalisation, after conv1 and conv2 and
before the pooling. Not as there either: the biases' starts in the convolutions and fc8
(0.01 there), and pixels (divided by 256 there).

NVCaffe's solver of that time (September 2017) differs in three more ways. Its polynomial
counts from iteration 0, not from the end of the warm-up: having risen to its peak the rate
goes on from 0.81 of it (0.90 in batches of 16,384). Its biases decay and take the trust
ratio. Its ratio is |w| / (|g| + 0.0005 |w|); here it is |w| / |g + 0.0005 w|.

A batch is 6.4 GB of images; the devices hold one together, and the host, which decodes
ahead, up to six. Each device takes its share in 32 parts, in evaluations too. Batch
normalisation's statistics are of a part on all devices: 1,024 images, on any number
of them.

Expected on the 50,000 validation images of ILSVRC-2012, not run here: top-1 error
about 41% on the centre view (58.6% right is what arXiv:1709.05011 is quoted with).
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.data.source = "imagenet2012_256"
    config.data.eval_split = "validation"
    config.data.batch_size = 32768
    config.data.crop_size = 227
    config.augment.lighting = 0.0
    config.model.init = "caffe"
    config.model.overrides.normalization = "batch"
    config.num_epochs = 100.0
    config.log_every_steps = 10
    config.optim.learning_rate = 2.56
    config.optim.trust_coefficient = 0.0125
    config.optim.decay_bias = False
    config.optim.accumulate_steps = 32
    config.schedule.name = "polynomial"
    config.schedule.power = 2.0
    config.schedule.warmup_epochs = 5.0
    return config
