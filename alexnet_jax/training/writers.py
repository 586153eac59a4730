"""Write the numbers of a run to metrics.jsonl, TensorBoard and the console.

Names of the scalars: `train/loss`, `train/top1_error`, `lr`, `images_per_sec`,
`data_wait_frac`; `eval/loss`, `eval/top1_error`, `eval/top5_error`, `eval/count`; with
several views `eval/views_...` for their mean; in summaries `grad_norm/<layer>` and
`dead_relu/<layer>` (see `steps`). Errors and fractions are in [0, 1]. `eta_seconds` is
shown on the console only.
"""

import contextlib
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alexnet_jax.system.cli import free_name, progress_bar
from alexnet_jax.system.files import atomic_write, explain_full_disk

METRICS_FILE = "metrics.jsonl"
# Longest time that an event waits in memory: each flush waits for the disk.
FLUSH_SECONDS = 10.0


class MultiWriter(contextlib.ExitStack):
    """Write each record of a run to metrics.jsonl, TensorBoard and the console.

    A terminal also has a progress bar, below the lines.

    Args:
      workdir: folder for the files, created if missing.
      total_steps: the last step of the run, for the console.
      steps_per_epoch: each record names its epoch.
      resume_step: the step that the run resumes from; later records are dropped. None
        for a new run.
      enabled: False on every process but the first: nothing is created or written.
      show_top5: show top-5 errors on the console; the files always hold them.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        steps_per_epoch: float,
        resume_step: int | None = None,
        enabled: bool = True,
        show_top5: bool = True,
    ):
        super().__init__()
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._enabled, self._show_top5 = enabled, show_top5
        if enabled:
            workdir.mkdir(parents=True, exist_ok=True)
            self._jsonl = JsonlWriter(workdir / METRICS_FILE, resume_step)
            self._bar = tqdm(disable=True)
            if sys.stdout.isatty():
                self._bar = progress_bar(
                    sys.stdout, total=total_steps, initial=resume_step or 0, unit="step"
                )
            self.callback(self._bar.close)
            self._events = TensorBoardWriter(workdir, resume_step)
            self.callback(self._events.close)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write one record: scalars (numbers or 0-d arrays) after `step` steps.

        Raises:
          FullDiskError: (an OSError) if the disk has no room for it.
        """
        if self._enabled:
            # Converted once: each conversion of a device array waits for the device.
            numbers = {name: np.asarray(x).item() for name, x in scalars.items()}
            stored = {k: v for k, v in numbers.items() if k != "eta_seconds"}
            epoch = step / self._steps_per_epoch
            if self._jsonl.write(step, epoch, stored):
                self._events.write(step, epoch, stored)
                start = f"step {step:{len(str(self._total))}d}/{self._total}  epoch {epoch:.2f}"
                self.text(f"{start}  {in_words(numbers, show_top5=self._show_top5)}")

    def progress(self, step: int) -> None:
        """Move the progress bar to `step`; cheap."""
        if self._enabled:
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)

    def text(self, line: str) -> None:
        """Print a line; a run goes on if nobody can read its output."""
        if self._enabled:
            with contextlib.suppress(OSError):
                self._bar.write(line, file=sys.stdout)  # above the bar
                sys.stdout.flush()


class JsonlWriter:
    """Append one JSON object per line: {"step": 200, "epoch": 1.5, "train/loss": 2.1}.

    JSON has no NaN or infinity: they become null, which `read_metrics` turns into NaN.
    A killed process loses no line that `write` has returned from.

    A resumed run takes the steps after `resume_step` again. So their records are
    dropped, and so is a torn line; a record of `resume_step` is not repeated. A new run
    (`resume_step` None) renames an earlier file to `.old`, or to `.old_2` if that
    exists.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self._path = path
        # Names in the records of resume_step that the file holds.
        self._resume_step, self._written = resume_step, set()
        path.touch()
        if resume_step is not None:
            lines = path.read_text().splitlines()
            with atomic_write(path) as file:
                for line in lines:
                    record = parse_record(line)
                    if record and record["step"] <= resume_step:
                        file.write(f"{line}\n".encode())
                        if record["step"] == resume_step:
                            self._written.add(frozenset(record))
        elif path.stat().st_size:
            path.rename(free_name(path.with_name(path.name + ".old")))
            path.touch()

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> bool:
        """Append one line; return False if the file holds this record already."""
        record = {"step": step, "epoch": epoch, **scalars}
        if step == self._resume_step and frozenset(record) in self._written:
            return False
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        # Opened for each line: no record waits in a buffer when the run is killed.
        with explain_full_disk(self._path.parent), self._path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        return True


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, in order; null comes back as NaN.

    A last line that is torn by a kill, or is being written now, is left out.

    Raises:
      ValueError: if a line before the last is not a record.
    """
    lines = Path(path).read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            records.append({k: math.nan if v is None else v for k, v in record.items()})
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not a record: {line!r}. Delete this line.")
    return records


