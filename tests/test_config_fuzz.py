"""Configs of any values: what is wrong is said in a sentence, and the rest can be built.

Every field gets values of every type that a config file, a command line or a stored
config can give, alone and together. `validate` raises ConfigError, naming a field that
was changed, or what it lets through can be built: its shapes, its schedules, its steps.
"""

import dataclasses
import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from alexnet_jax import (
    config_files,
    experiment,
    fields,
    main,
    model,
    stopping,
    sweeps,
    train,
)
from alexnet_jax.checkpoint import MANIFEST, CheckpointError
from alexnet_jax.data import DataError
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.experiment import ConfigError
from alexnet_jax.optim import Plateau
from configs import common

ROOT = Path(__file__).parent.parent
LONG = settings.get_current_profile_name() == "long"
DEFAULTS = experiment.flat(common.get_config().to_dict())
HUGE = (2**31 - 1, 2**31, 2**32, 2**63, 10**30, 10**400, -1, -(2**63))
FLOATS = (1e308, -1e308, 3.5e38, 5e-324, -0.0, math.inf, -math.inf, math.nan)
# Values of the right kind, some of which are in the right range.
LIKELY = {
    int: (0, 1, 2, 3, 7, 8, 32, 34, 60, 128, 4096, *HUGE),
    float: (0.0, 0.05, 0.25, 0.5, 1.0, 1.5, 3.0, 90, 1e6, 2e6, *FLOATS),
    bool: (True, False),
    str: (
        *("", "x", "cifar", "paper", "owt", "he", "caffe", "float32", "float64"),
        *("bfloat16", "hybrid", "columns", "data", "pmap", "cosine", "polynomial"),
        *(
            "fixed",
            "torch",
            "batch",
            "lrn",
            "before",
            "tanh",
            "avg",
            "a\x00b",
            "\ud800",
        ),
    ),
    tuple: (
        *((), (1.0, 2.0), (2.0, 1.0), (0.5, 1e7), (math.nan,), ("conv1",), ("conv2",)),
        *((("conv1", 0, 0),), (("conv1", 1, 0.1), ("conv1", 0, 1)), ((1, 2),)),
        *(
            (("conv1", math.inf, 1),),
            (("fc10", 1e6, 1e308),),
            ("x", None),
            (("a",) * 4,),
        ),
    ),
}


class Odd:
    """What no config file should hold."""


ANY = st.one_of(
    st.sampled_from([v for values in LIKELY.values() for v in values]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [
            *(None, b"bytes", [], [1], {}, {"a": 1}, {"a": {"b": 2}}, {1}, 1j, Odd()),
            *(np.float32(0.5), np.int64(3), np.bool_(True), np.str_("he"), np.zeros(2)),
            *(np.float64("nan"), np.array(3), (np.zeros(2),), ((np.zeros(2), 0, 1),)),
            *(("conv1", ("conv2", ("conv3",))), Path("x"), range(3), len, int),
        ]
    ),
)


def kind_of(field):
    """The type of a field's values, as configs/common.py has it."""
    group, _, name = field.rpartition(".")
    config = common.get_config()
    for part in group.split(".") if group else ():
        config = config[part]
    return config.get_type(name)


KINDS = {field: kind_of(field) for field in DEFAULTS}
FIELDS = st.sampled_from(sorted(DEFAULTS))
# Field and value, mostly of its kind.
CHANGES = FIELDS.flatmap(
    lambda field: st.tuples(
        st.just(field), st.one_of(st.sampled_from(LIKELY[KINDS[field]]), ANY)
    )
)


def small_config():
    config = common.get_config()
    config.data.source = "fake"
    config.data.image_size, config.data.crop_size, config.data.batch_size = 34, 32, 32
    config.model.variant, config.model.init = "cifar", "he"
    config.model.width = 0.25
    return config


