"""Train in batches of 32,768 with LARS: the paper's network with batch normalisation.

    python -m alexnet_jax.main --config=configs/large_batch.py \
        --workdir=runs/large_batch

Sources: You, Gitman and Ginsburg 2017, arXiv:1708.03888 (LARS), and You et al. 2017,
arXiv:1709.05011 (batches of 32K; 100 epochs of AlexNet in 11 minutes on 1,024 CPUs).

The constants are from `models/alexnet_bn/solver_32k.prototxt` and its
`train_val2_fp16.prototxt` of github.com/borisgin/nvcaffe, by an author of the first paper:

- 100 epochs; polynomial schedule of power 2
- momentum 0.9; weight decay 0.0005
- crops of 227, and mirror images; no colour noise
- initial weights of fc6 and fc7 from N(0, 0.005), with biases of 0.1

The warm-up takes five epochs, as in `solver_16k.prototxt` for batches of 16,384. In
`solver_32k.prototxt` it takes ten epochs and starts at a thirty-second of the rate.

NVCaffe's learning rate is 32 and its trust coefficient 0.001. Only the product of the two,
0.032, matters for kernels. Here the two are 2.56 and 0.0125, which have the same product.
Parameters without a trust ratio take 2.56 itself. It is 0.01, the rate for 128 examples,
times 256.

The network and its input differ from NVCaffe's:

- Batch normalisation replaces the paper's response normalisation, after conv1 and conv2
  and before the pooling. In NVCaffe it follows conv1 to conv4, and in conv1 and conv2 it
  follows the pooling. There it has no parameters.
- NVCaffe's initial biases are 0.01 in the convolutions and in fc8. Here they are 0.1 in
  conv2, conv4 and conv5 and 0 in the others.
- NVCaffe divides pixels by 256. Here they are not divided.

NVCaffe's solver of September 2017 differs in three more ways:

- Its polynomial counts from iteration 0. Ours counts from the end of the warm-up. After
  the warm-up, NVCaffe's rate falls from 0.81 of its peak (0.90 in batches of 16,384).
- Its biases decay and take the trust ratio.
- Its trust ratio is |w| / (|g| + 0.0005 |w|). Ours is |w| / |g + 0.0005 w|.

The images of one batch take 6.4 GB. All devices together hold one batch. The host decodes
ahead and holds up to six. Each device computes its share in 32 parts, in evaluations too.
Batch normalisation takes its statistics from one part on all devices: 1,024 images,
however many devices there are.

Expected on the 50,000 validation images of ILSVRC-2012: top-1 error about 41% on the centre
view. arXiv:1709.05011 is quoted with an accuracy of 58.6%. This recipe has not been run
here on all of ImageNet.
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
