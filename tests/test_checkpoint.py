"""Checkpoints: bit-exact, movable between devices, and never half of one."""

import itertools
import json
import logging
import os
import shutil
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from alexnet_jax import checkpoint
from alexnet_jax.checkpoint import (
    MANIFEST,
    Checkpointer,
    CheckpointError,
    has_checkpoint,
)

METADATA = {
    "config": {"model": {"variant": "paper"}, "sizes": [30, 60]},
    "plateau": {"best_error": float("inf"), "divisions": 2},
}


class State(NamedTuple):
    """As the trainer's state: arrays only, one part of it an optax state."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


@optax.inject_hyperparams
def _sgd(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def _make_state(step=7, width=8):
    key = jax.random.key(step)
    params = {
        "conv1": {
            "kernel": jax.random.normal(key, (3, 3, 4, width)),
            # Values that a careless serializer changes.
            "bias": jnp.array([0.0, -0.0, 1e-40, jnp.inf] * (width // 4)),
        },
        "fc8": {"kernel": jax.random.normal(key, (width, 16)).astype(jnp.bfloat16)},
    }
    optimizer = _sgd(learning_rate=0.01)
    _, opt_state = optimizer.update(params, optimizer.init(params))
    return State(jnp.int32(step), params, {}, opt_state)


def _abstract(state, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )


def _on_mesh(state, devices):
    """The state's shardings with the last axis split over `devices` devices."""
    mesh = jax.make_mesh(
        (devices,),
        ("column",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )

    def split(x):
        axes = [None] * (x.ndim - 1) + ["column"] if x.ndim else []
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(split, state)


def _assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _restore(checkpoints, state, step=None):
    """(state, metadata) of a checkpoint that must be there."""
    restored = checkpoints.restore(_abstract(state), step)
    assert restored is not None
    return restored


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with whole steps 10 and 20; tests copy it before they harm it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(10, _make_state(10), metadata=METADATA, top1_error=0.5)
        checkpoints.save(20, _make_state(20), metadata=METADATA, top1_error=0.4)
    return directory


@pytest.fixture
def directory(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


@pytest.fixture
def warnings_said(caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    return lambda: [record.getMessage() for record in caplog.records]


# What is saved comes back.


def test_every_bit_comes_back(directory, warnings_said):
    with Checkpointer(directory) as checkpoints:
        state, metadata = _restore(checkpoints, _make_state())
        assert checkpoints.metadata(10) == METADATA
    _assert_same_bits(state, _make_state(20))
    assert isinstance(state, State)
    assert type(state.opt_state) is type(_make_state().opt_state)
    assert metadata == METADATA
    assert warnings_said() == []


def test_a_named_step_can_be_restored(directory):
    with Checkpointer(directory) as checkpoints:
        state, _ = _restore(checkpoints, _make_state(), step=10)
        _assert_same_bits(state, _make_state(10))
        with pytest.raises(CheckpointError, match=r"step 15.*\[10, 20\]"):
            checkpoints.restore(_abstract(state), step=15)


def test_training_goes_on_from_a_restored_state(directory):
    """The restored optax state works in an update and gives the same bits."""
    with Checkpointer(directory) as checkpoints:
        restored, _ = _restore(checkpoints, _make_state())
    update = _sgd(learning_rate=0.01).update
    want = _make_state(20)
    _assert_same_bits(
        update(restored.params, restored.opt_state),
        update(want.params, want.opt_state),
    )


@pytest.mark.parametrize("saved_on, restored_on", [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_another_number_of_devices(tmp_path, saved_on, restored_on):
    state = _make_state()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(
            1, jax.device_put(state, _on_mesh(state, saved_on)), metadata={}
        )
    shardings = _on_mesh(state, restored_on)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )
    with Checkpointer(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored is not None
    _assert_same_bits(restored[0], state)
    kernel = restored[0].params["conv1"]["kernel"]
    assert kernel.sharding == shardings.params["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, 4, 8 // restored_on)


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("runs/paper") as checkpoints:
        # Absolute from the start: a later chdir does not move it.
        os.makedirs("elsewhere")
        monkeypatch.chdir("elsewhere")
        checkpoints.save(1, _make_state(), metadata={})
        assert checkpoints.latest_whole_step() == 1
    assert has_checkpoint(tmp_path / "runs" / "paper")


def test_an_empty_or_missing_directory(tmp_path):
    assert not has_checkpoint(tmp_path / "none")
    with Checkpointer(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.restore(_abstract(_make_state())) is None
        assert checkpoints.latest_whole_step() is None
        assert checkpoints.best_step() is None
        assert checkpoints.all_steps() == []
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore_params()
    assert not (tmp_path / "none").exists()


def test_a_remote_directory_is_refused():
    with pytest.raises(CheckpointError, match="local or mounted"):
        Checkpointer("gs://bucket/run")


# Parts of it, for notebooks and evaluation.


def test_only_parameters_on_one_device(directory):
    device = jax.devices()[3]
    with Checkpointer(directory, read_only=True) as checkpoints:
        variables, metadata = checkpoints.restore_params(device=device)
        assert checkpoints.restore_params(step=10)[0].keys() == {"params"}
        with pytest.raises(CheckpointError, match="read-only"):
            checkpoints.save(30, _make_state(), metadata={})
    _assert_same_bits(variables, {"params": _make_state(20).params})
    assert all(x.devices() == {device} for x in jax.tree.leaves(variables))
    assert metadata == METADATA


def test_only_parameters_does_not_read_the_optimiser(directory):
    """Saved from 8 devices or not, only what is asked for becomes an array."""
    before = len(jax.live_arrays())
    with Checkpointer(directory, read_only=True) as checkpoints:
        variables, _ = checkpoints.restore_params()
    assert len(jax.live_arrays()) - before == len(jax.tree.leaves(variables)) == 3


def test_batch_statistics_come_with_the_parameters(tmp_path):
    state = _make_state()._replace(batch_stats={"norm1": {"mean": jnp.ones(8)}})
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={})
    sharding = _on_mesh(state.params, 4)
    abstract = {
        "params": jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state.params,
            sharding,
        ),
        "batch_stats": _abstract(state.batch_stats),
    }
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        variables, _ = checkpoints.restore_params()
        _assert_same_bits(
            variables, {"params": state.params, "batch_stats": state.batch_stats}
        )
        variables, _ = checkpoints.restore_params(abstract=abstract)
        kernel = variables["params"]["conv1"]["kernel"]
        assert kernel.sharding == sharding["conv1"]["kernel"]
        with pytest.raises(CheckpointError, match="holds none of"):
            checkpoints.restore_params(parts=("ema_params",))
        narrow = {"params": _abstract(_make_state(width=4).params)}
        with pytest.raises(CheckpointError, match="holds another network"):
            checkpoints.restore_params(abstract=narrow)


# Another network.


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: _make_state(width=16),
            r"params/conv1/bias is \(16,\) float32 here and \(8,\) float32 there",
        ),
        (
            lambda s: s._replace(params={"conv1": s.params["conv1"]}),
            r"params/fc8/kernel is \(8, 16\) bfloat16 in the checkpoint and missing",
        ),
        (
            lambda s: s._replace(params=s.params | {"fc9": jnp.zeros(3)}),
            r"params/fc9 is \(3,\) float32 here and missing in the checkpoint",
        ),
        (
            lambda s: s._replace(opt_state=optax.sgd(0.1).init(s.params)),
            r"opt_state/count is \(\) int32 in the checkpoint and missing here",
        ),
        (
            lambda s: s._replace(step=jnp.float32(0)),
            r"step is \(\) float32 here and \(\) int32 there",
        ),
    ],
)
def test_another_network_is_named(two_steps, change, message):
    with (
        Checkpointer(two_steps, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="another network: " + message),
    ):
        checkpoints.restore(_abstract(change(_make_state())))


def test_a_missing_sharding_is_named(two_steps):
    abstract = jax.eval_shape(_make_state)
    with (
        Checkpointer(two_steps, read_only=True) as checkpoints,
        pytest.raises(ValueError, match="step has no sharding"),
    ):
        checkpoints.restore(abstract)


# What is kept.


def test_newest_and_best_are_kept_through_a_restart(tmp_path):
    state = _make_state()
    errors = {1: 0.6, 2: 0.3, 3: 0.5, 4: None, 5: 0.4}
    for step, error in errors.items():
        # A new process each time, as after preemption.
        with Checkpointer(tmp_path, keep=2) as checkpoints:
            checkpoints.save(step, state, metadata={}, top1_error=error)
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.all_steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
        assert checkpoints.top1_error(2) == 0.3
        assert checkpoints.top1_error(4) is None
        checkpoints.save(6, state, metadata={}, top1_error=float("nan"))
        assert checkpoints.all_steps() == [2, 5, 6]
        checkpoints.save(7, state, metadata={}, top1_error=0.3)  # a tie: the newer
        assert checkpoints.best_step() == 7
        assert checkpoints.all_steps() == [6, 7]
    assert sorted(os.listdir(tmp_path)) == [".readers", "6", "7"]


def test_without_errors_only_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _make_state(step), metadata={})
        assert checkpoints.all_steps() == [2]
        assert checkpoints.best_step() is None


def test_the_last_whole_step_outlives_a_broken_newer_one(directory):
    """With keep=1, a step without a manifest must not push the whole one out."""
    os.remove(directory / "20" / MANIFEST)
    with Checkpointer(directory, keep=1) as checkpoints:
        # Lower than the broken step, as when saving by the clock.
        checkpoints.save(15, _make_state(15), metadata={})
        assert checkpoints.latest_whole_step() == 15
        assert checkpoints.all_steps() == [10, 15, 20]  # 10 is the best one
        checkpoints.save(25, _make_state(25), metadata={}, top1_error=0.1)
        assert checkpoints.all_steps() == [20, 25]  # what 20 is, nobody knows


def test_nothing_is_deleted_while_somebody_reads(directory):
    # Reads, while its run saves and would delete what is read.
    with (
        Checkpointer(directory, read_only=True) as reader,
        Checkpointer(directory, keep=1) as run,
    ):
        assert reader.find("best") == 20
        for step in (30, 40):
            run.save(step, _make_state(step), metadata=METADATA, top1_error=0.3)
        variables, _ = reader.restore_params(step=20)
        _assert_same_bits(variables["params"], _make_state(20).params)
        assert run.all_steps() == [10, 20, 30, 40]
        reader.close()
        run.save(50, _make_state(50), metadata=METADATA)
        assert run.all_steps() == [40, 50]  # the best and the newest


def test_a_checkpoint_that_is_being_saved_is_not_read(directory, monkeypatch):
    # Seen by a reader just before the manifest, the last of its files, is written.
    seen = []

    def look(*arguments):
        with Checkpointer(directory, read_only=True) as reader:
            variables, _ = reader.restore_params()
            seen.append((reader.all_steps(), variables["params"]))
        monkeypatch.undo()
        return checkpoint._write_manifest(*arguments)

    monkeypatch.setattr(checkpoint, "_write_manifest", look)
    with Checkpointer(directory) as run:
        run.save(30, _make_state(30), metadata=METADATA)
    ((steps, params),) = seen
    assert steps == [10, 20, 30]
    _assert_same_bits(params, _make_state(20).params)


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, keep=0)


