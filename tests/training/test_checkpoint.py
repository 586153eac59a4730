"""Checkpoints: bit-exact, movable between devices, complete or absent."""

import logging
import os
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from alexnet_jax.system.files import FullDiskError
from alexnet_jax.training import checkpoint
from alexnet_jax.training.checkpoint import MANIFEST, Checkpointer, CheckpointError, all_steps

METADATA = {
    "config": {"model": {"variant": "paper"}, "sizes": [30, 60]},
    "plateau": {"best_error": float("inf"), "divisions": 2},
}


class State(NamedTuple):
    """Hold arrays and an optax state, like the state of training."""

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
            # Values that a careless serializer would change.
            "bias": jnp.array([0.0, -0.0, 1e-40, jnp.inf] * (width // 4)),
        },
        "fc8": {"kernel": jax.random.normal(key, (width, 16)).astype(jnp.bfloat16)},
    }
    optimizer = _sgd(learning_rate=0.01)
    _, opt_state = optimizer.update(params, optimizer.init(params))
    batch_stats = {"norm1": {"mean": jnp.ones(8)}}
    return State(jnp.int32(step), params, batch_stats, opt_state)


def _variables(step):
    state = _make_state(step)
    return {"params": state.params, "batch_stats": state.batch_stats}


def _abstract(state, shardings=None):
    """Return the state's shapes, dtypes and shardings, by default on one device."""
    if shardings is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def _on_mesh(state, devices):
    """Return the state's shardings, the last axis split over `devices` devices."""
    mesh = jax.make_mesh(
        (devices,), ("column",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
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


def _restore(checkpoints):
    """Return (state, metadata) of a checkpoint that must be there."""
    restored = checkpoints.restore(_abstract(_make_state()))
    assert restored is not None
    return restored


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Return a directory with whole steps 10 and 20, to be copied before it is changed."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(10, _make_state(10), metadata=METADATA, top1_error=0.5)
        checkpoints.save(20, _make_state(20), metadata=METADATA, top1_error=0.4)
    return directory


@pytest.fixture
def directory(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    return lambda: caplog.messages


# Saving and restoring.


def test_every_bit_is_restored(directory, warnings):
    with Checkpointer(directory) as checkpoints:
        state, metadata = _restore(checkpoints)
        assert checkpoints.metadata(10) == metadata == METADATA
        with pytest.raises(CheckpointError, match=r"step 15: .* are steps \[10, 20\]"):
            checkpoints.restore_params(15)
    _assert_same_bits(state, _make_state(20))
    assert isinstance(state, State)
    (warning,) = warnings()
    assert warning.startswith("Checkpoint of step 15 skipped: ")


@pytest.mark.parametrize("saved_on, restored_on", [(2, 1), (2, 4), (1, 2)])
def test_checkpoint_moves_to_another_number_of_devices(tmp_path, saved_on, restored_on):
    state = _make_state()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(state, _on_mesh(state, saved_on)), metadata={})
    shardings = _on_mesh(state, restored_on)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.find("best") == 1  # the newest, as none has an error
        restored = checkpoints.restore(_abstract(state, shardings))
    assert restored is not None
    _assert_same_bits(restored[0], state)
    kernel = restored[0].params["conv1"]["kernel"]
    assert kernel.sharding == shardings.params["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, 4, 8 // restored_on)


def test_a_missing_directory_has_no_checkpoint_and_is_not_created(tmp_path):
    assert all_steps(tmp_path / "none") == []
    with Checkpointer(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.restore(_abstract(_make_state())) is None
        assert checkpoints.find("latest") is checkpoints.find("best") is None
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore_params()
    assert not (tmp_path / "none").exists()


# Parts of a state, for notebooks and evaluation.


def test_only_parameters_and_batch_statistics_are_read(directory):
    """Count the live arrays: none is of the optimiser."""
    before = len(jax.live_arrays())
    with Checkpointer(directory, read_only=True) as checkpoints:
        variables, metadata = checkpoints.restore_params()
        assert len(jax.live_arrays()) - before == 4
        older, _ = checkpoints.restore_params(10)
    _assert_same_bits(variables, _variables(20))
    _assert_same_bits(older, _variables(10))
    device = {jax.local_devices()[0]}
    assert all(x.devices() == device for x in jax.tree.leaves(variables))
    assert metadata == METADATA


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: _make_state(width=16),
            r"params/conv1/bias is \(16,\) float32 here and \(8,\) float32 in the checkpoint",
        ),
        (
            lambda s: s._replace(params={"conv1": s.params["conv1"]}),
            r"params/fc8/kernel is missing here and \(8, 16\) bfloat16 in",
        ),
        (
            lambda s: s._replace(params=s.params | {"fc9": jnp.zeros(3)}),
            r"params/fc9 is \(3,\) float32 here and missing in the checkpoint",
        ),
    ],
)
def test_another_network_is_named(two_steps, change, message):
    with (
        Checkpointer(two_steps, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="another network or optimiser: " + message),
    ):
        checkpoints.restore(_abstract(change(_make_state())))


# Which steps are kept.


def test_newest_and_best_are_kept_through_a_restart(tmp_path):
    state = _make_state()
    errors = {1: 0.6, 2: 0.3, 3: 0.5, 4: None, 5: 0.4}
    for step, error in errors.items():
        # A new process each time, as after preemption.
        with Checkpointer(tmp_path, keep=2) as checkpoints:
            checkpoints.save(step, state, metadata={}, top1_error=error)
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert all_steps(tmp_path) == [2, 4, 5]
        assert checkpoints.find("best") == 2
        assert checkpoints.top1_error(2) == 0.3
        assert checkpoints.top1_error(4) is None
        checkpoints.save(6, state, metadata={}, top1_error=None)
        assert all_steps(tmp_path) == [2, 5, 6]
        checkpoints.save(7, state, metadata={}, top1_error=0.3)  # a tie: the newer
        assert checkpoints.find("best") == 7
    assert sorted(os.listdir(tmp_path)) == [".readers", "6", "7"]


def test_nothing_is_deleted_during_a_read(directory):
    with Checkpointer(directory, read_only=True) as reader, Checkpointer(directory, keep=1) as run:
        assert reader.find("best") == 20
        for step in (30, 40):
            run.save(step, _make_state(step), metadata=METADATA, top1_error=0.3)
        variables, _ = reader.restore_params(20)
        _assert_same_bits(variables, _variables(20))
        assert all_steps(directory) == [10, 20, 30, 40]
        reader.close()
        run.save(50, _make_state(50), metadata=METADATA)
        assert all_steps(directory) == [40, 50]  # the best and the newest


def test_second_save_of_a_step_only_adds_a_missing_error(directory):
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(20, _make_state(3), metadata={"other": 1}, top1_error=0.9)
        state, metadata = _restore(checkpoints)
        assert checkpoints.top1_error(20) == 0.4
        _assert_same_bits(state, _make_state(20))
        assert metadata == METADATA
        for error in (None, 0.2, 0.1):  # only the first one counts
            checkpoints.save(30, _make_state(), metadata={}, top1_error=error)
        assert checkpoints.top1_error(30) == 0.2
        assert checkpoints.find("best") == 30


# Damaged steps.


def _files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_one_flipped_bit_in_any_file_is_found(directory):
    """Flip bits of arrays, JSON, commit markers and the manifest, at three places each."""
    folder = directory / "20"
    generator = np.random.default_rng(0)
    names = _files(folder)
    assert len(names) > 10 and any(n.name == MANIFEST for n in names)
    for name in names:
        data = (folder / name).read_bytes()
        for place in {0, len(data) - 1, int(generator.integers(len(data)))}:
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(generator.integers(8))
            (folder / name).write_bytes(damaged)
            found = checkpoint.difference(folder)
            assert found.startswith(f"{name} ") and "does not match its" in found
        (folder / name).write_bytes(data)
    assert checkpoint.difference(folder) == ""


@pytest.mark.parametrize(
    "pattern, damaged",
    [
        ("metadata.json", lambda data: data[:5]),
        ("state/d/*", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        (MANIFEST, None),
    ],
)
def test_a_damaged_step_is_skipped(directory, warnings, pattern, damaged):
    path = next((directory / "20").glob(pattern))
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes()))
    with Checkpointer(directory) as checkpoints:
        state, metadata = _restore(checkpoints)
        assert checkpoints.find("latest") == checkpoints.find("best") == 10
        with pytest.raises(CheckpointError, match="can be used .step 20: "):
            checkpoints.find(20)
    _assert_same_bits(state, _make_state(10))
    assert metadata == METADATA
    (warning,) = warnings()
    assert warning.startswith("Checkpoint of step 20 skipped: ")
    assert str(path.relative_to(directory / "20")) in warning


