"""Checkpoints that are whole or not used: Orbax, and a manifest of SHA-256 sums.

Orbax writes and reads the arrays and knows their shardings, so a state saved on two
devices is restored on one or on four. It notices a truncated file but not a flipped
bit, and a run can be killed between two of its files. So each step folder holds a
`manifest.json`, written after everything else, with the size and the sum of every
file. A step without a valid manifest, or with a file that does not match it, is passed
over with a warning and the step before is used. So is a folder with another name than
that of its step, such as a copy; manifests from before they named it are believed.

    checkpoints/
      1200/               one folder a step, named by Orbax
        state/            the arrays: parameters, optimiser state, step
        metadata/         JSON: config, host-side state such as the plateau rule
        manifest.json     written last; also holds the step and its top-1 error
      1300.orbax-checkpoint-tmp/    not finished by Orbax yet, or half removed
      .saving             names the step that is being saved, or was when a kill came
      .readers            locked by those who read; nothing is deleted meanwhile

A step folder without a manifest that `.saving` does not name has lost it, or is not
ours. It is never deleted, and without a whole step beside it nothing is begun there.

What a kill leaves, wherever it comes, and what is made of it:

    in a save, before Orbax has renamed its folder: N.orbax-checkpoint-tmp, which can
        be no step; the next start deletes it
    from then until the manifest is renamed: N without one, which `.saving` names;
        passed over, and removed by the next save
    until `.saving` is gone: N is whole; the next start deletes `.saving`, so that N is
        not taken for unfinished should it lose its manifest one day
    in a removal, of an old step, a spoilt one or an unfinished one: N as it was before
        the folder is renamed, and N.orbax-checkpoint-tmp from then on. Never a part of
        N under its own name: that has lost its marks, and might be anything
    when an error is added to a whole step: one manifest or the other, both whole
"""

import contextlib
import errno
import hashlib
import json
import logging as python_logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from alexnet_jax.cli import free_name
from alexnet_jax.data import locks
from alexnet_jax.data.files import (
    FullDiskError,
    replacing,
    telling_of_a_full_disk,
)

MANIFEST = "manifest.json"
_FORMAT = 1
_TEMPORARY = MANIFEST + ".tmp"
READERS = ".readers"
SAVING = ".saving"
# What Orbax writes into a step, and how it calls one that is not whole yet.
_ORBAX_FILE, _ORBAX_UNFINISHED = "_CHECKPOINT_METADATA", ".orbax-checkpoint-tmp"
_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
# With a number behind it where the name was taken; Orbax once put the time there. What
# has no step's number before it is somebody else's, whatever Orbax would make of it.
_UNFINISHED_NAME = re.compile(
    rf"({_STEP_NAME.pattern}){re.escape(_ORBAX_UNFINISHED)}([-_][0-9]+)?"
)
# Of a state's size: no state is compressed to less (at first half of it is zeros). With
# less room than that on the disk nothing is begun.
_LEAST_SHARE = 0.4


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says what to do."""


class _StepNames(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
    """Where Orbax finds a step. It is not to look for any by itself.

    It would read in every folder with a number, and warn of each that is none of its.
    """

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[ocp.path.step.Metadata]:
        return iter(())

    def find_step(self, base_path: Any, step: int) -> ocp.path.step.Metadata:
        return ocp.path.step.Metadata(step=step, path=base_path / str(step))


def has_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds any saved step, whole or spoilt since.

    The one that a run was killed in was never one. Where there is nothing else, this was
    its first save, and the run starts again. But a run that finds only spoilt steps, or
    folders that may be anything, must not start from scratch in silence: it should go
    on to `Checkpointer.restore`, which then raises `CheckpointError`.
    """
    path = _absolute(directory)
    return any(not _is_unfinished(path / str(step)) for step in _list_steps(path))