def test_a_step_saved_twice_stays_as_it_was(directory):
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(20, _make_state(3), metadata={"other": 1}, top1_error=0.9)
        state, metadata = _restore(checkpoints, _make_state())
        assert checkpoints.top1_error(20) == 0.4
    _assert_same_bits(state, _make_state(20))
    assert metadata == METADATA


def test_an_error_can_be_added_to_a_saved_step(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, _make_state(), metadata={})
        assert checkpoints.best_step() is None
        checkpoints.save(1, _make_state(), metadata={}, top1_error=0.2)
        assert checkpoints.best_step() == checkpoints.latest_whole_step() == 1


def test_a_lower_step_is_refused(directory):
    with (
        Checkpointer(directory) as checkpoints,
        pytest.raises(CheckpointError, match="save step 15: .* holds step 20.*workdir"),
    ):
        checkpoints.save(15, _make_state(), metadata={})


def test_metadata_must_be_json(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="plain JSON.*ndarray"):
            checkpoints.save(1, _make_state(), metadata={"mean": np.zeros(3)})
        assert checkpoints.all_steps() == []
        checkpoints.save(1, _make_state(), metadata={"sizes": (1, 2), "none": None})
        assert checkpoints.metadata(1) == {"sizes": [1, 2], "none": None}


# What is broken.