def test_run_without_an_intact_step_does_not_restart(directory):
    os.remove(directory / "10" / MANIFEST)
    os.truncate(directory / "20" / "metadata.json", 1)
    before = _files(directory)
    with Checkpointer(directory) as checkpoints:
        words = r"step 20: metadata.*; step 10: .*manifest.*new workdir"
        with pytest.raises(CheckpointError, match=words):
            checkpoints.restore(_abstract(_make_state()))
        with pytest.raises(CheckpointError, match="no checkpoint in .* can be used"):
            checkpoints.restore_params()
    assert _files(directory) == before


def test_a_damaged_step_is_replaced_when_training_passes_it(directory):
    os.remove(directory / "20" / MANIFEST)
    with Checkpointer(directory, keep=1) as checkpoints:
        _restore(checkpoints)
        # Below the damaged step, which must not push the whole ones out.
        checkpoints.save(15, _make_state(15), metadata={})
        assert all_steps(directory) == [10, 15, 20]  # 10 is the best one
        checkpoints.save(20, _make_state(21), metadata={"again": True})
        assert all_steps(directory) == [10, 20]
    with Checkpointer(directory) as checkpoints:
        state, metadata = _restore(checkpoints)
    _assert_same_bits(state, _make_state(21))
    assert metadata == {"again": True}


