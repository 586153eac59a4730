"""One process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a file, which is made; a killed holder lets go.

    Where there are no locks (Windows, some network file systems) nobody waits: what
    is written under it must be harmless when written twice.

    Raises:
      BlockingIOError: another process holds it, and `wait` is false.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
