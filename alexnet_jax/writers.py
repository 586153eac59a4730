"""Where the numbers of a run go: a JSON-lines file, TensorBoard and the console.

Process 0 writes; on the others `make_writers(..., enabled=False)` gives the same
interface and does nothing, so that the training loop has no special case.

Names of the scalars: `train/loss`, `train/top1_error`, `lr`, `images_per_sec`,
`data_wait_frac`; `eval/loss`, `eval/top1_error`, `eval/top5_error`, `eval/count`,
and at the end of a run with several views `eval/views_...` of their average.
In summaries, `grad_norm/<layer>` and `dead_relu/<layer>` (see `steps`).
Errors and fractions are in [0, 1]. `eta_seconds` is shown on the console and stored
nowhere.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, Self, TextIO

import numpy as np

from alexnet_jax.data.files import replacing, telling_of_a_full_disk
from alexnet_jax.data.paths import free_name

METRICS_FILE = "metrics.jsonl"
# How long an event may wait in memory; each flush waits for the disk.
FLUSH_SECONDS = 10.0
_ONLY_ON_CONSOLE = frozenset({"eta_seconds"})


class Writer(Protocol):
    """What every writer does."""

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> None:
        """One record: the scalars (numbers or 0-d arrays) after `step` steps.

        Raises:
          FullDiskError: (an OSError) there is no room for it.
        """

    def progress(self, step: int) -> None:
        """`step` steps are done. Called often, so it must cost nothing."""

    def text(self, line: str) -> None:
        """A line for the reader at the console."""

    def close(self) -> None:
        """Writes what is buffered and frees the files."""


def make_writers(
    workdir: str | os.PathLike[str],
    *,
    total_steps: int,
    resume_step: int | None = None,
    enabled: bool = True,
    show_top5: bool = True,
) -> "MultiWriter":
    """The three writers of a run in `workdir`, which is created if need be.

    Args:
      total_steps: where the run ends, for the console.
      resume_step: the step the run goes on from; records beyond it are dropped. None
        for a new run.
      enabled: False on every process but the first: nothing is created or written.
      show_top5: whether the console shows top-5 errors; they are stored in any case.
    """
    if not enabled:
        return MultiWriter([])
    os.makedirs(workdir, exist_ok=True)
    path = pathlib.Path(workdir) / METRICS_FILE
    return MultiWriter(
        [
            JsonlWriter(path, resume_step),
            TensorBoardWriter(workdir, resume_step),
            ConsoleWriter(
                total_steps, start_step=resume_step or 0, show_top5=show_top5
            ),
        ]
    )


class MultiWriter:
    """Passes each call on to several writers, in order; also a context manager."""

    def __init__(self, writers: Iterable[Writer]):
        self._writers = list(writers)

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> None:
        """Writes one record everywhere."""
        # Converted once: each conversion of a device array waits for the device.
        numbers = {name: _number(value) for name, value in scalars.items()}
        for writer in self._writers:
            writer.write(step, epoch, numbers)

    def progress(self, step: int) -> None:
        """Moves the progress bar, where there is one."""
        for writer in self._writers:
            writer.progress(step)

    def text(self, line: str) -> None:
        """Shows a line on the console without tearing the bar."""
        for writer in self._writers:
            writer.text(line)

    def close(self) -> None:
        """Closes every writer, also when closing one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class JsonlWriter:
    """One JSON object a line: {"step": 200, "epoch": 1.5, "train/loss": 2.1, ...}.

    NaN and infinities become null, the only spelling that every JSON parser reads;
    `read_metrics` turns null into NaN. Each line is on its way to the disk when `write` returns.

    On resume, records beyond `resume_step` (of steps that the killed run took after
    its last checkpoint and that will be taken again) and a last line torn by the kill
    are dropped. A summary or evaluation of `resume_step` itself that is there already is
    not written again. A new run (`resume_step` None) puts an earlier file aside as `.old`,
    or as `.old_2` if there is one already.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
        self._path = pathlib.Path(path)
        self._resume_step = resume_step
        self._written: set[frozenset[str]] = set()  # names in records of that step
        if resume_step is not None and self._path.exists():
            self._drop_after(resume_step)
        elif self._path.exists() and self._path.stat().st_size:
            name = self._path.name + ".old"
            os.rename(self._path, free_name(self._path.with_name(name)))
        self._path.touch()

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> None:
        """Appends one line; `eta_seconds` is left out."""
        record = {"step": int(step), "epoch": _number(epoch)}
        record |= {
            name: _number(value)
            for name, value in scalars.items()
            if name not in _ONLY_ON_CONSOLE
        }
        if step == self._resume_step and frozenset(record) in self._written:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        # Opened for each line: no record waits in a buffer when the run is killed.
        line = json.dumps(finite, allow_nan=False) + "\n"
        with (
            telling_of_a_full_disk(self._path.parent),
            open(self._path, "a", encoding="utf-8", newline="\n") as file,
        ):
            file.write(line)

    def progress(self, step: int) -> None:
        """Nothing: progress is not stored."""

    def text(self, line: str) -> None:
        """Nothing: lines are not stored."""

    def close(self) -> None:
        """Nothing: the file is closed after each line."""

    def _drop_after(self, resume_step: int) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines()
        records = [(line, parse_record(line)) for line in lines]
        kept = [line for line, r in records if r and r["step"] <= resume_step]
        self._written = {
            frozenset(r) for _, r in records if r and r["step"] == resume_step
        }
        with replacing(self._path) as file:  # never half a file
            file.writelines(f"{line}\n".encode() for line in kept)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; null comes back as NaN.

    A last line torn by a kill, or being written at this moment, is left out.

    Raises:
      ValueError: for a line before the last that is not a record.
    """
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            records.append({k: math.nan if v is None else v for k, v in record.items()})
        elif number < len(lines):
            raise ValueError(f"{path}, line {number} is not a record: {line!r}")
    return records


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """As if that package were not installed, unless it was imported before."""
    modules: dict[str, Any] = sys.modules
    hide = name not in modules
    if hide:
        modules[name] = None
    try:
        yield
    finally:
        if hide:
            del modules[name]