def _files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def _assert_falls_back(directory, said, *words):
    """Step 10 is used, and one warning names step 20 and `words`."""
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.latest_whole_step() == 10
        state, metadata = _restore(checkpoints, _make_state())
        with pytest.raises(CheckpointError, match="step 20"):
            checkpoints.restore(_abstract(_make_state()), step=20)
        with pytest.raises(CheckpointError, match="step 20"):
            checkpoints.metadata(20)
        assert checkpoints.best_step() == 10
    _assert_same_bits(state, _make_state(10))
    assert metadata == METADATA
    assert said()
    for word in ("step 20", *words):
        assert word in said()[0]


def test_a_step_without_a_manifest_is_passed_over(directory, warnings_said):
    os.remove(directory / "20" / MANIFEST)
    _assert_falls_back(directory, warnings_said, MANIFEST, "missing")


def test_one_flipped_bit_in_any_file_is_found(directory, warnings_said):
    """Orbax's arrays and JSON, commit markers and the manifest, at three places."""
    folder = directory / "20"
    generator = np.random.default_rng(0)
    names = _files(folder)
    assert len(names) > 10 and any(n.name == MANIFEST for n in names)
    with Checkpointer(directory) as checkpoints:
        for name in names:
            data = (folder / name).read_bytes()
            for place in {0, len(data) - 1, int(generator.integers(len(data)))}:
                spoilt = bytearray(data)
                spoilt[place] ^= 1 << int(generator.integers(8))
                (folder / name).write_bytes(spoilt)
                assert checkpoints.latest_whole_step() == 10, (name, place)
                assert str(name) in warnings_said()[-1]
            (folder / name).write_bytes(data)
        assert checkpoints.latest_whole_step() == 20


