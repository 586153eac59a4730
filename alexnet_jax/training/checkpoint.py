"""Checkpoints: one folder per step, with checksums, renamed into place once.

    checkpoints/
      1200/
        state/           the arrays, written by Orbax: parameters, optimizer state, step
        metadata.json    config and host-side state, for example the plateau rule
        manifest.json    size and SHA-256 of every file, and the step's top-1 error
      1300.tmp/          a step that is being written or deleted
      .readers           locked by readers; nothing is deleted meanwhile

A folder named by a number is complete; anything else is a leftover.

A step is written into `N.tmp`, synced to the disk and renamed to `N`. A deletion starts
with the opposite rename. So a kill leaves `N` or `N.tmp`, and the next run in this
folder deletes `N.tmp`. Each step is compared with its manifest before it is used,
because Orbax does not notice a flipped bit. A damaged step is skipped with a warning
and stays where it is.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from alexnet_jax.system.files import (
    FullDiskError,
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
    """A checkpoint that cannot be written or used; the message says what to do."""


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Return whether `directory` holds any saved step, damaged or not.

    A run that finds only damaged steps must not start anew in silence. It calls
    `Checkpointer.restore`, which then raises `CheckpointError`.
    """
    return bool(_list_steps(pathlib.Path(directory)))


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
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        read_only: bool = False,
    ):
        self.directory = pathlib.Path(directory).expanduser().absolute()
        self._keep = keep
        # Result of the checksums by step, "" for a whole one. A step of AlexNet has
        # 0.5 GB, so each is read once.
        self._problems: dict[int, str] = {}
        self._handler: Any = ocp.PyTreeCheckpointHandler()
        self._arrays = ocp.Checkpointer(self._handler)
        self._reading = contextlib.ExitStack()
        if read_only:
            self._reading.enter_context(shared_lock(self.directory / READERS))
        elif jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob("*.tmp"):
                if path.stem.isdecimal():
                    shutil.rmtree(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Free Orbax's threads, and let runs delete old steps again."""
        self._arrays.close()
        self._reading.close()

    # Saving.

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any],
        top1_error: float | None = None,
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
        text = json.dumps(dict(metadata))

        def make_way() -> bool:
            if step in self.all_steps() and not self._problem(step):
                return False
            self._delete(step)
            return True

        if not self._decided(make_way):
            self._add_error(step, top1_error)
            return
        temporary = self.directory / f"{step}.tmp"
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            with explain_full_disk(self.directory, lambda: size):
                check_room(self.directory, size)
                self._arrays.save(temporary / STATE, args=ocp.args.PyTreeSave(state))
                if jax.process_index() == 0:
                    (temporary / METADATA).write_text(text)
                    body = {"files": _checksums(temporary), "top1_error": top1_error}
                    (temporary / MANIFEST).write_bytes(_manifest_text(body))
                    for path in (temporary, *temporary.rglob("*")):
                        _sync(path)
                    os.rename(temporary, self._folder(step))
                    _sync(self.directory)
        except FullDiskError as full:
            if jax.process_index() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"no checkpoint of step {step}: {full}. Earlier ones are as they were."
            ) from full
        multihost_utils.sync_global_devices(f"checkpoint of step {step}")
        self._problems[step] = ""
        if jax.process_index() == 0:
            self._delete_old_steps()

    def _add_error(self, step: int, top1_error: float | None) -> None:
        """Add the error of an evaluation that came after the step was saved."""
        if jax.process_index() == 0:
            body = _read_manifest(self._folder(step))
            if body["top1_error"] is None:
                body["top1_error"] = top1_error
                with atomic_write(self._folder(step) / MANIFEST) as file:
                    file.write(_manifest_text(body))
        multihost_utils.sync_global_devices(f"error of step {step}")

    def _delete_old_steps(self) -> None:
        """Delete all but the newest `keep` steps and the best one, if nobody reads."""
        steps = list(self._errors())
        kept = {*steps[-self._keep :], self._best()}
        if old := [step for step in steps if step not in kept]:
            with (
                contextlib.suppress(HeldError),  # deleted after a later save
                exclusive_lock(self.directory / READERS, wait=False),
            ):
                for step in old:
                    self._delete(step)

    def _delete(self, step: int) -> None:
        """Delete a step and its leftovers, if they exist."""
        folder, temporary = self._folder(step), self.directory / f"{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            os.rename(folder, temporary)
            _sync(self.directory)
            shutil.rmtree(temporary)
        self._problems.pop(step, None)

    # Which steps there are.

    def all_steps(self) -> list[int]:
        """Return every saved step, damaged or not, in increasing order."""
        return _list_steps(self.directory)

    def find(self, which: int | str) -> int | None:
        """Return the step for a number, "latest" or "best"; None if there is none.

        "latest" is the newest whole step. "best" is the whole step with the lowest
        top-1 error, the newer one on a tie; the latest one if none was evaluated.
        """

        def search() -> int:
            best = self._best() if which == "best" else -1
            return self._first_whole(self.all_steps()[::-1]) if best < 0 else best

        step = which if isinstance(which, int) else self._decided(search)
        return None if step < 0 else step

    def is_best(self, error: float) -> bool:
        """Return whether no whole step has as low a top-1 error."""

        def better() -> bool:
            best = self._errors().get(self._best())
            return best is None or error < best

        return bool(self._decided(better))

    def top1_error(self, step: int) -> float | None:
        """Return the error in [0, 1] of a step; None if it was not evaluated."""
        return self._errors().get(step)

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a step; raise CheckpointError unless it is whole."""
        return self._read_metadata(self._choose(step))

    # Restoring.

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
        step = self._choose(None)
        if step < 0:
            return None
        here, there = _shapes(abstract_state), _shapes(self._saved_tree(step))
        for path in {**here, **there}:
            if here.get(path) != there.get(path):
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.directory} holds another "
                    f"network: {path} is {here.get(path, 'missing')} here and "
                    f"{there.get(path, 'missing')} in the checkpoint. Use the model.* "
                    "and optim.* settings it was saved with (its metadata holds the "
                    "config), or a new workdir."
                )
        return self._restore_arrays(step, abstract_state), self._read_metadata(step)

    def restore_params(
        self,
        *,
        step: int | None = None,
        parts: Sequence[str] = ("params", "batch_stats"),
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
        step = self._choose(step)
        if step < 0:
            raise CheckpointError(f"there is no checkpoint in {self.directory}.")
        saved = self._saved_tree(step)
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            {part: saved[part] for part in parts if saved.get(part)},
        )
        return self._restore_arrays(step, target), self._read_metadata(step)

    def _choose(self, step: int | None) -> int:
        """Return `step`, or the newest whole one if it is None; -1 if there is none.

        Raises:
          CheckpointError: if `step` is missing or damaged, or all steps are damaged.
        """

        def choose() -> int:
            steps = self.all_steps()
            candidates = steps[::-1] if step is None else [step]
            chosen = self._first_whole(candidates)
            if candidates and chosen < 0:
                problems = "; ".join(
                    f"step {s}: {self._problem(s)}" for s in candidates
                )
                raise CheckpointError(
                    f"no checkpoint in {self.directory} can be used ({problems}; there "
                    f"are steps {steps}). Restore the folder from a copy, name another "
                    "step, or start again in a new workdir."
                )
            return chosen

        return self._decided(choose)

    def _saved_tree(self, step: int) -> dict[str, Any]:
        """Return shapes and dtypes of a saved state, as nested dicts and lists."""
        return self._handler.metadata(self._folder(step) / STATE).tree

    def _restore_arrays(self, step: int, target: Any) -> Any:
        args = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return self._arrays.restore(self._folder(step) / STATE, args=args)

    def _read_metadata(self, step: int) -> dict[str, Any]:
        path = self._folder(step) / METADATA
        if not path.exists():
            path = self._folder(step) / OLD_METADATA
        return json.loads(path.read_text())

    # Decisions of process 0.

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _decided(self, decide: Callable[[], int]) -> int:
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
            raise error or CheckpointError(
                f"no checkpoint can be used in {self.directory}; process 0 says why."
            )
        return int(number)

    def _problem(self, step: int) -> str:
        """Return how a step differs from its manifest, "" if it does not; warn once."""
        if step not in self._problems:
            self._problems[step] = _difference(self._folder(step))
            if self._problems[step]:
                logging.warning(
                    "Checkpoint of step %d skipped: %s.", step, self._problems[step]
                )
        return self._problems[step]

    def _first_whole(self, steps: Iterable[int]) -> int:
        """Return the first step that matches its manifest, -1 if none does."""
        return next((step for step in steps if not self._problem(step)), -1)

    def _best(self) -> int:
        """Return the whole step with the lowest top-1 error; -1: none was evaluated."""
        errors = {s: error for s, error in self._errors().items() if error is not None}
        return self._first_whole(sorted(errors, key=lambda step: (errors[step], -step)))

    def _errors(self) -> dict[int, float | None]:
        """Return the top-1 error of each step not known to be damaged, in order.

        Only manifests are read.
        """
        errors = {}
        for step in self.all_steps():
            try:
                errors[step] = _read_manifest(self._folder(step))["top1_error"]
            except (OSError, ValueError):
                self._problem(step)  # warns
        return {s: error for s, error in errors.items() if not self._problems.get(s)}


def _list_steps(directory: pathlib.Path) -> list[int]:
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _checksums(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file under `folder`, by relative path."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            sums[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    return sums


def _difference(folder: pathlib.Path) -> str:
    """Return the first difference between a step and its manifest; "" if none."""
    try:
        expected = _read_manifest(folder)["files"]
        found = _checksums(folder)
    except (OSError, ValueError) as error:
        return str(error)
    for name in sorted(expected):
        if found.get(name) != expected[name]:
            return f"{name} is missing or does not match its size and SHA-256 sum"
    return ""


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest; raise OSError or ValueError if it is missing or changed."""
    text = (folder / MANIFEST).read_bytes()
    with contextlib.suppress(ValueError):
        body = json.loads(text)
        if _manifest_text(body) == text:
            return body
    raise ValueError(f"{MANIFEST} does not match its own SHA-256 sum")


def _manifest_text(body: Mapping[str, Any]) -> bytes:
    """Return the file's bytes; they hold the checksum of all other entries."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True).encode()


def _sync(path: pathlib.Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shapes(tree: Any) -> dict[str, str]:
    """Return "(shape) dtype" by path.

    Orbax stores named tuples as dicts and tuples as lists; their paths are the same.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}"
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
