"""What a compiled program sends between its devices, read from its text."""

import collections
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

# When in a training step: activations on the way to the loss, their gradients on the
# way back, and last the sums of the parameters' gradients, with the loss and the error.
PHASES = ("forward", "backward", "gradients")
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COLLECTIVE = re.compile(
    rf"= (?P<shape>\S.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)$"
)
_LISTS = re.compile(
    r"\b(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}"
)
_IOTA = re.compile(r"\breplica_groups=\[\d+,(\d+)\]<=\[")
_MESH = re.compile(
    r"\breplica_groups=mesh\[(?P<sizes>[^]]+)\](?:, device_ids=\(.*?\))? "
    r"\{(?P<axes>[^}]+)\}"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")


@dataclass(frozen=True)
class Exchange:
    """One array that a collective operation gives every device of a group.

    Attributes:
      kind: one of KINDS.
      dtype, shape: of the result on one device, in XLA's words ("f32").
      devices: in the group, at least 2.
      phase: one of PHASES.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    phase: str

    @property
    def result_bytes(self) -> int:
        """Size of the result on one device."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)

    @property
    def sent_bytes(self) -> float:
        """What a device sends, by the algorithms that send least (a ring).

        Of an array of S bytes in the whole over n devices: an all-gather,
        reduce-scatter or all-to-all (n - 1) / n of S, an all-reduce twice that.
        """
        others = (self.devices - 1) / self.devices
        match self.kind:
            case "all-gather" | "all-to-all":
                return others * self.result_bytes
            case "all-reduce":
                return 2 * others * self.result_bytes
            case "reduce-scatter":  # the result is a device's part
                return (self.devices - 1) * self.result_bytes
            case _:
                return self.result_bytes


def exchanges(hlo: str) -> list[Exchange]:
    """Every array that a compiled program exchanges.

    A group of one device sends nothing, though XLA may leave it in: not listed.

    Args:
      hlo: `jax.jit(f).lower(...).compile().as_text()`.
    """
    found = []
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        devices = _largest_group(match["rest"])
        if devices < 2:
            continue
        arrays = [
            (array["dtype"], tuple(int(n) for n in array["dims"].split(",") if n))
            for array in _ARRAY.finditer(match["shape"])
        ]
        if match["kind"] == "all-to-all" and len(arrays) > 1:
            # The form with a result for each device: one array, in pieces.
            dtype, shape = arrays[0]
            arrays = [(dtype, (len(arrays), *shape))]
        elif match["start"] and match["kind"] != "all-reduce":
            # Such an operation gives back its operands before its results.
            operands = match["rest"].partition(")")[0].count("%")
            arrays = arrays[operands : 2 * operands]
        found += [
            Exchange(match["kind"], dtype, shape, devices, _phase(line))
            for dtype, shape in arrays
        ]
    return found


def counts(found: Iterable[Exchange]) -> collections.Counter[str]:
    """The number of arrays exchanged, by the kind of operation.

    One operation may carry several arrays, and XLA merges operations as it likes:
    what is counted does not depend on that.
    """
    return collections.Counter(exchange.kind for exchange in found)


def collectives(hlo: str) -> collections.Counter[str]:
    """The number of arrays a compiled program exchanges, by the kind of operation."""
    return counts(exchanges(hlo))


def in_words(number: collections.Counter[str]) -> str:
    """{"all-gather": 3, "all-reduce": 1} -> "3 all-gather, 1 all-reduce"."""
    return ", ".join(f"{number[kind]} {kind}" for kind in KINDS if number[kind]) or "-"


def sent_bytes(found: Iterable[Exchange]) -> int:
    """What one device sends in all, see `Exchange.sent_bytes`."""
    return round(sum(exchange.sent_bytes for exchange in found))


def _phase(line: str) -> str:
    # jax names every operation after the transformations it came from.
    name = re.search(r'op_name="([^"]*)"', line)
    if name is None or "jvp(" not in name[1]:
        return "gradients"
    return "backward" if "transpose(" in name[1] else "forward"


def _largest_group(attributes: str) -> int:
    """Return how many devices the largest of an operation's groups has.

    XLA writes the groups as lists, as an iota ([groups, devices]<=[...]), or by the
    axes of a mesh along which they lie. A permutation's groups are its pairs.

    Raises:
      ValueError: the groups are written in another form.
    """
    if lists := _LISTS.search(attributes):
        groups = re.findall(r"[\d,]+(?=\})", lists[1])
        return max(len(set(group.split(","))) for group in groups)
    if iota := _IOTA.search(attributes):
        return int(iota[1])
    if mesh := _MESH.search(attributes):
        sizes = dict(axis.split("=") for axis in mesh["sizes"].split(","))
        # "'data':(1)2": a part of an axis, of 2 devices.
        axes = (axis.partition(":") for axis in mesh["axes"].split(","))
        return math.prod(
            int(part.rpartition(")")[2] or sizes[axis]) for axis, _, part in axes
        )
    raise ValueError(
        "unknown form of replica groups in the compiled program, try another version "
        f"of jax that requirements.txt allows: {attributes}"
    )