@pytest.mark.parametrize(
    "pattern",
    [
        "metadata/metadata",
        "_CHECKPOINT_METADATA",
        "state/_METADATA",
        "state/_sharding",
        "state/manifest.ocdbt",
        "state/d/*",
        MANIFEST,
    ],
)
def test_a_new_process_survives_a_flipped_bit(directory, warnings_said, pattern):
    """Opening the directory must not fail on a file that Orbax would read first."""
    path = next((directory / "20").glob(pattern))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    name = str(path.relative_to(directory / "20"))
    _assert_falls_back(directory, warnings_said, name)


@pytest.mark.parametrize("pattern", ["metadata/metadata", "state/d/*", MANIFEST])
@pytest.mark.parametrize("size", [0, 5, None])
def test_a_truncated_or_missing_file(directory, warnings_said, pattern, size):
    path = next((directory / "20").glob(pattern))
    if size is None:
        os.remove(path)
    else:
        os.truncate(path, size)
    _assert_falls_back(
        directory, warnings_said, str(path.relative_to(directory / "20"))
    )


def test_a_file_too_many(directory, warnings_said):
    (directory / "20" / "state" / "stray").write_text("not saved by us")
    _assert_falls_back(directory, warnings_said, "state/stray")


def test_a_changed_manifest(directory, warnings_said):
    """Still valid JSON, and no sum of a file differs."""
    path = directory / "20" / MANIFEST
    text = path.read_text()
    assert '"top1_error": 0.4' in text
    path.write_text(text.replace('"top1_error": 0.4', '"top1_error": 0.5'))
    _assert_falls_back(directory, warnings_said, MANIFEST)


def test_a_manifest_of_another_format(directory, warnings_said):
    path = directory / "20" / MANIFEST
    path.write_text(json.dumps({"format": 99}))
    _assert_falls_back(directory, warnings_said, MANIFEST)


