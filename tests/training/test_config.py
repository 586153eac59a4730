"""Config: types, ranges, conflicting fields, config files, command lines."""

import importlib
import inspect
import itertools
import math
import re
from pathlib import Path

import pytest

from alexnet_jax import main
from alexnet_jax.models.ablations import ABLATIONS
from alexnet_jax.models.alexnet import create_model
from alexnet_jax.training.config import RANGES, ConfigError, flat, get_config, mesh_shape, validate

ROOT = Path(__file__).parents[2]
DEFAULTS = flat(get_config().to_dict())
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def config_with(**changes):
    """Return the defaults on one device with changes: data__batch_size=3, ..."""
    config = get_config()
    config.parallel.data = 1
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_valid_and_have_only_known_fields(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert flat(config.to_dict()).keys() == DEFAULTS.keys()
    validate(config)  # on the eight devices of the tests


@pytest.mark.parametrize("field", DEFAULTS)
def test_every_field_is_read(field):
    group, _, name = field.rpartition(".")
    if group == "model":  # passed on by name
        # `from_settings` turns the stored table into the variant.
        assert name in {"table", *inspect.signature(create_model).parameters}
        return
    if group == "model.overrides":
        assert name in ABLATIONS
        return
    files = (ROOT / "alexnet_jax/training").glob("*.py")
    code = "".join(file.read_text() for file in files if file.stem != "config")
    code += inspect.getsource(mesh_shape)
    owner = {"": "config", "augment": "fields"}.get(group, group)
    assert re.search(rf"\b{owner}\.{name}\b", code), field


def test_every_field_has_a_comment():
    source = inspect.getsource(get_config).splitlines()
    for before, line in itertools.pairwise(source):
        if re.match(r"    \w+(\.\w+)* = ", line) and "ConfigDict()" not in line:
            assert before.lstrip().startswith("#"), line


@pytest.mark.parametrize("field", RANGES)
def test_every_range_holds_its_default_and_refuses_a_value(field):
    holds, words = RANGES[field]
    default = DEFAULTS[field]
    assert holds(default)
    assert not isinstance(default, float) or not holds(math.nan)
    bad = {str: "nonsense", tuple: (3.0, 2.0), float: -2.0, int: -2}[type(default)]
    message = f"  - --config.{field}={bad!r} must be {words}."
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config_with(**{field: bad}), devices=False)


WRONG = {
    bool: (3, "x", None),
    int: (True, 0.5, "x", None),
    float: ("x", (0.5,), None),
    str: (3, True, None),
    tuple: ("x", 3, None),
}


@pytest.mark.parametrize("field", DEFAULTS)
def test_every_field_refuses_another_type(field):
    """Try every type: ml_collections refuses most, `validate` None and True for a number."""
    *path, name = field.split(".")
    group = get_config()
    for part in path:
        group = group[part]
    for value in WRONG[group.get_type(name)]:
        if "overrides." in field and value in (None, True):
            continue
        with pytest.raises((TypeError, ConfigError), match=name):
            validate(config_with(**{field: value}), devices=False)


