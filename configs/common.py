"""Every field of a configuration, its unit, its default and where it comes from.

The other files change what they need: `config = common.get_config()`, then a few
lines. On the command line: `--config.optim.learning_rate=0.02`.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict


def get_config() -> Any:
    config = ConfigDict()
    # Where all randomness starts: initial weights, order, augmentation, dropout.
    config.seed = 0
    # Length of the run in passes over the training split; fractions are fine (paper,
    # section 5: "roughly 90 cycles"). Schedules are laid out over this length.
    config.num_epochs = 90.0
    # Stop after this many steps in all, wherever the schedule is; -1: off.
    config.max_steps = -1
    # Steps between two lines of the log; their metrics are averaged over the steps.
    config.log_every_steps = 100
    # Epochs between two evaluations; there is one more at the end. 0: only that one,
    # with another schedule than plateau.
    config.eval_every_epochs = 1.0
    # Views that the evaluation at the end, and --mode=eval, averages over as well: 10
    # (paper, section 4.1), 9 (cuda-convnet2's of CIFAR-10), or 1: the centre view only.
    config.eval_views = 1
    # End the run when the mean training error over log_every_steps is no higher than
    # this (paper, figure 1: 0.25); 0: off.
    config.stop_at_train_error = 0.0
    # Steps between two summaries, each layer's gradient norm and its share of units
    # that are zero for the whole batch; 0: off. One costs about a step.
    config.summaries_every_steps = 0
    # From this step on, warn once if the loss is still that of guessing, ln(classes);
    # 0: off (Caffe's users waited for 5,000 to 15,000 steps, BVLC/caffe#401).
    config.stall_after_steps = 5000
    # Steps to trace into WORKDIR/profile soon after each start; 0: none.
    config.profile = 0

    config.model = model = ConfigDict()
    # Layer table: paper, original, no_communication, six_conv, no_overlap, one_gpu, caffe,
    # caffenet, one_tower, owt, zfnet, cifar, cifar_13 or cifar_11.
    model.variant = "paper"
    # Units of the classifier; 0: as many as the data set has classes.
    model.num_classes = 0
    # Factor on the features of every layer but the classifier.
    model.width = 1.0
    # What is computed in: float32, bfloat16 or float64; parameters are >= float32.
    model.dtype = "float32"
    # How weights start: paper (as the variant was published), caffe or he.
    model.init = "paper"
    # Ablations, None: as in the table. See `alexnet_jax.ablations`.
    model.overrides = overrides = ConfigDict()
    # False takes normalisation out (paper, section 3.3), True is normalization=lrn.
    overrides.lrn = config_dict.placeholder(bool)
    # Side of every pooling window in pixels; 2: no overlap (paper, section 3.4).
    overrides.pool_window = config_dict.placeholder(int)
    # Stride of every pooling layer in pixels.
    overrides.pool_stride = config_dict.placeholder(int)
    # max or avg, of every pooling layer.
    overrides.pool_kind = config_dict.placeholder(str)
    # Units: relu, tanh or sigmoid (paper, section 3.1).
    overrides.activation = config_dict.placeholder(str)
    # Number of columns the kernels are divided into (paper, section 3.2).
    overrides.columns = config_dict.placeholder(int)
    # Dropout rate, 0: none (paper, section 4.2).
    overrides.dropout = config_dict.placeholder(float)
    # lrn, batch (Ioffe and Szegedy 2015) or none.
    overrides.normalization = config_dict.placeholder(str)
    # The only layers that stay normalised, such as ("conv1",).
    overrides.norm_layers = config_dict.placeholder(tuple)
    # Normalisation before or after the layer's units.
    overrides.norm_place = config_dict.placeholder(str)
    # Convolutional layers to leave out, such as ("conv3",).
    overrides.skip = config_dict.placeholder(tuple)

    config.finetune = finetune = ConfigDict()
    # Trained weights to start from, all but the classifier's: the workdir of a run (DIR,
    # DIR@STEP) or a file that `alexnet_jax.load` reads; empty: from scratch.
    finetune.source = ""
    # Layers that start anew as well, such as ("fc7",). schedule.layer_factors has rates
    # of single layers, and freezes them.
    finetune.new_layers = ()

    config.data = data = ConfigDict()
    # textures | folder:PATH | fake | name[:version] of a prepared tfds data set.
    data.source = "textures"
    # Directory of tfds data sets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    data.dir = ""
    # Split to train on; tfds data sets have slices too, train[:90%].
    data.train_split = "train"
    # Split to evaluate on, empty: none. In folders test, val, validation are one.
    data.eval_split = "test"
    # Examples in a step over ALL devices (paper, section 5: 128). A run keeps it.
    data.batch_size = 128
    # Side of the stored pictures in pixels (paper, section 2: 256).
    data.image_size = 256
    # Side of what the network sees in pixels (paper, section 4.1: 224).
    data.crop_size = 224
    # Threads that decode pictures on the host.
    data.workers = 2

    config.augment = augment = ConfigDict()
    # Crops at random places in training; else the centre (paper, section 4.1).
    augment.crop = True
    # Smallest share of a picture's area that a crop has before it is resized to
    # crop_size (Szegedy et al. 2015: 0.08); 1: crops of crop_size, not resized.
    augment.min_area = 1.0
    # Mirror every other training picture, by chance (paper, section 4.1).
    augment.flip = True
    # Standard deviation of the PCA colour noise; 0: none (paper, section 4.1: 0.1).
    augment.lighting = 0.1
    # paper: added; original: and the image then divided by 1 + its deviation.
    augment.lighting_form = "paper"
    # No colour noise from this epoch on (the original: 67); -1: always.
    augment.lighting_until_epoch = -1.0

    config.optim = optim = ConfigDict()
    # The learning rate itself: nothing scales it (paper, section 5: 0.01 at 128).
    optim.learning_rate = 0.01
    # Share of the velocity that is kept (paper, section 5).
    optim.momentum = 0.9
    # Factor on the weights in the gradient (paper, section 5).
    optim.weight_decay = 5e-4
    # Whether layers that have a weight decay of their own in the table (the CIFAR-10 nets')
    # take that instead.
    optim.layer_weight_decay = True
    # Learning rate of the biases over that of the weights (Caffe: 2).
    optim.bias_lr_mult = 1.0
    # The biases' rate stays bias_lr_mult * learning_rate whatever the schedule does (as
    # in the original's run on ILSVRC-2012).
    optim.constant_bias_lr = False
    # Whether biases, and batch normalisation's scales, decay as well (the original's
    # and Caffe's biases: no; the paper: not said).
    optim.decay_bias = True
    # paper: the learning rate inside the velocity; torch: outside.
    optim.form = "paper"
    # Parts that each device's share of a batch goes through the network in, one after
    # the other: the same run in less memory (but for batch normalisation, which is of
    # each part). 1: all at once.
    optim.accumulate_steps = 1
    # Share of the training target spread evenly over all classes; 0: none (Szegedy et
    # al. 2016: 0.1).
    optim.label_smoothing = 0.0
    # LARS: a kernel's gradient is scaled to this share of the kernel's own norm; 0: off
    # (NVCaffe: 0.001). Not for kernels split over columns.
    optim.trust_coefficient = 0.0

    config.schedule = schedule = ConfigDict()
    # plateau (paper, section 5), fixed, cosine, polynomial or constant.
    schedule.name = "plateau"
    # plateau and fixed: what the learning rate is multiplied by at a drop.
    schedule.factor = 0.1
    # plateau: evaluations without a better top-1 error before a drop.
    schedule.patience = 5
    # plateau: no more drops than this (paper: "reduced three times").
    schedule.max_drops = 3
    # fixed: epochs at which to drop (the original's run on ILSVRC-2012).
    schedule.drop_epochs = (25.0, 51.0, 79.0)
    # Factors on single layers' rates, each (layer, from which epoch, factor); a factor
    # of 0 freezes the layer.
    schedule.layer_factors = ()
    # cosine and polynomial: epochs of linear rise at the start.
    schedule.warmup_epochs = 0.0
    # polynomial: the power of 1 - t, t from 0 after the rise to 1 at the end of the run
    # (You et al. 2017: 2).
    schedule.power = 2.0

    config.parallel = parallel = ConfigDict()
    # data: every device the whole network; columns: the paper's scheme (3.2); hybrid:
    # convolutions as data, fully connected layers split (arXiv:1404.5997).
    parallel.mode = "data"
    # Devices along the batch; -1: all that the columns leave.
    parallel.data = -1
    # Devices along the columns; -1: in mode columns one a column if there are as many
    # devices, in mode hybrid all there are, else 1.
    parallel.column = -1
    # shard_map, or pmap (mode data only; the same numbers).
    parallel.transform = "shard_map"

    config.checkpoint = checkpoint = ConfigDict()
    # Steps between two checkpoints; 0: off.
    checkpoint.every_steps = 0
    # Minutes between two checkpoints; 0: off. There is always one at the end, and one
    # at each evaluation that is the best so far.
    checkpoint.every_minutes = 15.0
    # Newest checkpoints to keep, beside the best.
    checkpoint.keep = 2
    return config
