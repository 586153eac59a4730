"""torch's files: tensors by name, and nothing else.

`torch.load` with `weights_only=True` runs no code, but a few bytes may still ask it for
any amount of memory (`bytearray(10**10)` is on its list), and what it finds in a zip
archive may be something else than another reader does. So it is given what has been
looked through, in an archive that is written anew.
"""

import io
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import kinds
from alexnet_jax.pretrained import weights as weights_lib
from alexnet_jax.pretrained.weights import WeightsError

# Under which names training programs keep the state_dict in a checkpoint.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
_ZIP_START = b"PK\x03\x04"  # by which torch tells an archive
# A file of torch before 1.6 begins with this number, pickled; it is the first of five
# pickles, and the tensors' bytes come after them.
_OLD_START, _OLD_PICKLES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", 5
# AlexNet's have some 3,000 bytes, with an optimiser's state 10,000. Of a million bytes a
# dictionary can be made that takes hours: all of its keys have one hash.
MOST_PICKLED = 2**17
# What a state_dict is made of, and how pickle names it and puts it together.
_PARTS = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch (Size|device|\w+Storage|b?float\d+|u?int\d+|complex\d+|bool)"
    r"|collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)"
)
_OTHER_NAMING = {
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "DUP",
    "MEMOIZE",
} | {f"EXT{number}" for number in (1, 2, 4)}
# How often something that is made of other things may be used once more, such as a
# tuple of an optimiser. Each time may double what there is.
MOST_REPEATED = 20
# Opcodes that put down what is made of nothing else.
_SIMPLE = re.compile(
    r"GLOBAL|NONE|NEWTRUE|NEWFALSE|INT|BININT[12]?|LONG[14]?|(BIN)?FLOAT"
    r"|((SHORT_)?BIN)?(STRING|UNICODE|BYTES)8?"
)


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, float32; never through plain pickle.

    Raises:
      WeightsError: for anything but a dictionary of floating-point tensors, and if torch
        is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            f"reading {path} needs torch: pip install torch (or write it as "
            ".safetensors where torch is installed)."
        ) from error
    checked = _checked(path)
    try:
        found: Any = torch.load(checked, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's and torch's own are many
        # Not torch's own words, which advise to read it by plain pickle.
        why = "torch.load with weights_only=True does not read it"
        raise weights_lib.not_of_format(path, ".pth", why) from error
    checkpoint = found if isinstance(found, dict) else {}
    nested = [checkpoint[k] for k in _STATE_KEYS if isinstance(checkpoint.get(k), dict)]
    state = {
        str(name): value
        for name, value in (nested[0] if nested else checkpoint).items()
        if not weights_lib.is_counter(str(name))
    }
    others = [n for n, value in state.items() if not isinstance(value, torch.Tensor)]
    if others or not isinstance(found, dict):
        what = f"there is no tensor under its keys {weights_lib.some(others)}"
        raise WeightsError(
            f"{path} holds no state_dict: {what if others else 'it is no dictionary'}. "
            "Expected that of torchvision's AlexNet, alone or under one of the keys "
            f"{', '.join(_STATE_KEYS)}: torch.save(model.state_dict(), PATH)."
        )
    return _arrays(path, state)


def _checked(path: Path) -> io.BytesIO:
    """A file for `torch.load`, of which every pickle names parts of a state_dict only."""
    data = path.read_bytes()
    try:
        if data.startswith(_ZIP_START):
            data = _rewritten(data)
        elif data.startswith(_OLD_START) and not tarfile.is_tarfile(io.BytesIO(data)):
            pickles = io.BytesIO(data)
            for _ in range(_OLD_PICKLES):
                _check_pickle(pickles)
        else:
            raise ValueError("no file of torch.save begins so")
    except _OtherPartError as error:
        raise WeightsError(
            f"{path} is refused: it holds more than tensors ({error}), which could run "
            "code or fill the memory. Expected the state_dict of torchvision's AlexNet: "
            "torch.save(model.state_dict(), PATH)."
        ) from error
    except Exception as error:  # zipfile's, tarfile's and pickletools' own are many
        raise weights_lib.not_of_format(path, ".pth", error) from error
    return io.BytesIO(data)


def _rewritten(data: bytes) -> bytes:
    """The same archive by our own zipfile; ValueError if it is larger unpacked."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as copy,
    ):
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > len(data):  # torch packs nothing
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("it has two members of one name")
        for member in members:
            content = archive.read(member)
            if member.filename.lower().endswith(".pkl"):
                _check_pickle(io.BytesIO(content))
            copy.writestr(member.filename, content)
    return made.getvalue()


class _OtherPartError(ValueError):
    """A pickle that names something else than the parts of a state_dict; which."""


def _check_pickle(file: io.BytesIO) -> None:
    """Reads to the end of one pickle, without making anything of it."""
    start, before, made, repeated = file.tell(), "", set(), 0
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if not _SIMPLE.fullmatch(before):
                made.add(argument)
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            repeated += argument in made
        before = opcode.name
        if repeated > MOST_REPEATED:
            raise ValueError(f"it repeats more than {MOST_REPEATED} of its objects")
        if file.tell() - start > MOST_PICKLED:
            raise ValueError(f"what it pickles has more than {MOST_PICKLED:,} bytes")
        if opcode.name in _OTHER_NAMING:
            raise _OtherPartError(f"by the opcode {opcode.name}")
        if opcode.name == "GLOBAL" and not _PARTS.fullmatch(str(argument)):
            raise _OtherPartError(kinds.shown(str(argument)))


def _arrays(path: Path, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """torch's tensors as float32.

    Raises:
      WeightsError: for tensors that are not plain floating-point ones, or hold more
        numbers than the file can: views of few numbers can have any shape.
    """
    size, total = path.stat().st_size, 0
    arrays = {}
    for name, value in state.items():
        plain = str(value.layout) == "torch.strided" and value.device.type == "cpu"
        if not plain or not value.is_floating_point():
            raise WeightsError(
                f"{path}: {kinds.shown(name)} is {value.dtype} on {value.device.type}, "
                f"{value.layout}; weights are plain floating-point tensors."
            )
        total += value.numel() * value.element_size()
        if total > size:
            raise WeightsError(
                f"{path} is no state_dict: its tensors would have at least {total:,} "
                f"bytes, the file has {size:,}."
            )
        try:
            arrays[name] = value.detach().float().numpy()
        except (RuntimeError, TypeError) as error:  # some tensors hold no numbers
            raise WeightsError(
                f"{path}: {kinds.shown(name)} cannot be read: {error}"
            ) from error
    return arrays
