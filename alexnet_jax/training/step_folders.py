"""Step folders of a run: checksums, one rename, the best error, deletion. No JAX.

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
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from alexnet_jax.system.files import HeldError, atomic_write, exclusive_lock

STATE, METADATA, MANIFEST = "state", "metadata.json", "manifest.json"
OLD_METADATA = "metadata/metadata"  # in steps of earlier versions
READERS = ".readers"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says what to do."""


class StepFolders:
    """The steps in a folder of checkpoints. Methods return -1 for "no step"."""

    def __init__(self, directory: Path):
        self.directory = directory
        # Difference from the manifest by step, "" for a whole one. A step of AlexNet
        # has 0.5 GB, so each is read once.
        self._problems: dict[int, str] = {}

    def folder(self, step: int) -> Path:
        """Return the folder of a complete step."""
        return self.directory / str(step)

    def temporary(self, step: int) -> Path:
        """Return the folder of a step that is being written or deleted."""
        return self.directory / f"{step}.tmp"

    def steps(self) -> list[int]:
        """Return every step, damaged or not, in increasing order."""
        names = [path.name for path in self.directory.glob("*") if path.is_dir()]
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    # Checksums.

    def problem(self, step: int) -> str:
        """Return how a step differs from its manifest, "" if it does not; warn once."""
        if step not in self._problems:
            self._problems[step] = difference(self.folder(step))
            if self._problems[step]:
                logging.warning("Checkpoint of step %d skipped: %s.", step, self._problems[step])
        return self._problems[step]

    def first_whole(self, steps: Iterable[int]) -> int:
        """Return the first step that matches its manifest."""
        return next((step for step in steps if not self.problem(step)), -1)

    def require_whole(self, step: int | None) -> int:
        """Return `step`, or the newest whole one if it is None; -1 if there is none.

        Raises:
          CheckpointError: if `step` is missing or damaged, or all steps are damaged.
        """
        candidates = self.steps()[::-1] if step is None else [step]
        chosen = self.first_whole(candidates)
        if candidates and chosen < 0:
            problems = "; ".join(f"step {s}: {self.problem(s)}" for s in candidates)
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be used ({problems}; there "
                f"are steps {self.steps()}). Restore the folder from a copy, name "
                "another step, or start again in a new workdir."
            )
        return chosen

    # Metadata and errors.

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the metadata of a step."""
        path = self.folder(step) / METADATA
        if not path.exists():
            path = self.folder(step) / OLD_METADATA
        return json.loads(path.read_text())

    def errors(self) -> dict[int, float | None]:
        """Return the top-1 error of each step not known to be damaged, in order.

        Only manifests are read.
        """
        errors = {}
        for step in self.steps():
            try:
                errors[step] = read_manifest(self.folder(step))["top1_error"]
            except (OSError, ValueError):
                self.problem(step)  # warns
        return {s: error for s, error in errors.items() if not self._problems.get(s)}

    def best(self) -> int:
        """Return the whole step with the lowest top-1 error, the newer one on a tie."""
        errors = {s: error for s, error in self.errors().items() if error is not None}
        return self.first_whole(sorted(errors, key=lambda step: (errors[step], -step)))

    def find(self, which: str) -> int:
        """Return the "latest" whole step, or the "best"; the latest without errors."""
        best = self.best() if which == "best" else -1
        return self.first_whole(self.steps()[::-1]) if best < 0 else best

    def is_best(self, error: float) -> bool:
        """Return whether no whole step has as low a top-1 error."""
        lowest = self.errors().get(self.best())
        return lowest is None or error < lowest

    # Changes.

    def make_way(self, step: int) -> bool:
        """Return False if a step is there and whole; else delete what is there."""
        if step in self.steps() and not self.problem(step):
            return False
        self.delete(step)
        return True

    def complete(self, step: int, metadata: str, top1_error: float | None) -> None:
        """Add metadata and manifest to the arrays in `temporary`, sync and rename."""
        temporary = self.temporary(step)
        (temporary / METADATA).write_text(metadata)
        body = {"files": checksums(temporary), "top1_error": top1_error}
        (temporary / MANIFEST).write_bytes(manifest_text(body))
        for path in (temporary, *temporary.rglob("*")):
            _sync(path)
        os.rename(temporary, self.folder(step))
        _sync(self.directory)
        self._problems[step] = ""

    def add_error(self, step: int, top1_error: float | None) -> None:
        """Add the error of an evaluation that came after the step was saved."""
        body = read_manifest(self.folder(step))
        if body["top1_error"] is None:
            body["top1_error"] = top1_error
            with atomic_write(self.folder(step) / MANIFEST) as file:
                file.write(manifest_text(body))

    def delete(self, step: int) -> None:
        """Delete a step and its leftover, if they exist."""
        folder, temporary = self.folder(step), self.temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            os.rename(folder, temporary)
            _sync(self.directory)
            shutil.rmtree(temporary)
        self._problems.pop(step, None)

    def delete_old(self, keep: int) -> None:
        """Delete all but the newest `keep` steps and the best one, if nobody reads."""
        steps = list(self.errors())
        kept = {*steps[-keep:], self.best()}
        if old := [step for step in steps if step not in kept]:
            with (
                contextlib.suppress(HeldError),  # deleted after a later save
                exclusive_lock(self.directory / READERS, wait=False),
            ):
                for step in old:
                    self.delete(step)

    def delete_leftovers(self) -> None:
        """Delete steps whose writing or deletion was interrupted."""
        for path in self.directory.glob("*.tmp"):
            if path.stem.isdecimal():
                shutil.rmtree(path)


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
        found = checksums(folder)
    except (OSError, ValueError) as error:
        return str(error)
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