def test_all_mistakes_are_reported_at_once():
    config = config_with(
        optim__momentum=1.5,
        data__crop_size=300,
        schedule__name="step",
        model__variant="alexnet",
        model__init="zero",
        num_epochs=math.inf,
    )
    with pytest.raises(ConfigError) as error:
        validate(config)
    message = str(error.value)
    assert message.startswith("6 mistakes in the config:")
    for words in (
        "--config.optim.momentum=1.5 must be 0 to below 1.",
        "--config.data.crop_size=300 is larger than --config.data.image_size=256.",
        "--config.schedule.name='step' must be one of constant, plateau, fixed, cosine",
        "There is no variant 'alexnet'; the variants are paper",
        "init='zero' must be one of paper, caffe, he.",
        "--config.num_epochs=inf must be above 0 and finite.",
    ):
        assert words in message


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"data__batch_size": 10, "parallel__data": 4},
            "batch_size=10 does not divide over 4 devices; the nearest that do: 8 or",
        ),
        (
            {"data__batch_size": 4, "optim__accumulate_steps": 8},
            r"over 1 devices in .* the nearest that do: 8\.$",
        ),
        ({"parallel__data": 16}, r"Asked for 16 devices \(16 data x 1 column\), found"),
        ({"data__crop_size": 200}, "from images of 224 to 227 pixels; images of 200"),
        (
            {"model__variant": "caffe", "data__crop_size": 227}
            | {"parallel__mode": "columns", "parallel__column": 2},
            "'caffe' cannot be split over 2 columns: its local response",
        ),
        (
            {"schedule__warmup_epochs": 100.0, "schedule__name": "cosine"},
            "must be below --config.num_epochs=90",
        ),
        ({"model__dtype": "float64"}, "needs JAX_ENABLE_X64=1"),
        ({"model__init": "xavier"}, "init='xavier' must be one of paper, caffe, he"),
        ({"seed": True}, "seed=True must be of type int, as its default 0"),
        ({"finetune__new_layers": ("fc9",), "finetune__source": "DIR"},
         "new_layers: 'fc9' must be one of conv1, conv2"),
        ({"parallel__mode": "hybrid", "parallel__column": 3},
         "4096 units of fc6 do not divide by 3"),
        ({"parallel__mode": "columns", "parallel__transform": "pmap"},
         "transform=pmap splits nothing but the batch"),
        ({"schedule__layer_factors": (("conv9", 1.0, 0.1),)},
         r"layer_factors: .'conv9'.*the layer one of conv1, conv2"),
        ({"schedule__layer_factors": (("conv1", 5.0, 0.1), ("conv1", 5.0, 0.0))},
         "its epochs 0 or more and increasing"),
        ({"schedule__layer_factors": ("conv1", 5.0, 0.1)}, "must be .layer, epoch"),
    ],
)  # fmt: skip
def test_each_mistake_is_reported(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        validate(config_with(**changes))
    assert str(error.value).startswith("1 mistake in the config:")


COSINE = {"schedule__name": "cosine"}
# Changes to the defaults -> part of the message.
IDLE = [
    ({"schedule__warmup_epochs": 5.0},
     ("--config.schedule.warmup_epochs=5.0 has no effect: it needs schedule.name=cosine or "
      "polynomial, or to be left at 0.0.")),
    (COSINE | {"schedule__factor": 0.5}, "it needs schedule.name=plateau or fixed"),
    (COSINE | {"schedule__patience": 2}, "it needs schedule.name=plateau, or to be left at 5"),
    (COSINE | {"schedule__max_drops": 2}, "it needs schedule.name=plateau, or to be left at 3"),
    (COSINE | {"schedule__drop_epochs": (2.0,)}, "drop_epochs=(2.0,) has no effect"),
    (COSINE | {"schedule__power": 3.0}, "it needs schedule.name=polynomial"),
    ({"schedule__layer_factors": (("conv1", 90, 0.1),)}, "an epoch before num_epochs=90.0"),
    ({"schedule__name": "fixed", "num_epochs": 25.0},
     "drop_epochs=(25.0, 51.0, 79.0) are all after the end, --config.num_epochs=25.0"),
    ({"data__eval_split": ""},
     ("'plateau' lowers the learning rate by evaluations; --config.data.eval_split='' with "
      "--config.eval_every_epochs=1.0 leaves none. Take constant or cosine, or "
      "--config.schedule.max_drops=0.")),
    (COSINE | {"data__eval_split": "", "eval_every_epochs": 2.0},
     "eval_every_epochs=2.0 has no effect: it needs data.eval_split"),
    ({"augment__min_area": 0.5, "augment__crop": False}, "it needs augment.crop=True"),
    ({"augment__lighting": 0.0, "augment__lighting_form": "original"}, "lighting above 0"),
    ({"augment__lighting_until_epoch": 90.0}, "it needs to be below num_epochs=90.0"),
    ({"optim__momentum": 0.0, "optim__form": "torch"}, "form='torch' has no effect"),
    ({"model__variant": "cifar", "data__image_size": 32, "data__crop_size": 32,
      "optim__weight_decay": 0.0}, "a layer without a weight decay of its own"),
    ({"schedule__name": "constant", "optim__constant_bias_lr": True}, "another schedule"),
    ({"eval_every_epochs": 100.0}, "it needs at most num_epochs=90.0"),
    ({"data__image_size": 224, "eval_views": 10}, "data.image_size above data.crop_size"),
    ({"finetune__new_layers": ("fc7",)}, "it needs finetune.source"),
    ({"data__dir": "DATA", "data__source": "folder:PATH"}, "dir='DATA' has no effect"),
    ({"model__variant": "cifar_13", "model__overrides__dropout": 0.5,
      "data__image_size": 32, "data__crop_size": 24},
     "dropout=0.5 has no effect: it needs a network with dropout, or to be left out."),
    ({"model__overrides__norm_place": "before", "model__overrides__lrn": False},
     "norm_place='before' has no effect: it needs a network with normalisation"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", IDLE)
def test_field_without_effect_is_refused_in_training_only(changes, words):
    config = config_with(**changes)
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        validate(config)
    assert str(error.value).startswith("1 mistake in the config:")
    validate(config, training=False)


def test_fields_with_an_effect_are_accepted():
    for changes in (
        COSINE | {"schedule__warmup_epochs": 5.0, "eval_every_epochs": 0.0},
        COSINE | {"data__eval_split": "", "schedule__drop_epochs": ()},
        {"data__eval_split": "", "schedule__max_drops": 0, "eval_views": 10},
        {"schedule__name": "fixed", "num_epochs": 26.0, "schedule__factor": 0.5},
        {"schedule__layer_factors": (("conv1", 9.0, 0.1), ("conv1", 95.0, 0.0))},
        {"optim__weight_decay": 0.0, "optim__decay_bias": False},
        {"data__dir": "DATA"},
        {"model__overrides__norm_place": "after", "model__overrides__dropout": 0.5},
        {"finetune__source": "runs/a", "finetune__new_layers": ["fc7"]},
    ):
        validate(config_with(**changes))


# The command line and config files.


def parsed(*arguments):
    """Return the config of a command line, as main has it."""
    return main.read_config(*main._parser().parse_known_args(arguments))


TINY = f"--config={ROOT}/configs/tiny.py"


def test_fields_on_the_command_line():
    config = parsed(
        *(TINY, "--config.model.overrides.skip=('conv3',)", "--config.parallel.data", "-1"),
        *(
            "--config.schedule.drop_epochs=(1.0, 2.0)",
            "--config.augment.crop",
            "--noconfig.augment.flip",
        ),
        "--config.data.source=folder:a=b c",
    )
    assert config.model.overrides.skip == ("conv3",)
    assert config.schedule.drop_epochs == (1.0, 2.0)
    assert config.parallel.data == -1
    assert (config.augment.crop, config.augment.flip) == (True, False)
    assert config.data.source == "folder:a=b c"


def test_all_mistakes_of_a_command_line_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        parsed(
            *(TINY, "--config.model.widht=1", "--config.data.batch_sice", "5"),
            *("--config.seed=x", "--config.optim.momentum=2.0", "stray", "--nosuch=1"),
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "6 mistakes in the config:"
    for line, words in zip(
        lines[1:],
        (
            "--config.model.widht: there is no such field; did you mean --config.model.width?",
            "--config.data.batch_sice: there is no such field; did you mean --config.data.batch_size?",
            "flag --config.seed=x: ",
            "stray: there is no such field. Fields are --config.FIELD=VALUE.",
            "--nosuch: there is no such field",
            "--config.optim.momentum=2.0 must be 0 to below 1.",
        ),
        strict=True,
    ):
        assert line.startswith(f"  - {words}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "--workdir=DIR"], "argument --config: expected one argument"),
        (["--config="], "--config=FILE is missing"),
        (["--config=configs/none.py"], "none.py: there is no such file in "),
        ([f"--config={ROOT}/configs/sweeps/ablations.py"], "ablations.py defines no get_config()"),
    ],
)
def test_wrong_config_file_is_named(arguments, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        parsed(*arguments)


@pytest.mark.parametrize("error", ["ValueError", "AttributeError"])
def test_error_in_a_config_file_keeps_its_traceback(error, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"def get_config():\n    raise {error}('mine')\n")
    with pytest.raises(Exception, match="^mine$") as raised:
        parsed(f"--config={path}")
    assert raised.typename == error
    last = raised.traceback[-1]
    assert (Path(last.path), last.lineno + 1) == (path, 2)