def test_a_copy_with_another_steps_name_is_passed_over(directory, warnings_said):
    for step in ("3", "30"):
        shutil.copytree(directory / "20", directory / step)
    with Checkpointer(directory, keep=1) as checkpoints:
        state, _ = _restore(checkpoints, _make_state())
        _assert_same_bits(state, _make_state(20))
        assert (
            "step 30 passed over: it is the checkpoint of step 20"
            in (warnings_said()[0])
        )
        with pytest.raises(CheckpointError, match="step 30 .* it is the .* of step 20"):
            checkpoints.restore(_abstract(state), step=30)
        for step in (25, 30):  # below the copy, and in its place
            checkpoints.save(step, _make_state(step), metadata={}, top1_error=0.1)
        state, _ = _restore(checkpoints, _make_state())
    _assert_same_bits(state, _make_state(30))
    # A user has made them, so they stay.
    for copy in ("3", "aside_30"):
        assert checkpoint._read_manifest(directory / copy)["step"] == 20


def test_two_steps_whose_names_were_exchanged_are_an_error(directory):
    for old, new in (("10", "kept"), ("20", "10"), ("kept", "20")):
        (directory / old).rename(directory / new)
    with (
        Checkpointer(directory) as checkpoints,
        pytest.raises(
            CheckpointError, match="step 10: it is .* step 20.*; step 20: it is .* 10"
        ),
    ):
        checkpoints.restore(_abstract(_make_state()))


def test_a_manifest_that_does_not_name_its_step_is_believed(directory):
    """As those of older versions are; they stay so when an error is added."""
    for step in ("10", "20"):
        folder = directory / step
        checkpoint._write_manifest(folder, checkpoint._sums(folder), None, None)
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(20, _make_state(), metadata={}, top1_error=0.3)
        state, _ = _restore(checkpoints, _make_state())
        assert checkpoints.best_step() == 20
    _assert_same_bits(state, _make_state(20))
    assert "step" not in json.loads((directory / "20" / MANIFEST).read_text())


