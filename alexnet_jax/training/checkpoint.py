"""Save and restore checkpoints, in one process or several.

`step_folders` describes the files.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from alexnet_jax.system.files import FullDiskError, check_room, explain_full_disk, shared_lock
from alexnet_jax.training.step_folders import (
    READERS,
    STATE,
    CheckpointError,
    StepFolders,
    read_manifest,
)


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Return whether `directory` holds any saved step, damaged or not.

    A run that finds only damaged steps must not start anew in silence. It calls
    `Checkpointer.restore`, which then raises `CheckpointError`.
    """
    return bool(StepFolders(pathlib.Path(directory)).steps())


def split_step(text: str) -> tuple[str, int | str]:
    """Split DIR, DIR@STEP, DIR@best or DIR@latest into DIR and the step.

    DIR alone means DIR@best.

    Raises:
      CheckpointError: for another word after the "@".
    """
    folder, at, step = text.rpartition("@")
    if not at or pathlib.Path(text).exists():
        return text, "best"
    if step not in ("best", "latest") and not step.isdecimal():
        raise CheckpointError(
            f"{text}: after the @ comes a step, best or latest; {step!r} is none."
        )
    return folder, int(step) if step.isdecimal() else step


class Checkpointer:
    """Saves and restores one pytree of arrays per step, with JSON metadata.

    Keeps the newest `keep` steps and the one with the lowest top-1 error. An older step
    is deleted only after the new one is complete.

    Every process of a run calls every method, on a file system that all of them see,
    and writes and reads its own part of the arrays. Process 0 alone compares checksums,
    decides which step is used, writes the manifest and deletes.

    Args:
      directory: a local or mounted folder.
      keep: number of newest steps to keep, at least 1.
      read_only: for evaluation and notebooks, which never save. Nothing is deleted, and
        a run in the same folder deletes nothing until `close`.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
    ):
        self.directory = pathlib.Path(directory).expanduser().absolute()
        self._keep = keep
        self._folders = StepFolders(self.directory)
        self._is_first = jax.process_index() == 0
        self._handler: Any = ocp.PyTreeCheckpointHandler()
        self._arrays = ocp.Checkpointer(self._handler)
        self._reading = contextlib.ExitStack()
        if read_only:
            self._reading.enter_context(shared_lock(self.directory / READERS))
        elif self._is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._folders.delete_leftovers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Free Orbax's threads, and let runs delete old steps again."""
        self._arrays.close()
        self._reading.close()

    def save(
        self, step: int, state: Any, *, metadata: Mapping[str, Any], top1_error: float | None = None
    ) -> None:
        """Write a step and return when it is complete on the disk.

        An existing step is not written again, but a missing `top1_error` is added to
        it. A damaged step of the same number is replaced.

        Args:
          step: number of finished training steps.
          state: pytree of arrays, sharded or not.
          metadata: JSON values; tuples come back as lists, keys as strings.
          top1_error: in [0, 1], of the evaluation at this step, if there was one.

        Raises:
          CheckpointError: if the disk is full. Earlier steps stay as they were.
        """
        folders, text = self._folders, json.dumps(dict(metadata))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        is_new = _decided(lambda: folders.make_way(step))
        if is_new:
            try:
                with explain_full_disk(self.directory, lambda: size):
                    check_room(self.directory, size)
                    self._arrays.save(
                        folders.temporary(step) / STATE, args=ocp.args.PyTreeSave(state)
                    )
                    if self._is_first:
                        folders.complete(step, text, top1_error)
            except FullDiskError as full:
                if self._is_first:
                    folders.delete(step)
                raise CheckpointError(
                    f"no checkpoint of step {step}: {full}. Earlier ones are as they were."
                ) from full
        elif self._is_first:
            folders.add_error(step, top1_error)
        multihost_utils.sync_global_devices(f"checkpoint of step {step}")
        if is_new and self._is_first:
            folders.delete_old(self._keep)

    def all_steps(self) -> list[int]:
        """Return every saved step, damaged or not, in increasing order."""
        return self._folders.steps()

    def find(self, which: int | str) -> int | None:
        """Return the step for a number, "latest" or "best"; None if there is none.

        "latest" is the newest whole step. "best" is the whole step with the lowest
        top-1 error, the newer one on a tie; the latest one if none was evaluated.
        """
        if isinstance(which, int):
            return which
        step = _decided(lambda: self._folders.find(which))
        return None if step < 0 else step

    def is_best(self, error: float) -> bool:
        """Return whether no whole step has as low a top-1 error."""
        return bool(_decided(lambda: self._folders.is_best(error)))

    def top1_error(self, step: int) -> float | None:
        """Return the error in [0, 1] of a whole step; None if it was not evaluated."""
        return read_manifest(self._folders.folder(step))["top1_error"]

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a step; raise CheckpointError unless it is whole."""
        return self._folders.metadata(_decided(lambda: self._folders.require_whole(step)))

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restore the newest whole step.

        Args:
          abstract_state: the state's pytree with a `jax.ShapeDtypeStruct` at every
            leaf, each with a sharding. The devices may differ from the saved ones.

        Returns:
          (state, metadata), or None if there is no checkpoint at all.

        Raises:
          CheckpointError: if all checkpoints are damaged, or if the checkpoint holds
            another network.
        """
        step = _decided(lambda: self._folders.require_whole(None))
        if step < 0:
            return None
        if differs := _difference(abstract_state, self._saved_tree(step)):
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} holds another "
                f"network: {differs}. Use the model.* and optim.* settings it was saved "
                "with (its metadata holds the config), or a new workdir."
            )
        return self._restore_arrays(step, abstract_state), self._folders.metadata(step)

    def restore_params(
        self, *, step: int | None = None, parts: Sequence[str] = ("params", "batch_stats")
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restore the named parts of a state onto the first local device.

        Nothing else is read or allocated.

        Args:
          step: restore this one; the newest whole one by default.
          parts: fields of the state; one that is empty or absent is left out.

        Returns:
          (variables for `model.apply`, metadata).

        Raises:
          CheckpointError: if `step` is missing or damaged, or if no step is whole.
        """
        chosen = _decided(lambda: self._folders.require_whole(step))
        if chosen < 0:
            raise CheckpointError(f"there is no checkpoint in {self.directory}.")
        saved = self._saved_tree(chosen)
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            {part: saved[part] for part in parts if saved.get(part)},
        )
        return self._restore_arrays(chosen, target), self._folders.metadata(chosen)

    def _saved_tree(self, step: int) -> dict[str, Any]:
        """Return shapes and dtypes of a saved state, as nested dicts and lists."""
        return self._handler.metadata(self._folders.folder(step) / STATE).tree

    def _restore_arrays(self, step: int, target: Any) -> Any:
        args = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return self._arrays.restore(self._folders.folder(step) / STATE, args=args)


def _decided(decide: Callable[[], int]) -> int:
    """Return the decision of process 0; if it raises, every process raises.

    A network file system may show the other processes an older state.
    """
    number, error = 0, None
    if jax.process_index() == 0:
        try:
            number = decide()
        except (CheckpointError, OSError) as raised:
            error = raised
    decision = np.array([number, error is not None], np.int32)
    number, failed = multihost_utils.broadcast_one_to_all(decision)
    if failed:
        raise error or CheckpointError("no checkpoint can be used; process 0 says why.")
    return int(number)


def _difference(expected: Any, saved: Any) -> str:
    """Return the first leaf whose shape or dtype differs, in words; "" if none does.

    Orbax stores named tuples as dicts and tuples as lists; their paths are the same.
    """
    here, there = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (expected, saved)
    )
    for path in {**here, **there}:
        if here.get(path) != there.get(path):
            return (
                f"{path} is {here.get(path, 'missing')} here and "
                f"{there.get(path, 'missing')} in the checkpoint"
            )
    return ""
