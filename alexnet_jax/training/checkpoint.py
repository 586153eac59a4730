"""Save and restore checkpoints, in one process or several.

    checkpoints/
      1200/
        state/           the arrays, written by Orbax: parameters, optimizer state, step
        metadata.json    config and host-side state, for example the plateau rule
        manifest.json    size and SHA-256 of every file, and the step's top-1 error
      1300.tmp/          a step that is being written or deleted
      .readers           locked by readers; nothing is deleted meanwhile

A folder named by a number is complete; anything else is a leftover.

A step is written into `N.tmp`, synced to the disk and renamed to `N`. A deletion starts
with the opposite rename. So a kill leaves `N` or `N.tmp`. Each step is compared with its
manifest before it is used, because Orbax does not notice a flipped bit. A damaged step is
skipped with a warning and stays where it is.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from alexnet_jax.system.files import (
    HeldError,
    atomic_write,
    check_room,
    exclusive_lock,
    explain_full_disk,
    shared_lock,
)

STATE, METADATA, MANIFEST = "state", "metadata.json", "manifest.json"
OLD_METADATA = "metadata/metadata"  # in steps of earlier versions
READERS = ".readers"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says what to do."""


def split_step(text: str) -> tuple[str, int | str]:
    """Split DIR, DIR@STEP, DIR@best or DIR@latest into DIR and the step.

    DIR alone means DIR@best.

    Raises:
      CheckpointError: for another word after the "@".
    """
    folder, at, step = text.rpartition("@")
    if not at or Path(text).exists():
        return text, "best"
    if step not in ("best", "latest") and not step.isdecimal():
        raise CheckpointError(
            f"{text}: expected a step, best or latest after the @; got {step!r}. Name one of them."
        )
    return folder, int(step) if step.isdecimal() else step


def all_steps(directory: Path) -> list[int]:
    """Return every saved step, damaged or not, in increasing order.

    A run that finds only damaged steps must not start anew in silence. It calls
    `Checkpointer.restore`, which then raises `CheckpointError`.
    """
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