def test_an_error_that_is_added_keeps_the_step_in_the_manifest(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        for error in (None, 0.3):
            checkpoints.save(1, _make_state(), metadata={}, top1_error=error)
    assert checkpoint._read_manifest(tmp_path / "1")["step"] == 1


def test_all_broken_is_an_error_and_not_a_new_start(directory):
    os.remove(directory / "10" / MANIFEST)
    os.truncate(directory / "20" / "metadata" / "metadata", 1)
    assert has_checkpoint(directory)
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.latest_whole_step() is None
        with pytest.raises(CheckpointError, match="step 10: .*; step 20: .*metadata"):
            checkpoints.restore(_abstract(_make_state()))
        with pytest.raises(CheckpointError, match="none of the checkpoints"):
            checkpoints.restore_params()


def _save_and_be_killed(directory, step):
    """A save that ends between Orbax's files and the manifest."""

    def killed(*_):
        raise KeyboardInterrupt

    with (
        Checkpointer(directory) as checkpoints,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(checkpoint, "_write_manifest", killed)
        checkpoints.save(step, _make_state(step), metadata={})


def test_a_first_save_that_was_killed_is_no_checkpoint(tmp_path, caplog):
    """Else the run could never start again."""
    _save_and_be_killed(tmp_path, 20)
    assert not has_checkpoint(tmp_path)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [20]
        assert checkpoints.restore(_abstract(_make_state())) is None
        assert "step 20 passed over: manifest.json is missing (its run" in caplog.text
    _save_and_be_killed(tmp_path, 10)  # and once more, in another step
    assert not has_checkpoint(tmp_path)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(10, _make_state(11), metadata={})
        state, _ = _restore(checkpoints, _make_state())
    _assert_same_bits(state, _make_state(11))
    assert sorted(os.listdir(tmp_path)) == ["10"]


def _is_killed(call, after):
    """Whether it makes more changes to folders than `after`; the next one kills it."""
    left = after

    def counted(change):
        def wrapped(*arguments, **options):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return change(*arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            call()
        except KeyboardInterrupt:
            return True
    return False


def test_a_removal_killed_anywhere_leaves_a_step_or_none(two_steps, tmp_path):
    def remove(checkpoints):
        return lambda: checkpoints._remove([10])

    for after in itertools.count():
        directory = shutil.copytree(two_steps, tmp_path / str(after))
        with Checkpointer(directory) as checkpoints:
            killed = _is_killed(remove(checkpoints), after)
        kept = ["10"] if after == 0 else []
        assert checkpoint._list_steps(directory) == [*map(int, kept), 20]
        with Checkpointer(directory):  # clears the rest
            pass
        assert {*os.listdir(directory)} - {".readers"} == {*kept, "20"}
        if not killed:
            break
    assert after > len(
        _files(two_steps / "10")
    )  # each of them was a place to be killed


def test_a_first_save_and_its_removal_that_were_killed_are_no_checkpoint(tmp_path):
    _save_and_be_killed(tmp_path, 20)
    with Checkpointer(tmp_path) as checkpoints:
        assert _is_killed(lambda: checkpoints.save(10, _make_state(), metadata={}), 5)
    assert not has_checkpoint(tmp_path)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.restore(_abstract(_make_state())) is None
        checkpoints.save(10, _make_state(11), metadata={})
    assert sorted(os.listdir(tmp_path)) == ["10"]


def test_a_save_killed_after_its_manifest_is_whole_and_stays_a_checkpoint(directory):
    (directory / ".saving").write_text("20\n")
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.latest_whole_step() == 20
    # Not unfinished all at once, when its manifest is lost some day.
    shutil.rmtree(directory / "10")
    os.remove(directory / "20" / MANIFEST)
    assert has_checkpoint(directory)


def test_what_is_passed_over_is_not_looked_into_by_orbax(directory, warnings_said):
    # A ruin of a checkpoint, and something else.
    for name in ("3/state", "99999"):
        (directory / name).mkdir(parents=True)
    with Checkpointer(directory, keep=1) as checkpoints:
        for step in (30, 40):
            checkpoints.save(step, _make_state(step), metadata={}, top1_error=0.1)
        assert checkpoints.all_steps() == [3, 40, 99999]
    assert warnings_said() == []


@pytest.mark.parametrize("killed_in", [None, 30])
def test_a_directory_whose_manifests_are_lost_is_refused(directory, killed_in):
    """With a save that was killed afterwards or not: a run does not start anew in it."""
    if killed_in:
        _save_and_be_killed(directory, killed_in)
    for step in (10, 20):
        os.remove(directory / str(step) / MANIFEST)
    before = _files(directory)
    assert has_checkpoint(directory)
    with (
        Checkpointer(directory) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"step 10: manifest.json is missing \(it was"
        ),
    ):
        checkpoints.restore(_abstract(_make_state()))
    assert _files(directory) == before


def test_a_folder_of_somebody_elses_is_not_deleted(directory, warnings_said):
    for step in ("3", "30"):
        (directory / step).mkdir()
        (directory / step / "mine").touch()
    with Checkpointer(directory, keep=1) as checkpoints:
        _restore(checkpoints, _make_state())  # of step 20
        assert "30 passed over: manifest.json is missing (it was" in warnings_said()[0]
        for step in (30, 40):
            checkpoints.save(step, _make_state(step), metadata={}, top1_error=0.1)
        assert checkpoints.all_steps() == [3, 40]
        assert checkpoints.latest_whole_step() == 40
    assert f"put aside as {directory / 'aside_30'}." in "\n".join(warnings_said())
    assert (directory / "3" / "mine").exists()
    assert (directory / "aside_30" / "mine").exists()
    # By itself it is taken for a checkpoint that has lost its manifest.
    for step in ("10", "20", "40"):
        shutil.rmtree(directory / step, ignore_errors=True)
    with (
        Checkpointer(directory) as checkpoints,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoints.restore(_abstract(_make_state()))
    assert "move away what is not this run's" in str(error.value)


def _folder_with(path, *names):
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")


# What somebody else may have put among the checkpoints -> where it is after a save.
OTHERS = {
    "a file named like a step": (lambda d: (d / "30").write_text("mine"), "aside_30"),
    "a link to nothing": (lambda d: (d / "30").symlink_to("/nowhere"), "aside_30"),
    "a link to a checkpoint": (lambda d: (d / "3").symlink_to(d / "20"), "3"),
    "another program's manifest": (lambda d: _folder_with(d / "3", MANIFEST), "3"),
    "the folder that a killed save names": (
        lambda d: (_folder_with(d / "35", "mine"), (d / ".saving").write_text("35")),
        "35",
    ),
}


@pytest.mark.parametrize("made", OTHERS)
def test_what_is_somebody_elses_is_not_deleted(directory, made):
    make, stays = OTHERS[made]
    make(directory)
    with Checkpointer(directory, keep=1) as checkpoints:
        checkpoints.save(30, _make_state(30), metadata={}, top1_error=0.1)
        assert checkpoints.latest_whole_step() == 30
    assert os.path.lexists(directory / stays)


def test_a_full_disk_removes_only_what_was_being_saved(directory, monkeypatch):
    _folder_with(directory / "30.backup", "mine")
    full = types.SimpleNamespace(free=0)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: full)
    with (
        Checkpointer(directory) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint of step 30: .* No space"),
    ):
        checkpoints.save(30, _make_state(30), metadata={})
    assert (directory / "30.backup" / "mine").exists()


def test_full_disk_ends_a_save_and_keeps_earlier_steps(small_disk):
    directory = small_disk(3) / "checkpoints"
    rng = np.random.default_rng(0)
    state = {f"layer{i}": rng.normal(size=2**15).astype("f4") for i in range(16)}
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(1, state, metadata={})
        with pytest.raises(
            CheckpointError, match=r"step 2: .* No space .* step 1 is as"
        ):
            checkpoints.save(2, state, metadata={})
        assert checkpoints.latest_whole_step() == 1
    assert [path.name for path in directory.glob("[!.]*")] == ["1"]


@pytest.mark.parametrize("missing", [MANIFEST, "_CHECKPOINT_METADATA", "state"])
def test_a_broken_step_does_not_block_saving(directory, missing):
    path = directory / "20" / missing
    shutil.rmtree(path) if path.is_dir() else os.remove(path)
    with Checkpointer(directory) as checkpoints:
        _restore(checkpoints, _make_state())
        checkpoints.save(20, _make_state(21), metadata={"again": True})
        state, metadata = _restore(checkpoints, _make_state())
    _assert_same_bits(state, _make_state(21))
    assert metadata == {"again": True}


def test_what_a_killed_save_leaves_is_cleared(directory):
    """Orbax writes under another name first; such a folder is not a step."""
    left = directory / "99.orbax-checkpoint-tmp"
    shutil.copytree(directory / "20", left)
    others = [directory / f"{name}.orbax-checkpoint-tmp" for name in ("notes", "098")]
    for other in others:
        _folder_with(other, "mine")
    (directory / "97.orbax-checkpoint-tmp").symlink_to(others[0])
    with Checkpointer(directory, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [10, 20]
    assert left.exists()
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.all_steps() == [10, 20]
        checkpoints.save(30, _make_state(30), metadata={})
        assert checkpoints.latest_whole_step() == 30
    assert not left.exists()
    assert all((other / "mine").exists() for other in others)


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """Killed just before it, after Orbax's commit: the older step is still there."""
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, _make_state(1), metadata={})

        replace = os.replace

        def killed(source, target):
            if os.path.basename(target) == MANIFEST:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr("alexnet_jax.checkpoint.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, _make_state(2), metadata={})
        monkeypatch.undo()
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
        assert checkpoints.latest_whole_step() == 1
        checkpoints.save(2, _make_state(2), metadata={})
        assert checkpoints.all_steps() == [2]
    assert sorted(os.listdir(tmp_path)) == [".readers", "2"]  # nothing put aside


def test_orbax_is_quiet_but_its_warnings_are_heard(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, _make_state(), metadata={})
        _restore(checkpoints, _make_state())
    assert caplog.messages == []
    logger = logging.getLogger("absl")
    path = os.path.join("somewhere", "orbax", "checkpoint", "manager.py")
    for level in (logging.INFO, logging.WARNING):
        logger.handle(logger.makeRecord("absl", level, path, 1, "said", (), None))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