def split_step(text: str) -> tuple[str, int | str]:
    """DIR, DIR@STEP, DIR@best or DIR@latest -> (DIR, which step); DIR is DIR@best.

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
    """Saves and restores one pytree of arrays a step, with JSON metadata beside it.

    Keeps the newest `keep` whole steps and, in addition, the one with the lowest
    top-1 error. An older step is deleted only after the new one has its manifest, so
    at every moment, a kill included, at least one whole step is on the disk.

    Every process calls every method, on a file system that all of them see, and writes
    and reads its own parts of the arrays. Process 0 alone checks the sums, writes the
    manifest and deletes; the others take its word for what is there, since a network
    file system may show them an older state.

    Args:
      directory: a local or mounted folder; a relative one is made absolute here, once.
      keep: how many of the newest steps to keep, at least 1.
      read_only: for evaluation and notebooks: saves nothing, deletes nothing (not even
        what a killed save left behind), and `save` is refused. Until it is closed no
        run deletes what there is now, so that a run may go on in the same folder.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        read_only: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; it must be at least 1.")
        _quiet_orbax()
        self.directory = _absolute(directory)
        self._keep = keep
        self._read_only = read_only
        # What is wrong with a step, "" when it is whole. Sums are costly (0.5 GB a
        # step), so saving trusts what this process has already checked; restoring
        # always checks again.
        self._problems: dict[int, str] = {}
        self._reading = contextlib.ExitStack()
        if read_only:
            self._reading.enter_context(locks.shared(self.directory / READERS))
        elif jax.process_index() == 0:
            _clear_after_a_kill(self.directory)
        # Orbax's own preservation policies are not used, for two reasons: they delete
        # before the new step has its manifest, and they count broken steps. Nor are
        # its metrics: one flipped bit in their JSON makes the manager refuse to open.
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                enable_async_checkpointing=False,
                save_root_metadata=False,
                step_name_format=_StepNames(),
                preservation_policy=ocp.checkpoint_managers.LatestN(n=None),
            ),
            handler_registry=_handlers(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees Orbax's threads. Saving is synchronous, so nothing is outstanding."""
        self._manager.close()
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
        """Writes `state` and returns when it is whole on the disk.

        Saving a step that is already there writes no arrays; a `top1_error` given then
        and not before is added to it. A broken step of the same number is replaced.

        Args:
          step: number of finished training steps, not below the newest whole step.
          state: pytree of arrays, sharded or not.
          metadata: plain JSON values; tuples come back as lists, keys as strings.
          top1_error: in [0, 1], of the evaluation at this step; None or NaN if there
            was none: such a step is never the best one.

        Raises:
          CheckpointError: for a step below the newest one, in read-only use, or if the
            disk is full; of that step nothing is left then.
          TypeError: for metadata that JSON cannot hold.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read-only.")
        step = int(step)
        metadata = _json_values(metadata)
        if self._agreed(lambda: self._is_whole(step)):
            self._add_error(step, top1_error)
            return
        if (killed_in := self._agreed(self._unfinished_step)) >= 0:
            self._remove([killed_in])
        if self._agreed(lambda: os.path.lexists(self._folder(step))):
            self._make_way(step)
        newest = self._agreed(lambda: max(self._known_whole_steps(), default=-1))
        if step < newest:
            raise CheckpointError(
                f"refusing to save step {step}: {self.directory} already holds step "
                f"{newest}, and a later start would resume from that one. Use a new "
                "workdir, or delete the newer checkpoints."
            )
        with self._room_for(step, state):
            if jax.process_index() == 0:
                _write_saving(self.directory, step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    metadata=ocp.args.JsonSave(metadata),
                ),
                force=True,  # otherwise an interval policy may skip it without a word
            )
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._folder(step)
                _write_manifest(folder, _sums(folder), top1_error, step)
                (self.directory / SAVING).unlink(missing_ok=True)
        _wait_for_all(f"manifest {step}")
        self._problems[step] = ""
        self._remove_old_steps()

    @contextlib.contextmanager
    def _room_for(self, step: int, state: Any) -> Iterator[None]:
        """Of a step that does not fit on the disk nothing is left; an error says so.

        One of several processes does not wait for the others: it ends the run.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            with telling_of_a_full_disk(self.directory, lambda: size):
                if shutil.disk_usage(self.directory).free < _LEAST_SHARE * size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                yield
        except FullDiskError as error:
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):  # it may not be there
                    _remove_folder(self._folder(step))
                for folder in self.directory.glob(f"{step}{_ORBAX_UNFINISHED}*"):
                    shutil.rmtree(folder, ignore_errors=True)
                if not os.path.lexists(self._folder(step)):
                    (self.directory / SAVING).unlink(missing_ok=True)
            whole = max(self._known_whole_steps(), default=None)
            kept = "" if whole is None else f" The one of step {whole} is as it was."
            raise CheckpointError(
                f"no checkpoint of step {step}: {error}.{kept}"
            ) from error

    def _add_error(self, step: int, top1_error: float | None) -> None:
        """Adds the error of an evaluation that came after the step was saved."""
        if _finite(top1_error) is None:
            return
        if jax.process_index() == 0:
            manifest = _read_manifest(self._folder(step))
            if manifest["top1_error"] is None:
                files, saved_as = manifest["files"], manifest["step"]
                _write_manifest(self._folder(step), files, top1_error, saved_as)
        _wait_for_all(f"error {step}")

    def _remove_old_steps(self) -> None:
        """Deletes all but the newest `keep` whole steps and the best one."""
        old = []
        if jax.process_index() == 0:
            kept = self._known_whole_steps()[-self._keep :]
            best = self._best(self._known_whole_steps())
            # Broken steps go too, but not those ahead of the newest whole one: the
            # run will pass them again, and until then they may be looked into.
            old = [
                step
                for step in self.all_steps()
                if step not in kept
                and step != best
                and step < kept[-1]
                and self._is_ours(step)
            ]
        with contextlib.ExitStack() as alone:
            if old:
                try:
                    readers = self.directory / READERS
                    alone.enter_context(locks.held(readers, wait=False))
                except locks.HeldError:
                    old = []  # somebody reads: they go after the next save
            if self._agreed(lambda: len(old)):
                self._remove(old)

    def _remove(self, steps: Sequence[int]) -> None:
        """Process 0 deletes the folders of `steps`; the others wait for it."""
        if jax.process_index() == 0:
            for step in steps:
                _remove_folder(self._folder(step))
                self._problems.pop(step, None)
        _wait_for_all("removed")
        self._manager.reload()  # Orbax keeps a list of what it has saved

    def _make_way(self, step: int) -> None:
        """Removes a spoilt step that training has passed again.

        What may be anything, a file or a link too, is put aside, and so is another
        step's checkpoint, which may be whole.
        """
        if self._agreed(lambda: self._is_ours(step)):
            self._remove([step])
            return
        if jax.process_index() == 0:
            aside = free_name(self.directory / f"aside_{step}")
            os.rename(self._folder(step), aside)
            logging.warning(
                "%s is no checkpoint of step %d, or has lost its %s: put aside as %s.",
                *(self._folder(step), step, MANIFEST, aside),
            )
        self._problems.pop(step, None)
        _wait_for_all("put aside")
        self._manager.reload()

    def _is_ours(self, step: int) -> bool:
        """Whether a step's folder can be nothing but its checkpoint, whole or not."""
        folder = self._folder(step)
        if not (folder / MANIFEST).is_file() or not _is_of_orbax(folder):
            return False
        try:
            return _is_named_rightly(folder, _read_manifest(folder))
        except (ValueError, OSError):
            return True  # spoilt

    def _unfinished_step(self) -> int:
        """The step that a kill left unfinished; -1: there is none."""
        found = (s for s in self.all_steps() if _is_unfinished(self._folder(s)))
        return next(found, -1)

    def _agreed(self, number: Callable[[], int]) -> int:
        """What process 0 finds; a whole number of int32, or a bool as one."""
        if jax.process_count() == 1:
            return number()
        own = number() if jax.process_index() == 0 else 0
        return int(multihost_utils.broadcast_one_to_all(np.int32(own)))

    def _is_whole(self, step: int) -> bool:
        return step in self.all_steps() and not self._known_problem(step)

    # What is there.

    def all_steps(self) -> list[int]:
        """Every step that has a folder, whole or not, in increasing order."""
        return _list_steps(self.directory)

    def latest_whole_step(self) -> int | None:
        """The newest step whose files all match its manifest; None if there is none.

        Checks the sums, newest step first, and warns about each step passed over.
        """
        step = self._agreed(self._latest_whole_step)
        return None if step < 0 else step

    def _latest_whole_step(self) -> int:
        for step in reversed(self.all_steps()):
            problem = self._check(step)
            if not problem:
                return step
            logging.warning("Checkpoint of step %d passed over: %s.", step, problem)
        return -1

    def best_step(self) -> int | None:
        """The whole step with the lowest top-1 error; the newer one on a tie.

        None when no whole step has an error.
        """
        step = self._agreed(lambda: self._best(self._known_whole_steps()))
        return None if step < 0 else step

    def find(self, which: int | str) -> int | None:
        """A step's number; "latest", or "best": without evaluations the latest too.

        None when there is no whole step.
        """
        if isinstance(which, int):
            return which
        step = self.best_step() if which == "best" else None
        return self.latest_whole_step() if step is None else step

    def is_best(self, error: float) -> bool:
        """Whether no whole step has as low a top-1 error."""

        def better() -> bool:
            best = self._best(self._known_whole_steps())
            known = None if best < 0 else self.top1_error(best)
            return known is None or error < known

        return bool(self._agreed(better))

    def top1_error(self, step: int) -> float | None:
        """The error in [0, 1] that `step` was saved with, None if there was none."""
        return self._checked_manifest(step)["top1_error"]

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata that `step` was saved with.

        Raises:
          CheckpointError: if there is no such step or it is not whole.
        """
        self._checked_manifest(step)
        return self._read_metadata(step)

    def _read_metadata(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        with self._readable(step):
            return self._manager.restore(step, args=args)["metadata"]

    # Restoring.

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest whole step, or `step`, into the given shardings.

        Args:
          abstract_state: the state's pytree with a `jax.ShapeDtypeStruct` at every
            leaf (or an array), each with a `sharding`; the devices need not be those
            the state was saved from.
          step: restore this one instead; it must be whole.

        Returns:
          (state, metadata), or None when the directory holds no checkpoint at all
          (`has_checkpoint`).

        Raises:
          CheckpointError: if there are checkpoints but none is whole, if `step` is
            missing or not whole, or if the checkpoint holds another network.
        """
        if step is None and not self._agreed(lambda: has_checkpoint(self.directory)):
            self.latest_whole_step()  # names those that were only begun
            return None
        step = self._choose(step)
        _require_shardings(abstract_state)
        self._require_same_leaves(step, abstract_state, self._saved_tree(step))
        state = self._restore_arrays(step, abstract_state, partial=False)
        return state, self._read_metadata(step)

    def restore_params(
        self,
        *,
        step: int | None = None,
        abstract: Mapping[str, Any] | None = None,
        device: Any = None,
        parts: Sequence[str] = ("params", "batch_stats"),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores only the named parts of a state: no optimiser state is allocated.

        Args:
          step: which step; the newest whole one by default. `best_step()` is another.
          abstract: what is expected, {"params": tree of `jax.ShapeDtypeStruct` with
            shardings, ...}; without it the shapes are the saved ones, on one device.
          device: the `jax.Device` for the arrays when there is no `abstract`; the first
            local one by default.
          parts: fields of the state; one that is empty, or absent, is left out.

        Returns:
          (variables, metadata); variables is what `model.apply` takes, nested dicts.

        Raises:
          CheckpointError: as `restore`, and when there is no checkpoint at all.
        """
        step = self._choose(step)
        saved = self._saved_tree(step)
        if abstract is None:
            wanted = {part: saved[part] for part in parts if saved.get(part)}
            target = _on_one_device(wanted, device)
        else:
            target = {part: tree for part, tree in abstract.items() if tree}
            _require_shardings(target)
            saved_parts = {part: saved[part] for part in target if saved.get(part)}
            self._require_same_leaves(step, target, saved_parts)
        if not target:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} holds none of "
                f"{tuple(parts)}; it holds {tuple(saved)}."
            )
        arrays = self._restore_arrays(step, target, partial=True)
        return arrays, self._read_metadata(step)

    def _choose(self, step: int | None) -> int:
        """The step to restore, whole; raises `CheckpointError` when there is none."""
        errors = []

        def choice() -> int:
            try:
                return self._choose_here(step)
            except CheckpointError as error:
                errors.append(error)
                return -1

        chosen = self._agreed(choice)
        if errors:
            raise errors[0]
        if chosen < 0:
            raise CheckpointError(
                f"there is nothing to restore in {self.directory}; process 0 says why."
            )
        return chosen

    def _choose_here(self, step: int | None) -> int:
        if step is not None:
            self._checked_manifest(step, again=True)
            return step
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(f"there is no checkpoint in {self.directory}.")
        whole = self._latest_whole_step()
        if whole < 0:
            reasons = "; ".join(f"step {s}: {self._problems[s]}" for s in steps)
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} is whole ({reasons}). "
                "Restore the folder from a copy, move away what is not this run's, or use "
                "a new workdir to start again."
            )
        return whole

    def _saved_tree(self, step: int) -> dict[str, Any]:
        """Shapes and dtypes in the checkpoint, as nested dicts and lists."""
        with self._readable(step):
            # Orbax answers without reading any array.
            return self._manager.item_metadata(step)["state"].tree

    def _restore_arrays(self, step: int, target: Any, *, partial: bool) -> Any:
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=partial,
            )
        )
        with self._readable(step):
            return self._manager.restore(step, args=args)["state"]

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Within, what Orbax and TensorStore do not read is a `CheckpointError`.

        Every file is as its manifest says, so the manifest was made for it: by another
        version of Orbax, or by hand. Their own errors are many.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError:  # such as a device that is too small
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} matches its sums, but "
                f"cannot be read: {first[:500].rstrip('.')}. Was it written by another "
                f"version (here orbax-checkpoint {ocp.__version__}), or changed by hand?"
            ) from error

    def _require_same_leaves(self, step: int, wanted: Any, saved: Any) -> None:
        difference = _first_difference(_leaves(wanted), _leaves(saved))
        if difference:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} holds another "
                f"network: {difference}. Use the model.* and optim.* settings it was "
                "saved with (its metadata holds the config), or a new workdir."
            )

    # Whole or not.

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _check(self, step: int) -> str:
        """Reads every file of a step; what is wrong with it, "" if nothing is."""
        self._problems[step] = _problem(self._folder(step))
        return self._problems[step]

    def _known_problem(self, step: int) -> str:
        return self._problems[step] if step in self._problems else self._check(step)

    def _known_whole_steps(self) -> list[int]:
        return [step for step in self.all_steps() if not self._known_problem(step)]

    def _checked_manifest(self, step: int, *, again: bool = False) -> dict[str, Any]:
        if step not in self.all_steps():
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.directory}; there "
                f"are {self.all_steps()}."
            )
        problem = self._check(step) if again else self._known_problem(step)
        if problem:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} is not whole: "
                f"{problem}."
            )
        return _read_manifest(self._folder(step))

    def _best(self, steps: Sequence[int]) -> int:
        """The one with the lowest error; -1 if none of them has an error."""
        errors = {s: _read_manifest(self._folder(s))["top1_error"] for s in steps}
        rated = [(error, -s) for s, error in errors.items() if error is not None]
        return -min(rated)[1] if rated else -1


# The manifest.


def _sums(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file under `folder`, the manifest left out.

    Each file is also flushed to the disk, so that a manifest that survives a power
    cut stands for arrays that did.
    """
    sums = {}
    for name in _file_names(folder):
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            sums[name] = {"size": file.tell(), "sha256": digest}
    return sums


def _problem(folder: pathlib.Path) -> str:
    """What keeps the step in `folder` from being whole, in words; "" if nothing does."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        why = "it was lost, or this is no checkpoint"
        if _is_unfinished(folder):
            why = "its run is saving it, or was stopped while it did"
        return f"{MANIFEST} is missing ({why})"
    except (ValueError, OSError) as error:
        return f"{MANIFEST} cannot be used ({error})"
    if not _is_named_rightly(folder, manifest):
        of = f"the checkpoint of step {manifest['step']}"
        return f"it is {of}, whose name it should have"
    files = manifest["files"]
    for name in sorted(files):
        problem = _file_problem(folder, name, files[name])
        if problem:
            return problem
    # A file that was not there when the sums were taken was not written by the save.
    extra = set(_file_names(folder)) - set(files)
    return f"{min(extra)} is not in {MANIFEST}" if extra else ""


def _is_named_rightly(folder: pathlib.Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a folder has the name of the step in it, as far as its manifest says."""
    return manifest["step"] is None or str(manifest["step"]) == folder.name


def _is_unfinished(folder: pathlib.Path) -> bool:
    """Whether a step is being saved, or was when its run was killed."""
    is_named = _is_in_saving(folder) and _is_of_orbax(folder)
    return is_named and not os.path.lexists(folder / MANIFEST)


def _is_in_saving(folder: pathlib.Path) -> bool:
    try:
        return (folder.parent / SAVING).read_text().strip() == folder.name
    except OSError:
        return False


def _is_of_orbax(folder: pathlib.Path) -> bool:
    return not folder.is_symlink() and (folder / _ORBAX_FILE).is_file()


def _write_saving(directory: pathlib.Path, step: int) -> None:
    """Says that a step is being saved, before there is anything of it."""
    with replacing(directory / SAVING) as file:
        file.write(f"{step}\n".encode())
    _sync_folder(directory)


def _clear_after_a_kill(directory: pathlib.Path) -> None:
    """Deletes what can be nothing but the rest of a save or of a removal."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        is_rest = _UNFINISHED_NAME.fullmatch(path.name) and path.is_dir()
        if is_rest and not path.is_symlink():
            shutil.rmtree(path)
    for folder in (directory / str(step) for step in _list_steps(directory)):
        if _is_in_saving(folder) and os.path.lexists(folder / MANIFEST):
            (directory / SAVING).unlink()


def _remove_folder(folder: pathlib.Path) -> None:
    """Deletes the folder of a step; a kill leaves all of it, or no step at all."""
    rest = free_name(folder.with_name(folder.name + _ORBAX_UNFINISHED))
    os.rename(folder, rest)
    _sync_folder(folder.parent)
    shutil.rmtree(rest)


def _file_problem(folder: pathlib.Path, name: str, expected: Mapping[str, Any]) -> str:
    """What keeps a file from being the one of the manifest, in words."""
    try:
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} does not match its SHA-256 sum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return ""


def _write_manifest(
    folder: pathlib.Path,
    files: Mapping[str, Any],
    top1_error: float | None,
    step: int | None,
) -> None:
    body = {"files": files, "format": _FORMAT, "top1_error": _finite(top1_error)}
    if step is not None:  # it is where an error is added to an old manifest
        body["step"] = step
    # Not by `replacing`: under another name, what a kill leaves of it in a whole step
    # would be a file too many.
    temporary = folder / _TEMPORARY
    with open(temporary, "wb") as file:
        file.write(_manifest_text(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    _sync_folder(folder)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest as a dict; ValueError when it is not byte for byte as written."""
    text = (folder / MANIFEST).read_bytes()
    body = json.loads(text)
    if not isinstance(body, dict) or _manifest_text(body) != text:
        raise ValueError("it does not match its own SHA-256 sum")
    if body["format"] != _FORMAT:
        raise ValueError(f"format {body['format']}, this version reads {_FORMAT}")
    return {"step": None} | body  # a manifest of an older version has no step


def _manifest_text(body: Mapping[str, Any]) -> bytes:
    """The file's bytes; the sum of all other entries stands in the manifest itself."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1, sort_keys=True).encode()


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_names(folder: pathlib.Path) -> list[str]:
    """Names relative to `folder` of all files below it, but the manifest's own."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name not in (MANIFEST, _TEMPORARY))


# Trees.


def _leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf. Orbax stores named tuples and dataclasses as dicts and tuples as
    lists; the paths are spelt alike for both."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def _first_difference(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The first leaf that differs, with both shapes, in words; "" if none does."""

    def words(leaf: Any) -> str:
        return f"{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}"

    for path, leaf in wanted.items():
        if path not in saved:
            return f"{path} is {words(leaf)} here and missing in the checkpoint"
        if words(leaf) != words(saved[path]):
            return f"{path} is {words(leaf)} here and {words(saved[path])} there"
    for path, leaf in saved.items():
        if path not in wanted:
            return f"{path} is {words(leaf)} in the checkpoint and missing here"
    return ""


def _on_one_device(tree: Any, device: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of what is saved, on one device."""
    sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def _require_shardings(tree: Any) -> None:
    # Without one, Orbax would use the devices of the saving run, which may not exist.
    for path, leaf in _leaves(tree).items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(
                f"{path} has no sharding; give a jax.ShapeDtypeStruct(shape, dtype, "
                "sharding=...) for every leaf of the state to restore."
            )


# Small things.


def _handlers() -> Any:
    """Named in advance, so that a step can be described before it is restored."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays, values = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    registry.add("state", ocp.args.PyTreeSave, arrays)
    registry.add("state", ocp.args.PyTreeRestore, arrays)
    registry.add("metadata", ocp.args.JsonSave, values)
    registry.add("metadata", ocp.args.JsonRestore, values)
    return registry


def _absolute(directory: str | os.PathLike[str]) -> pathlib.Path:
    text = os.fspath(directory)
    if "://" in text:
        raise CheckpointError(
            f"{text}: checkpoints need a local or mounted folder, because the manifest "
            "relies on an atomic rename."
        )
    return pathlib.Path(os.path.abspath(os.path.expanduser(text)))


def _list_steps(directory: pathlib.Path) -> list[int]:
    # Orbax writes into a folder with a longer name and renames it: a bare number is a
    # step that Orbax has committed.
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if _STEP_NAME.fullmatch(name))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _json_values(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint metadata must be plain JSON: {error}") from error


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"alexnet_jax checkpoint: {name}")


def _worth_showing(record: python_logging.LogRecord) -> bool:
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return record.levelno >= python_logging.WARNING or not of_orbax


def _quiet_orbax() -> None:
    """Drops Orbax's INFO lines, some forty a save; its warnings are kept."""
    # The same function each time: Python adds one filter once.
    python_logging.getLogger("absl").addFilter(_worth_showing)