class Checkpointer(contextlib.ExitStack):
    """Save and restore one pytree of arrays per step, with JSON metadata.

    Keeps the newest `keep` steps and the one with the lowest top-1 error. An older step
    is deleted only after the new one is complete.

    Every process of a run calls every method, on a file system that all of them see,
    and writes and reads its own part of the arrays. Process 0 alone compares checksums,
    decides which step is used, writes the manifest and deletes.

    Args:
      directory: a local or mounted folder.
      keep: number of newest steps to keep, at least 1.
      read_only: for evaluation and notebooks, which never save. A run in the same folder
        deletes nothing until this one is closed.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
    ):
        super().__init__()
        self.directory = Path(directory).expanduser().absolute()
        self._keep = keep
        # Difference from the manifest by step, "" for a whole one. A step of AlexNet
        # has 0.5 GB, so each is read once.
        self._problems: dict[int, str] = {}
        self._is_first = jax.process_index() == 0
        self._handler: Any = ocp.PyTreeCheckpointHandler()
        self._arrays = ocp.Checkpointer(self._handler)
        self.callback(self._arrays.close)
        if read_only:
            self.enter_context(shared_lock(self.directory / READERS))
        elif self._is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob("*.tmp"):
                if path.stem.isdecimal():
                    shutil.rmtree(path)

    # Writing.

    def save(
        self, step: int, state: Any, *, metadata: Mapping[str, Any], top1_error: float | None = None
    ) -> None:
        """Write a step and return when it is complete on the disk.

        An existing step is not written again, but a missing `top1_error`, in [0, 1], is
        added to it. A damaged step of the same number is replaced.

        Raises:
          FullDiskError: (an OSError) if the disk is full. Earlier steps stay as they
            were.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        temporary = self.directory / f"{step}.tmp"

        def make_way() -> bool:
            if step in all_steps(self.directory) and not self._problem(step):
                return False
            self._delete(step)
            check_room(self.directory, size)
            return True

        is_new = _agreed(make_way)
        if is_new:
            with explain_full_disk(self.directory, lambda: size):
                self._arrays.save(temporary / STATE, args=ocp.args.PyTreeSave(state))
                if self._is_first:
                    (temporary / METADATA).write_text(json.dumps(dict(metadata)))
                    body = {"files": checksums(temporary), "top1_error": top1_error}
                    (temporary / MANIFEST).write_bytes(manifest_text(body))
                    for path in (temporary, *temporary.rglob("*")):
                        _sync(path)
                    os.rename(temporary, self.directory / str(step))
                    _sync(self.directory)
                    self._problems[step] = ""
        elif self._is_first and self.top1_error(step) is None:
            body = read_manifest(self.directory / str(step)) | {"top1_error": top1_error}
            with atomic_write(self.directory / str(step) / MANIFEST) as file:
                file.write(manifest_text(body))
        multihost_utils.sync_global_devices(f"checkpoint of step {step}")
        if is_new and self._is_first:
            self._delete_old()

    def _delete_old(self) -> None:
        """Delete all but the newest steps and the best one, unless somebody reads."""
        steps = [s for s in all_steps(self.directory) if not self._problems.get(s)]
        kept = {*steps[-self._keep :], self._find("best")}
        if old := [step for step in steps if step not in kept]:
            with (
                contextlib.suppress(HeldError),  # deleted after a later save
                exclusive_lock(self.directory / READERS, wait=False),
            ):
                for step in old:
                    self._delete(step)

    def _delete(self, step: int) -> None:
        """Delete a step and its leftover, if they exist."""
        folder, temporary = self.directory / str(step), self.directory / f"{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            os.rename(folder, temporary)
            _sync(self.directory)
            shutil.rmtree(temporary)
        self._problems.pop(step, None)

    # Reading.

    def find(self, which: int | str) -> int | None:
        """Return a step that matches its manifest; None if there is no checkpoint.

        Args:
          which: a step, "latest", or "best": the one with the lowest top-1 error, the
            newer one on a tie, the latest one if none was evaluated.

        Raises:
          CheckpointError: if the step is missing or damaged, or all steps are damaged.
        """
        step = _agreed(lambda: self._find(which))
        return None if step < 0 else step

    def _find(self, which: int | str) -> int:
        """Return `find`'s result in process 0; -1 for None."""
        steps = all_steps(self.directory)
        candidates = [which] if isinstance(which, int) else steps[::-1]
        if which == "best":
            candidates.sort(key=self._rank)  # stable: the newest first
        for step in candidates:
            if not self._problem(step):
                return step
        if not candidates:
            return -1
        problems = "; ".join(f"step {step}: {self._problem(step)}" for step in candidates)
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be used ({problems}; there are steps "
            f"{steps}). Restore the folder from a copy, name another step, or start again "
            "in a new workdir."
        )

    def _rank(self, step: int) -> float:
        """Return the top-1 error of a step; infinity if it is not known."""
        with contextlib.suppress(OSError, ValueError):  # a damaged step
            error = self.top1_error(step)
            return math.inf if error is None else error
        return math.inf

    def _problem(self, step: int) -> str:
        """Return how a step differs from its manifest, "" if it does not; warn once."""
        if step not in self._problems:
            self._problems[step] = difference(self.directory / str(step))
            if self._problems[step]:
                logging.warning("Checkpoint of step %d skipped: %s.", step, self._problems[step])
        return self._problems[step]

    def top1_error(self, step: int) -> float | None:
        """Return the error in [0, 1] of a step; None if it was not evaluated."""
        return read_manifest(self.directory / str(step))["top1_error"]

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a step that `find` has returned."""
        path = self.directory / str(step) / METADATA
        if not path.exists():
            path = self.directory / str(step) / OLD_METADATA
        return json.loads(path.read_text())

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
        step = self.find("latest")
        if step is None:
            return None
        here, there = _shapes(abstract_state), _shapes(self._saved_tree(step))
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.directory} holds another "
                    f"network or optimiser: {name} is {here.get(name, 'missing')} here and "
                    f"{there.get(name, 'missing')} in the checkpoint. Use the model.*, "
                    "optim.* and schedule.* settings it was saved with, or a new workdir."
                )
        return self._restore_arrays(step, abstract_state), self.metadata(step)

    def restore_params(
        self, which: int | str = "latest", *, parts: Sequence[str] = ("params", "batch_stats")
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restore the named parts of a state onto the first local device.

        Nothing else is read or allocated. If the state has a moving average of the
        parameters, "params" is this average, unless "extra" is asked for as well.

        Args:
          which: as in `find`.
          parts: fields of the state; one that is empty or absent is left out.

        Returns:
          (variables for `model.apply`, metadata).

        Raises:
          CheckpointError: if there is no such step, or it is damaged.
        """
        step = self.find(which)
        if step is None:
            raise CheckpointError(
                f"there is no checkpoint in {self.directory}. Train first, or name another --workdir."
            )
        saved = self._saved_tree(step)
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            {part: saved[part] for part in parts if saved.get(part)},
        )
        average = (saved.get("extra") or {}).get("average")
        if average and "params" in target and "extra" not in target:
            target["extra"] = {"average": target.pop("params")}
        found = self._restore_arrays(step, target)
        if "params" in parts and "params" not in found:
            found["params"] = found.pop("extra")["average"]
        return found, self.metadata(step)

    def _saved_tree(self, step: int) -> dict[str, Any]:
        return self._handler.metadata(self.directory / str(step) / STATE).tree

    def _restore_arrays(self, step: int, target: Any) -> Any:
        args = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return self._arrays.restore(self.directory / str(step) / STATE, args=args)


def _agreed(decide: Callable[[], int]) -> int:
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
        raise error or CheckpointError("process 0 cannot use a checkpoint; read its message.")
    return int(number)


def _shapes(tree: Any) -> dict[str, str]:
    """Return shape and dtype of each leaf, by its path.

    Orbax stores named tuples as dicts and tuples as lists; their paths are the same.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# Manifests.


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file under `folder`, by relative path."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            sums[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    return sums


def difference(folder: Path) -> str:
    """Return the first difference between a step and its manifest; "" if none."""
    try:
        expected = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return str(error)
    found = checksums(folder)
    for name in sorted(expected):
        if found.get(name) != expected[name]:
            return f"{name} is missing or does not match its size and SHA-256 sum"
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; raise OSError or ValueError if it is missing or changed."""
    text = (folder / MANIFEST).read_bytes()
    with contextlib.suppress(ValueError):
        body = json.loads(text)
        if manifest_text(body) == text:
            return body
    raise ValueError(f"{MANIFEST} does not match its own SHA-256 sum")


def manifest_text(body: Mapping[str, Any]) -> bytes:
    """Return the file's bytes; they hold the checksum of all other entries."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True).encode()


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