def parse_record(line: str) -> dict[str, Any] | None:
    """Return a record, or None for a line that was torn by a kill."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class TensorBoardWriter:
    """Write scalars as TensorBoard event files, without TensorFlow.

    tensorboardX's own writer is a thread that dies of a full disk and blocks the next
    record for ever; so only its file format is used.
    """

    def __init__(self, directory: Path, resume_step: int | None = None):
        # Imported here: `read_metrics` does not need it. torch, which tensorboardX would
        # import if it is installed, is hidden: it takes seconds and is not needed.
        modules: dict[str, Any] = sys.modules
        torch = modules.setdefault("torch", None)
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
        finally:
            if torch is None:
                del modules["torch"]

        self._directory = directory
        self._event: Any = getattr(event_pb2, "Event")  # noqa: B009  (made at import)
        # The file name has the time in seconds, which two quick starts may share.
        suffix = f".{os.getpid()}.{resume_step or 0}"
        self._file = EventsWriter(str(directory / "events"), suffix)
        self._flushed_at = -math.inf
        if resume_step is not None:
            # TensorBoard drops the events from the step of a START on.
            self._add(step=resume_step + 1, session_log={"status": "START"})

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> None:
        """Write each scalar and the epoch."""
        values = {"epoch": epoch, **scalars}
        summary = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._add(step=step, summary={"value": summary})

    def close(self) -> None:
        """Flush and close the event file."""
        with explain_full_disk(self._directory):
            self._file.close()

    def _add(self, **fields: Any) -> None:
        with explain_full_disk(self._directory):
            self._file.write_event(self._event(wall_time=time.time(), **fields))
            if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
                self._file.flush()
                self._flushed_at = time.monotonic()


# Format of a scalar on the console. The key is the last part of the scalar's name, or the
# first if the last is the name of a layer.
_FORMS = {
    "loss": "loss {value:.4f}",
    "top1_error": "top-1 error {value:.2%}",
    "top5_error": "top-5 error {value:.2%}",
    "views_loss": "several views: loss {value:.4f}",
    "views_top1_error": "top-1 error {value:.2%}",
    "views_top5_error": "top-5 error {value:.2%}",
    "count": "on {value:.0f} images",
    "lr": "lr {value:.4g}",
    "images_per_sec": "{value:.1f} images/s",
    "data_wait_frac": "waiting for data {value:.0%}",
    "eta_seconds": "left {value}",
    "grad_norm": "{name} {value:.1e}",
    "dead_relu": "{name} {value:.0%}",
}


def in_words(scalars: Mapping[str, Any], *, show_top5: bool = True) -> str:
    """Return a record as a line for people, for example (one line):

    train: loss 3.2144  top-1 error 71.25%  lr 0.01  1523.4 images/s
    waiting for data 3%  left 1:02:33
    """
    parts, previous = [], ""
    for name, value in scalars.items():
        group, _, short = name.rpartition("/")
        if short.endswith("top5_error") and not show_top5:
            continue
        form = _FORMS.get(group) or _FORMS.get(short) or "{name} {value:.4g}"
        if short == "eta_seconds":
            value = datetime.timedelta(seconds=round(value))
        # The group is printed once, before the first number of that kind.
        start = f"{group.replace('_', ' ')}: " if group not in ("", previous) else ""
        parts.append(start + form.format(name=short, value=value))
        previous = group or previous
    return "  ".join(parts)