def changed(changes, base=small_config):
    """The config with fields set to anything, as a config file may; None: not even it."""
    config = base()
    with config.ignore_type(), config.unlocked():
        for field, value in changes:
            group, _, name = field.rpartition(".")
            holder = config
            for part in group.split(".") if group else ():
                holder = holder[part] if isinstance(holder, ConfigDict) else None
            if not isinstance(holder, ConfigDict):
                return None
            try:
                holder[name] = value
            except (
                TypeError,
                ValueError,
                OverflowError,
            ):  # ml_collections' own refusal
                return None
    return config


@dataclasses.dataclass
class Pictures:
    """As much of a data set as a config is built with."""

    num_examples: int = 1_281_167
    num_classes: int = 10
    image_size: int = 34
    description: str = "pictures"
    statistics_path: Path | None = None
    class_names: tuple[str, ...] = tuple("abcdefghij")

    def labels_of(self, indices):
        return indices % self.num_classes


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_open_sources", lambda *_: (Pictures(), None))
        yield


STATISTICS = Statistics(
    np.zeros((34, 34, 3), np.float32),
    np.ones(3, np.float32),
    np.eye(3, dtype=np.float32),
    7,
)


def check(config, changes, *, shapes):
    """`validate` says what is wrong, or the config can be built."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # advice on narrow networks
            experiment.validate(config)
            built = experiment.build(config, statistics=STATISTICS)
    except ConfigError as error:
        message = str(error).lower()
        names = {part for field, _ in changes for part in field.split(".")[-1:]}
        assert any(name in message for name in names), message
        assert len(message) < 3000
        return "refused"
    assert 0 < built.total_steps < 2**31 or config.max_steps == 0
    assert built.augmentation.crop_size == config.data.crop_size
    assert json.loads(json.dumps(experiment.as_json(config)))
    if shapes:
        state = built.abstract_state()
        assert state.step.shape == ()
    return "built"


@pytest.mark.parametrize("field", sorted(DEFAULTS))
def test_every_field_refuses_what_is_not_of_its_kind(field):
    """Each of the others is named with its value and with what it must be."""
    kind = KINDS[field]
    fitting = {float: (int, float), int: (int,), tuple: (tuple, list)}.get(
        kind, (kind,)
    )
    others = [None, True, 3, 0.5, "x", b"x", ("conv1",), {"a": 1}, Odd(), np.int64(3)]
    override = field.startswith("model.overrides.")
    name = field.rpartition(".")[2]
    for value in others:
        config = changed([(field, value)])
        if config is None:
            continue
        value = experiment.flat(config.to_dict()).get(field)  # as it was converted
        fits = isinstance(value, fitting) and isinstance(value, bool) == (kind is bool)
        if fits or (value is None and override):
            continue
        with pytest.raises(ConfigError, match=name) as error:
            experiment.validate(config, devices=False)
        words = "must be|is missing|there is no setting"
        assert any(word in str(error.value) for word in words.split("|"))


@settings(max_examples=2000 if LONG else 60)
@given(CHANGES)
def test_one_field_of_any_value(change):
    config = changed([change])
    if config is not None:
        check(config, [change], shapes=LONG)


@settings(max_examples=2000 if LONG else 40)
@given(st.lists(CHANGES, min_size=2, max_size=6))
def test_several_fields_of_any_value(changes):
    config = changed(changes)
    if config is not None:
        check(config, changes, shapes=LONG)


@settings(max_examples=1000 if LONG else 12)
@given(
    st.sampled_from(["paper", "cifar", "owt", "zfnet", "original", "cifar_11"]),
    st.dictionaries(
        st.sampled_from([f for f in sorted(DEFAULTS) if f.startswith("model.")]),
        st.sampled_from(
            [
                *(None, 1, 2, 3, 5, 7, 13, 60, 0.05, 0.5, True, False, "tanh", "batch"),
                *(
                    "lrn",
                    "none",
                    "avg",
                    "before",
                    "after",
                    ("conv2",),
                    ("conv3", "conv4"),
                ),
            ]
        ),
        max_size=4,
    ),
)
def test_networks_that_are_let_through_have_shapes(variant, changes):
    def base():
        config = small_config()
        config.model.variant = variant
        size = model.create_model(variant, init="he").network.crop_size
        config.data.image_size = config.data.crop_size = size
        return config

    changes = [*changes.items()]
    config = changed(changes, base)
    if config is not None and config.model.variant == variant:
        check(config, changes or [("model.variant", variant)], shapes=True)


def test_kinds_are_those_of_the_defaults():
    """One table says them; here it is compared with configs/common.py."""
    settings_ = {f.rpartition(".")[2] for f in DEFAULTS if "overrides." in f}
    plain = {f for f in DEFAULTS if "overrides." not in f}
    assert set(fields._KINDS) == plain
    assert {*model._SETTINGS} >= settings_
    for field, default in DEFAULTS.items():
        name = field.rpartition(".")[2]
        kind = fields._KINDS[field] if field in plain else model._SETTINGS[name]
        if default is not None:
            assert kind.holds(default)
        fitting = {int: 3, float: 0.5, str: "x", bool: True, tuple: ()}
        for type_, value in fitting.items():
            right = type_ is KINDS[field] or (type_ is int and KINDS[field] is float)
            assert kind.holds(value) == right, (field, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("model.overrides.pool_window", 60),
            "pool_window=60 and pool_stride=2 do not",
        ),
        (("model.width", math.inf), "width=inf must be above 0, at most 1,048,576"),
        (
            ("model.num_classes", 10**9),
            "num_classes=1000000000 must be a whole number of at",
        ),
        (("num_epochs", 1e308), "num_epochs=1e+308 is out of range: above 0, at most"),
        (
            ("num_epochs", 1e6),
            "num_epochs: 1000000.0 epochs of 40,036.5 steps are more",
        ),
        (("optim.learning_rate", "fast"), "learning_rate='fast' must be a number"),
        (("data.batch_size", 32.0), "batch_size=32.0 must be a whole number"),
        (("augment.flip", 1), "flip=1 must be True or False"),
        (("schedule.drop_epochs", (1.0, "x")), "(1.0, 'x') must be numbers in a tuple"),
        (("data.image_size", 10**9), "at least 1, at most 4096"),
        (
            ("parallel.column", 0),
            "1 mistake in the config:\n  - --config.parallel.column",
        ),
        (("model", 5), "--config.model.variant is missing"),
        (("seed", "9" * 5000), "must be a whole number"),
        (
            ("data.batch_size", 2**31 - 8),
            "batch_size=2147483640: the loader holds 5 batches of 2,147,483,640 pictures",
        ),
    ],
)
def test_known_mistakes_are_sentences(change, words):
    config = small_config()
    with config.ignore_type():
        config.update_from_flattened_dict({change[0]: change[1]})
    with pytest.raises(ConfigError) as error:
        experiment.build(config, statistics=STATISTICS)
    assert words in str(error.value)
    assert max(map(len, str(error.value).splitlines())) < 300


# --- the command line ---------------------------------------------------------------


def parsed(monkeypatch, *arguments):
    """The config of a command line, as main has it; its flags are as before again."""
    argv = ["main", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        assert main._parse(argv) == ["main"]
        return main._CONFIG.value


TEXTS = st.one_of(
    ANY.filter(lambda v: not isinstance(v, Odd)).map(repr),
    st.sampled_from(
        [
            *(
                "",
                "None",
                "true",
                "nan",
                "1e999",
                "(",
                "((((",
                "(1,",
                "1,2",
                "{}",
                "[]",
            ),
            *(
                "{'variant': 'owt'}",
                "9" * 5000,
                "(" * 3000,
                "-" * 500 + "1",
                "'x",
                "0x10",
            ),
            *("__import__('os')", "1_0", "１", "\x00", "(1.0, 2.0)", "('conv1', 0, 0)"),
        ]
    ),
)
NAMES = st.one_of(
    FIELDS,
    st.sampled_from(
        [
            *(
                "",
                "model",
                "model.overrides",
                "data",
                "seed.real",
                "model.widht",
                "x.y",
            ),
            *(
                "to_dict",
                "__class__",
                "data.source[0]",
                "drop_epochs",
                "seed[0]",
                "a b",
            ),
            *("optim.", ".", "schedule.drop_epochs[0]", "model.overrides.depth", "1"),
        ]
    ),
)


@settings(max_examples=1000 if LONG else 40)
@given(
    st.lists(st.tuples(NAMES, TEXTS, st.booleans()), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_command_lines_of_any_text(overrides, where):
    arguments = [
        f"--config.{name}={text}" if equals else f"--config.{name}"
        for name, text, equals in overrides
    ]
    # Now and then the file comes after what changes it.
    arguments.insert(0 if where else 1, "--config=configs/tiny.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            config = parsed(patch, *arguments)
            experiment.validate(config)
            assert experiment.as_json(config)
        except ConfigError as error:
            assert len(str(error)) < 4000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.seed=x"], "flag --config.seed=x"),
        (["--config.model.widht=1"], "no such field: widht. Did you mean"),
        (["--config.schedule.drop_epochs=(1.0, 2.0)"], None),
        (["--config.schedule.drop_epochs=(1.0,"], "drop_epochs"),
        (["--config.model.overrides.skip=('conv3',)"], None),
        (["--config.to_dict=3"], "to_dict"),
        (["--nosuch=1"], "Unknown command line flag 'nosuch'"),
        (["--workdir"], "Missing value for flag --workdir"),
        (["--mode=dance"], "--mode=dance"),
        (["--cpu_devices=0"], "--cpu_devices=0"),
        (["--cpu_devices=100000"], "100000 is not an integer in the range [1, 1024]"),
    ],
)
def test_what_a_command_line_says(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config=configs/tiny.py", *arguments]
    if words is None:
        experiment.as_json(parsed(monkeypatch, *arguments))
        return
    with pytest.raises(ConfigError) as error:
        experiment.as_json(parsed(monkeypatch, *arguments))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config="], "--config=FILE is missing"),
        (["--config", "--workdir=DIR"], "--config=FILE is missing"),
        (["--config.seed=1"], "--config=FILE is missing"),
        (["--config=README.md"], "README.md is no Python file, as configs/paper.py is"),
    ],
)
def test_missing_config_file_is_named(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=words):
        parsed(monkeypatch, *arguments)


def test_a_change_before_its_file_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"config\.seed=1 in argv before a value for"):
        parsed(monkeypatch, "--config.seed=1", "--config=configs/tiny.py")


OWN = "from configs import tiny\ndef get_config():\n    config = tiny.get_config()\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def get_config():\n    pass\n",
            "must return a ConfigDict; it returns NoneType",
        ),
        ("def get_config():\n    return {'seed': 1}\n", "it returns dict"),
        ("def get_config(:\n", "invalid syntax"),
        ("def get_config():\n    return int('x')\n", "invalid literal for int"),
        (
            "def get_config():\n    raise SystemExit(3)\n",
            "(SystemExit: 3; {own}, line 2). Such a file must not end the command",
        ),
        (
            "import sys\nsys.exit('no data')\n",
            "(SystemExit: no data; {own}, line 2). Such a file",
        ),
        (
            "raise KeyboardInterrupt\n",
            "(KeyboardInterrupt; {own}, line 1). Such a file",
        ),
        ("seed = 1\n", "{own} could not be used: it defines no get_config()"),
        (OWN + "    config.seed = 1 // 0\n", "(ZeroDivisionError: integer division"),
        (OWN + "    assert False\n", "(AssertionError; {own}, line 4)"),
        (
            OWN + "    config.own = 1 // config.get_ref('max_steps')\n"
            "    config.max_steps = 0\n    return config\n",
            "{own}: its fields cannot be read (ZeroDivisionError",
        ),
        (OWN + "    raise StopIteration\n", "(StopIteration; {own}, line 4)"),
        (OWN + "    raise GeneratorExit('x')\n", "(GeneratorExit: x; {own}, line 4)"),
        (OWN + "    raise MemoryError\n", "(MemoryError; {own}, line 4)"),
        (OWN + "    return get_config()\n", "(RecursionError: maximum recursion depth"),
        (OWN + "    open('/no/file')\n", "'/no/file'; {own}, line 4)"),
        (OWN + "    config.widht = 1\n    config.to_dict(1, 2, 3)\n", "{own}, line 5)"),
        (
            "class E(BaseException):\n    pass\nraise E('boo')\n",
            "(E: boo; {own}, line 3)",
        ),
        (
            "class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E\n",
            "(E: <exception str() failed>; {own}, line 4)",
        ),
        ("(" * 9999, "(SyntaxError: too many nested parentheses; {own}, line 1)"),
        ("import nosuch\n", "(ModuleNotFoundError: No module named 'nosuch'; {own}, "),
        ("\0", "could not be read ("),
        (
            "from alexnet_jax import augment\naugment.imagenet_statistics(1, 2, 3)\n",
            "{own}, line 2)",
        ),
        (
            OWN + "    config.model.me = config\n    return config\n",
            "{own}: its fields cannot be read",
        ),
        (
            "from ml_collections import config_dict\n"
            + OWN
            + "    config.data.own = config_dict.required_placeholder(str)\n"
            "    return config\n",
            "{own}: a field is a required placeholder",
        ),
        (
            OWN + "    config.data.dir = 'a\\0b'\n    return config\n",
            r"--config.data.dir='a\x00b' must be text without NUL",
        ),
    ],
)
def test_files_that_are_no_configs(text, words, monkeypatch, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        experiment.as_json(parsed(monkeypatch, f"--config={path}"))
    said = str(error.value)
    assert words.format(own=path) in said and "Traceback" not in said


def test_missing_config_is_named(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=f"there is no such file in {Path.cwd()}"):
        parsed(monkeypatch, f"--config={tmp_path / 'none.py'}")


def test_what_goes_wrong_in_the_project_keeps_its_traceback(monkeypatch, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from alexnet_jax import augment\naugment.imagenet_statistics('x')\n"
    )
    with pytest.raises(TypeError) as error:
        parsed(monkeypatch, f"--config={path}")
    files = [Path(entry.path) for entry in error.traceback]
    assert path in files and ROOT / "alexnet_jax" / "augment.py" in files


def test_a_ctrl_c_while_a_config_file_is_read_is_none_of_its_own(monkeypatch, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import os\nos.kill(os.getpid(), 2)\nimport time\ntime.sleep(60)\n")
    with pytest.raises(stopping.Interrupted), stopping.answering():
        parsed(monkeypatch, f"--config={path}")


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"width": 1e9}, "width=1000000000.0 must be above 0"),
        (
            {"width": "wide", "lrn": 1},
            "width='wide' must be a number; lrn=1 must be True",
        ),
        ({"depth": 3}, "there is no setting 'depth'"),
    ],
)
def test_a_file_to_start_from_cannot_set_anything(
    settings_, words, monkeypatch, tmp_path
):
    """configs/finetune.py:FILE takes its network from a file that anyone may have made."""
    monkeypatch.chdir(ROOT)
    record = {"version": 1, "settings": {"variant": "cifar", **settings_}}
    record |= {"image_size": 34, "crop_size": 32, "class_names": None}
    path = tmp_path / "x.safetensors"
    mean, metadata = np.zeros(3, np.float32), {"alexnet_jax": json.dumps(record)}
    save_file({"mean": mean}, path, metadata)
    with pytest.raises(ConfigError) as error:
        parsed(monkeypatch, f"--config=configs/finetune.py:{path}")
    assert words in str(error.value) and str(path) in str(error.value)
    assert "Traceback" not in str(error.value)


# --- a workdir's own config ---------------------------------------------------------


@pytest.fixture
def workdir(tmp_path):
    """Of a run that has begun, as far as its config is concerned."""
    step = tmp_path / "checkpoints" / "3"
    step.mkdir(parents=True)
    (step / MANIFEST).touch()
    experiment.write_config(tmp_path, small_config())
    STATISTICS.save(tmp_path / "statistics.npz")
    return tmp_path


def stored(workdir, change):
    path = workdir / "config.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_a_field_that_differs_is_printed(workdir):
    assert train.prepare(small_config(), workdir)[0] == []
    config = small_config()
    config.optim.learning_rate = 0.5
    config.data.workers = 3
    lines, _ = train.prepare(config, workdir)
    assert lines == [
        "the config differs from this workdir's:",
        "  --config.data.workers: 2 in the workdir, now 3",
        "  --config.optim.learning_rate: 0.01 in the workdir, now 0.5",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.width", 0.5),
        ("model.variant", "cifar_13"),
        ("model.overrides.dropout", 0.25),
        ("model.dtype", "bfloat16"),
        ("data.image_size", 40),
    ],
)
def test_another_network_is_refused_with_its_line(field, value, workdir):
    config = small_config()
    config.update_from_flattened_dict({field: value})
    if value == "cifar_13":
        config.data.crop_size = 24
    with pytest.raises(ConfigError, match=f"another network:\n(.*\n)*.*{field}: "):
        train.prepare(config, workdir)


def test_a_workdir_of_before_a_field_goes_on(workdir):
    def older(tree):
        del tree["stall_after_steps"], tree["model"]["overrides"]["skip"]
        del tree["finetune"]
        tree["optim"]["nesterov"] = True  # and one that there is not any more

    stored(workdir, older)
    lines, _ = train.prepare(small_config(), workdir)
    text = "\n".join(lines)
    assert "--config.stall_after_steps: newer than the workdir, now 5000" in text
    nesterov = (
        "--config.optim.nesterov: True in the workdir; there is no such field any"
    )
    assert nesterov in text
    assert "None" not in text
    assert "skip" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged: Expecting value"),
        ("[1]", "holds no config of a run: it is not fields by name"),
        ("{}", "model.variant is missing"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff", "is damaged"),
    ],
)
def test_a_broken_config_of_a_workdir_is_said(text, words, workdir):
    (workdir / "config.json").write_bytes(text.encode("latin-1"))
    for call in (
        lambda: train.prepare(small_config(), workdir),
        lambda: experiment.with_network_of(small_config(), workdir),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert str(workdir / "config.json") in str(error.value)
        assert words in str(error.value)


def test_a_wrong_value_of_a_workdir_is_named(workdir):
    def harm(tree):
        tree["data"]["batch_size"], tree["model"]["width"] = "many", [1]

    stored(workdir, harm)
    with pytest.raises(ConfigError, match=r"batch_size='many' must be a whole number"):
        experiment.read_config(workdir)
    with pytest.raises(ConfigError, match=r"model.width=\[1\] must be a number"):
        experiment.read_config(workdir)


def test_statistics_that_are_missing_are_said(workdir):
    (workdir / "statistics.npz").unlink()
    with pytest.raises(FileNotFoundError, match="statistics.npz is missing: the mean"):
        experiment.read_network(workdir)


def test_a_resumed_run_says_where_its_mean_image_comes_from(workdir, capsys):
    path = workdir / "statistics.npz"
    train.prepare(small_config(), workdir)
    assert f"mean image: {path}, of 7 images\n" in capsys.readouterr().out
    dataclasses.replace(STATISTICS, split_examples=70).save(path)
    train.prepare(small_config(), workdir)
    assert f"mean image: {path}, of 7 of 70 images\n" in capsys.readouterr().out


def test_statistics_of_another_size_are_said(workdir):
    path = workdir / "statistics.npz"
    others = np.zeros((32, 32, 3), np.float32)
    dataclasses.replace(STATISTICS, mean_image=others).save(path)
    words = f"{path}: the mean image is 32 x 32 pixels, the pictures here are 34 x 34"
    with pytest.raises(DataError, match=re.escape(words)):
        train.prepare(small_config(), workdir)
    # Beside the data, under a name of their size.
    pictures = Pictures(statistics_path=path)
    with pytest.raises(DataError, match=re.escape(words)):
        experiment._find_own_statistics(pictures, 1, print)


METADATA = {
    "config": experiment.as_json(small_config()),
    "plateau": {"best": sys.float_info.max, "waited": 0, "drops": 0},
    "target_reached": False,
    "evaluation_owed": True,
    "versions": {"jax": "0.10.2"},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"plateau": Plateau(1, best=0.25, waited=3, drops=2).progress()}, None),
        ({"plateau": {"foo": 1}}, "plateau={'foo': 1} must be the best error, and how"),
        ({"plateau": []}, "plateau=[] must be"),
        ({"plateau": None}, "plateau=None must be"),
        ({"plateau": {"best": math.nan, "waited": 0, "drops": 0}}, "must be the best"),
        ({"plateau": {"best": 10**400, "waited": 0, "drops": 0}}, "must be the best"),
        ({"plateau": {"best": 0.5, "waited": 0.5, "drops": 0}}, "must be the best"),
        ({"plateau": {"best": 0.5, "waited": 0, "drops": -1}}, "must be the best"),
        (
            {"target_reached": 1, "evaluation_owed": "no"},
            "target_reached=1 must be True or False; evaluation_owed='no' must be True",
        ),
        ({"versions": [1]}, "versions=[1] must be names"),
        ({"config": None}, "/7 holds no config of a run: it is not fields by name"),
        ({"config": {"optim": 5}}, "optim.learning_rate is missing"),
    ],
)
def test_what_a_checkpoint_holds_beside_its_arrays(change, words):
    metadata = METADATA | change
    if words is None:
        assert experiment.check_metadata(metadata, "checkpoint 7") is metadata
        older = {"config": METADATA["config"]}
        assert experiment.check_metadata(older, "checkpoint 7") == older
        return
    with pytest.raises(CheckpointError) as error:
        experiment.check_metadata(metadata, "checkpoint /run/checkpoints/7")
    assert words in str(error.value) and "/run/checkpoints/7" in str(error.value)


def test_a_sweep_of_before_a_field_goes_on(workdir):
    """What was not said yet was the default."""
    row = sweeps.Run("a", None, 0, "configs/tiny.py", {"optim.momentum": 0.5})
    config = sweeps.set_fields(sweeps.load_config(row.config), row.overrides, "")
    experiment.write_config(workdir, config)
    path = workdir / "config.json"
    assert sweeps.differences(row, path) == []

    def older(tree):
        del tree["stall_after_steps"], tree["optim"]["momentum"], tree["finetune"]

    stored(workdir, older)
    assert sweeps.differences(row, path) == ["optim.momentum: 0.9 there, 0.5 asked for"]
    path.write_text("{")
    with pytest.raises(sweeps.SweepError, match="config.json is damaged"):
        sweeps.differences(row, path)


def test_a_config_file_may_make_classes(tmp_path):
    """dataclasses look up the module of a class with annotations that are texts."""
    path = tmp_path / "classes.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "from configs import quickstart\n\n"
        "def get_config():\n    @dataclasses.dataclass\n    class Size:\n"
        "        side: int = 3\n    config = quickstart.get_config()\n"
        "    config.seed = Size().side\n    return config\n"
    )
    assert config_files.load_config(str(path)).seed == 3
