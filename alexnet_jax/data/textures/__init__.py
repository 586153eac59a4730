"""`textures`: the embedded data set, a procedural stand-in built at first use."""

import contextlib
import io
import sys
import time
from pathlib import Path

from alexnet_jax.data.textures.drawing import CLASS_NAMES, draw
from alexnet_jax.system.cli import require_writable
from alexnet_jax.system.files import exclusive_lock, explain_full_disk

__all__ = ["CLASS_NAMES", "build", "draw"]


def build(data_dir: Path, *, tiny: bool = False) -> str:
    """Build the data set in `data_dir` unless it is there; return its name.

    Args:
      data_dir: directory of tfds data sets; made if absent.
      tiny: 200 images for training and 100 for testing instead of 4,000 and 1,000, in a
        folder of their own.

    Returns:
      The full tfds name, with the config and version.

    Raises:
      OSError: `data_dir` cannot be written, or is full.
    """
    import tensorflow_datasets as tfds

    from alexnet_jax.data.textures import textures_dataset_builder as module

    config = None
    if tiny:
        config = module.TexturesConfig("tiny", train_examples=200, test_examples=100)
    name = f"textures{'/tiny' if tiny else ''}:{module.Builder.VERSION}"
    directory = data_dir / name.replace(":", "/")
    done = directory / "dataset_info.json"
    if done.exists():
        return name
    require_writable(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    # The processes of one run build once. On a file system without locks each one builds:
    # tfds writes to a directory of its own and renames it.
    lock = exclusive_lock(data_dir / ".textures.lock", wait=True)
    with explain_full_disk(data_dir), lock:
        if done.exists():  # another process was faster
            return name
        print(f"Drawing the textures data set into {directory} ...", file=sys.stderr)
        started = time.perf_counter()
        builder = module.Builder(data_dir=data_dir, file_format="array_record", config=config)
        tfds.disable_progress_bar()  # several, which speak of downloads
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
        finally:
            tfds.enable_progress_bar()
        seconds = time.perf_counter() - started
        print(f"Textures are ready ({seconds:.0f} s).", file=sys.stderr)
    return name