# Kills and full disks.


@pytest.mark.parametrize(
    "killed_in, left",
    [
        # While step 30 is written, and when step 10 is deleted afterwards.
        ("os.rename", ["10", "20", "30.tmp"]),
        ("Checkpointer._delete_old", ["10", "20", "30"]),
        ("os.unlink", ["10.tmp", "20", "30"]),
        ("os.rmdir", ["10.tmp", "20", "30"]),
    ],
)
def test_a_kill_leaves_a_complete_step_or_a_leftover(directory, monkeypatch, killed_in, left):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with Checkpointer(directory, keep=1) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(f"alexnet_jax.training.checkpoint.{killed_in}", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(30, _make_state(30), metadata={})
    assert sorted(path.name for path in directory.glob("[!.]*")) == left
    whole = [int(name) for name in left if name.isdecimal()]
    with Checkpointer(directory, read_only=True) as reader:
        assert [reader.find(step) for step in whole] == whole
        assert reader.find("latest") == whole[-1]
    assert {*left} <= {*os.listdir(directory)}  # a reader deletes nothing
    with Checkpointer(directory, keep=1) as checkpoints:
        assert all_steps(directory) == whole
        assert not list(directory.glob("*.tmp"))
        state, _ = _restore(checkpoints)
        checkpoints.save(40, _make_state(40), metadata={}, top1_error=0.1)
        assert all_steps(directory) == [40]
    _assert_same_bits(state, _make_state(whole[-1]))


def test_other_names_are_left_alone(directory):
    for name in ("notes.tmp", "backup", "030"):
        (directory / name).mkdir()
    (directory / "99.tmp").mkdir()
    with Checkpointer(directory, keep=1) as checkpoints:
        checkpoints.save(30, _make_state(30), metadata={}, top1_error=0.1)
        assert all_steps(directory) == [30]
    left = sorted(os.listdir(directory))
    assert left == [".readers", "030", "30", "backup", "notes.tmp"]


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_full_disk_ends_a_save_and_keeps_earlier_steps(small_disk, monkeypatch, is_checked):
    """Fail before the first byte, or later as if another program had filled the disk."""
    directory = small_disk(3) / "checkpoints"
    rng = np.random.default_rng(0)
    state = {f"layer{i}": rng.normal(size=2**15).astype("f4") for i in range(16)}
    with Checkpointer(directory) as checkpoints:
        checkpoints.save(1, state, metadata={})
        if not is_checked:
            monkeypatch.setattr(checkpoint, "check_room", lambda *_: None)
        with pytest.raises(
            FullDiskError, match=r"checkpoints: No space .* MB free, about 2\.1 MB more needed"
        ):
            checkpoints.save(2, state, metadata={})
    assert ("2.tmp" in os.listdir(directory)) == (not is_checked)
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.find("latest") == 1
    assert os.listdir(directory) == ["1"]


# Steps of earlier versions.

# The bytes that an earlier version wrote.
OLD_MANIFEST = b"""{
 "files": {
  "state/d/0": {
   "sha256": "ab",
   "size": 2
  }
 },
 "format": 1,
 "sha256": "551d52a5504661d920932b13f5caaec7a36743d2d095a9e38fc786eaebfc72a2",
 "step": 3,
 "top1_error": 0.5
}"""


def test_steps_of_earlier_versions_are_read(directory, warnings):
    """Rewrite steps to the old layout: metadata in a folder, format and step in the manifest."""
    (directory / MANIFEST).write_bytes(OLD_MANIFEST)
    assert checkpoint.read_manifest(directory)["top1_error"] == 0.5
    for step, error in ((10, 0.1), (20, None)):
        folder = directory / str(step)
        (folder / MANIFEST).unlink()
        (folder / "metadata").mkdir()
        (folder / "metadata.json").rename(folder / "metadata" / "metadata")
        (folder / "state" / "_CHECKPOINT_METADATA").rename(folder / "_CHECKPOINT_METADATA")
        body = {"files": checkpoint.checksums(folder), "format": 1, "step": step}
        text = checkpoint.manifest_text(body | {"top1_error": error})
        (folder / MANIFEST).write_bytes(text)
    with Checkpointer(directory) as checkpoints:
        state, metadata = _restore(checkpoints)
        assert checkpoints.find("best") == 10
        checkpoints.save(20, _make_state(), metadata={}, top1_error=0.05)
        checkpoints.save(30, _make_state(30), metadata={})
    _assert_same_bits(state, _make_state(20))
    assert metadata == METADATA
    with Checkpointer(directory, read_only=True) as checkpoints:
        assert checkpoints.find("best") == 20
        assert all_steps(directory) == [10, 20, 30]
        variables, _ = checkpoints.restore_params(20)
    _assert_same_bits(variables, _variables(20))
    assert warnings() == []