class TensorBoardWriter:
    """Scalars as TensorBoard event files, by tensorboardX (no TensorFlow).

    On resume TensorBoard is told to forget what it read beyond `resume_step`. The file
    is written here and not in tensorboardX's thread, which dies of a full disk, and
    then whoever gives it a record waits forever.
    """

    def __init__(
        self, directory: str | os.PathLike[str], resume_step: int | None = None
    ):
        # Here, not above: reading metrics must not need tensorboardX.
        # It imports torch where there is one, which takes a second, for tensors that
        # it is not given here.
        with _hidden("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2

        self._directory = pathlib.Path(directory)
        self._events: Any = event_pb2  # whose classes are made at run time
        os.makedirs(directory, exist_ok=True)
        # The file's name has the time in seconds: two quick starts would share it.
        suffix = f".{os.getpid()}.{resume_step or 0}"
        self._file = EventsWriter(os.path.join(directory, "events"), suffix)
        self._flushed_at = -math.inf
        if resume_step is not None:
            # TensorBoard drops the events at the step of a start and after it.
            self._add(step=resume_step + 1, session_log={"status": "START"})

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> None:
        """Writes each scalar and the epoch; `eta_seconds` is left out."""
        values = [
            {"tag": name, "simple_value": float(value)}
            for name, value in {"epoch": epoch, **scalars}.items()
            if name not in _ONLY_ON_CONSOLE
        ]
        self._add(step=int(step), summary={"value": values})

    def progress(self, step: int) -> None:
        """Nothing."""

    def text(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Flushes and closes the event file."""
        with telling_of_a_full_disk(self._directory):
            self._file.close()

    def _add(self, **fields: Any) -> None:
        with telling_of_a_full_disk(self._directory):
            self._file.write_event(self._events.Event(wall_time=time.time(), **fields))
            if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
                self._file.flush()
                self._flushed_at = time.monotonic()


def progress_bar(stream: TextIO, **options: Any) -> Any:
    """A tqdm bar on a terminal, gone when it is closed; `options` are tqdm's."""
    from tqdm import tqdm

    # Some terminals (containers, recorders) say they have 0 columns and rows, and tqdm
    # would then draw nothing.
    has_width = os.get_terminal_size(stream.fileno()).columns > 0
    width: dict[str, Any] = (
        {"dynamic_ncols": True} if has_width else {"ncols": 80, "nrows": 24}
    )
    return tqdm(file=stream, leave=False, **width, **options)


def show_every_name() -> None:
    """Names of files that are no text are printed with \\x.., instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def progress(
    what: str, total: int | None, unit: str, *, every_seconds: float = 60.0
) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal; in a log file a line a minute."""
    if sys.stderr.isatty():
        with progress_bar(
            sys.stderr, desc=what, total=total, unit=f" {unit}", unit_scale=True
        ) as bar:
            yield bar.update
        return
    from tqdm import tqdm

    started = said = time.monotonic()
    done = first = 0  # a first call may tell what an earlier start had done

    def update(more: int) -> None:
        nonlocal done, first, said
        done += more
        now = time.monotonic()
        if now - started < 1:
            first = done
        if now - said >= every_seconds:
            said = now
            rate = max((done - first) / (now - started), 1e-9)
            rest = "" if total is None else f" of {total:,}"
            left = (
                ""
                if total is None
                else f", {tqdm.format_interval(round((total - done) / rate))} left"
            )
            print(f"{what}: {done:,}{rest} {unit}, {rate:,.0f}/s{left}", flush=True)

    yield update


class ConsoleWriter:
    """One readable line a record, and a progress bar when somebody is watching.

    The bar is drawn only on a terminal: in a log file it would be one endless line.
    Lines are printed above it.

    Args:
      total_steps: the step the run ends with.
      stream: standard output by default.
      start_step: where the bar starts after a resume.
      show_top5: whether top-5 errors are shown.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        *,
        start_step: int = 0,
        show_top5: bool = True,
    ):
        self._total = total_steps
        self._show_top5 = show_top5
        self._stream = sys.stdout if stream is None else stream
        self._bar = None
        if self._stream.isatty():
            self._bar = progress_bar(
                self._stream, total=total_steps, initial=start_step, unit="step"
            )

    def write(self, step: int, epoch: float, scalars: Mapping[str, Any]) -> None:
        """Prints a record, for example (one line):

        step 1200/45000  epoch 2.67  train: loss 3.214  top-1 error 71.2%  lr 0.01
        1523 images/s  waiting for data 3%  left 1:02:33
        """
        width = len(str(self._total))
        parts = [f"step {step:{width}d}/{self._total}", f"epoch {float(epoch):.2f}"]
        previous = ""
        for name, value in _in_order(scalars):
            group, _, short = name.rpartition("/")
            if short.endswith("top5_error") and not self._show_top5:
                continue
            words = _words(short, float(value), group)
            # Say train: or eval: once, before the first number of that kind.
            new = group not in ("", previous)
            parts.append(f"{group.replace('_', ' ')}: {words}" if new else words)
            previous = group or previous
        self.text("  ".join(parts))

    def progress(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)

    def text(self, line: str) -> None:
        """Prints `line`, above the bar if there is one.

        A run goes on if its output cannot be written: its records are in the workdir.
        """
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Removes the bar; the stream stays open."""
        if self._bar is not None:
            self._bar.close()


# How a number is shown: the words around it, by the name's last part.
_FORMATS = {
    "loss": lambda v: f"loss {v:.4f}",
    "top1_error": lambda v: f"top-1 error {100 * v:.2f}%",
    "top5_error": lambda v: f"top-5 error {100 * v:.2f}%",
    "views_loss": lambda v: f"several views: loss {v:.4f}",
    "views_top1_error": lambda v: f"top-1 error {100 * v:.2f}%",
    "views_top5_error": lambda v: f"top-5 error {100 * v:.2f}%",
    "count": lambda v: f"on {v:.0f} images",
    "lr": lambda v: f"lr {v:.4g}",
    "images_per_sec": lambda v: f"{v:.1f} images/s" if v < 100 else f"{v:.0f} images/s",
    "data_wait_frac": lambda v: f"waiting for data {100 * v:.0f}%",
    "eta_seconds": lambda v: f"left {_hours(v)}",
}


# Of a summary, by the name's first part; a layer's name is the last.
_GROUP_FORMATS = {
    "grad_norm": lambda v: f"{v:.1e}",
    "dead_relu": lambda v: f"{100 * v:.0f}%",
}


def _words(name: str, value: float, group: str = "") -> str:
    if group in _GROUP_FORMATS:
        return f"{name} {_GROUP_FORMATS[group](value)}"
    if name in _FORMATS:
        return _FORMATS[name](value)
    return f"{name} {value:.4g}"


def _in_order(scalars: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The known names in the order of `_FORMATS`, train before eval, others last."""
    order = list(_FORMATS)

    def key(item: tuple[str, Any]) -> tuple[int, int]:
        group, _, short = item[0].rpartition("/")
        place = order.index(short) if short in order else len(order)
        return (
            ("train", "eval").index(group) if group in ("train", "eval") else 2,
            place,
        )

    return sorted(scalars.items(), key=key)


def _hours(seconds: float) -> str:
    """3753 -> "1:02:33"; "?" when it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def _number(value: Any) -> int | float:
    """A Python number from a number, a NumPy scalar or an array of one element."""
    number = value if isinstance(value, (int, float)) else np.asarray(value).item()
    return number if isinstance(number, int) else float(number)


def parse_record(line: str) -> dict[str, Any] | None:
    """A record, or None for a line that was torn by a kill."""
    try:
        return json.loads(line)
    except ValueError:
        return None
