"""Kernels, bytes, products and collectives of an optimised and scheduled XLA program.

The bytes of a kernel are what it reads and writes. A fused operand of which only slices
are used counts by its slices. Caches are not modelled.
"""

import collections
import math
import re
from dataclasses import dataclass, field
from typing import Any

# Operations that launch nothing.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier"}
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")
_LAYOUT = re.compile(r"\]\{[\d,]*(?::[^}]*)?\}")  # its brackets would end a tuple too early
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)(\(.*)")
# Parts of a training step, by a piece of the name scopes of JAX and Flax. The first that
# fits counts: dropout is a stage of a dense layer.
PARTS = {
    "LRN": ("_norm",),
    "pooling": ("_pool",),
    "dropout": ("dropout",),
    "bias": ("add_bias",),
    "weights cast": ("_weights",),
    "convolution": ("grouped_conv", "_conv"),
    "fully connected": ("_dense", "_classifier", "matmul"),
    "augmentation": ("train_images",),
    "update": ("/update/",),
}
OTHER = "other"


@dataclass
class Instruction:
    """One line of a computation; `rest` holds the attributes behind the operands."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """Return the first group of a regular expression in the attributes, or ""."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> str:
        return self.attribute(r"(?:calls|to_apply|body)=%([\w.\-]+)")

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def scope(self) -> str:
        """The name scopes of the Python code that the instruction comes from."""
        return self.attribute(r'op_name="([^"]*)"')


Computation = dict[str, Instruction]


@dataclass
class Kernel:
    """One launch on the device; a library call may be several kernels.

    Attributes:
      name: of the instruction.
      call: the called library function, or "" for XLA's own kernels.
      part: of the training step, see `PARTS`.
      backward: it belongs to the backward pass.
      bytes: read and written.
      flops: of matrix products and convolutions, 2 per multiply-add.
    """

    name: str
    call: str
    part: str
    backward: bool
    bytes: int
    flops: int


@dataclass
class Collective:
    """An exchange between devices.

    Attributes:
      opcode: for example "all-reduce".
      bytes: sent by one device.
      behind: kernels that are launched between its start and its end.
    """

    opcode: str
    bytes: int
    behind: list[Kernel] = field(default_factory=list)


@dataclass
class Program:
    """Kernels and collectives in the order of the schedule."""

    kernels: list[Kernel]
    collectives: list[Collective]

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    def by_part(self) -> dict[str, dict[str, int]]:
        """Return {part: {"kernels", "bytes", "flops"}}, most bytes first."""
        found: dict[str, Any] = {}
        for kernel in self.kernels:
            part = found.setdefault(kernel.part, {"kernels": 0, "bytes": 0, "flops": 0})
            part["kernels"] += 1
            part["bytes"] += kernel.bytes
            part["flops"] += kernel.flops
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def read(text: str) -> Program:
    """Return the kernels of an optimised program, `compiled.as_text()`.

    The body of a loop counts once.
    """
    computations, entry = _parse(text)
    program, running = Program([], []), {}

    def walk(computation: Computation) -> None:
        for one in computation.values():
            kind = _COLLECTIVE.match(one.opcode)
            if one.opcode.endswith("-done"):
                running.pop(one.operands[0], None)
            elif kind:
                sent = sum(_size(computation[name].shape) for name in one.operands)
                program.collectives.append(Collective(kind[1], sent))
                if "-start" in one.opcode:
                    running[one.name] = program.collectives[-1]
            elif one.opcode in ("while", "conditional", "call", "async-start"):
                walk(computations[one.called])
            elif one.opcode not in _FREE and not one.opcode.endswith("-update"):
                kernel = _kernel(one, computation, computations)
                program.kernels.append(kernel)
                for collective in running.values():
                    collective.behind.append(kernel)

    walk(computations[entry])
    return program


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _COMPUTATION.fullmatch(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.fullmatch(_LAYOUT.sub("]", line)):
            root, name, shape, opcode, rest = found.groups()
            operands, rest = _operands(rest)
            current[name] = Instruction(name, shape, opcode, operands, rest, bool(root))
    return computations, entry


def _operands(text: str) -> tuple[list[str], str]:
    """Split "(%a, %b), attributes" at the bracket that closes the first."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", text[:i]), text[i + 1 :]
    raise ValueError(f"Expected operands in brackets, got {text[:80]!r}.")


def _size(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple."""
    total = 0
    for kind, sides in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind) or 0)
        total += bits * math.prod(_numbers(sides)) // 8
    return total


def _sides(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return _numbers(found[2]) if found else []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _kernel(one: Instruction, table: Computation, computations: dict[str, Computation]) -> Kernel:
    reads = [_size(table[name].shape) for name in one.operands if name in table]
    written, inside = _size(one.shape), {one.name: one}
    flops = _flops(one, table)
    if one.opcode == "fusion":
        inside = computations[one.called]
        reads, written = _fusion_bytes(inside, written)
        flops = sum(_flops(i, inside) for i in inside.values())
    elif one.opcode in ("slice", "dynamic-slice"):
        reads = [written]
    elif one.opcode == "custom-call":  # without its scratch memory, the last of a tuple
        written = _size(re.sub(r", s8\[\d+\]\)$", ")", one.shape))
    scopes = [i.scope for i in (one, *inside.values())]
    votes = collections.Counter(filter(None, map(_part, scopes)))
    part = votes.most_common(1)[0][0] if votes else OTHER
    backward = any("transpose(" in scope for scope in scopes)
    return Kernel(one.name, one.target, part, backward, sum(reads) + written, flops)


def _part(scope: str) -> str:
    for part, pieces in PARTS.items():
        if any(piece in scope for piece in pieces):
            return part
    return ""


def _fusion_bytes(inside: Computation, written: int) -> tuple[list[int], int]:
    """Return what a fusion reads of each parameter, and what it writes."""
    users = collections.defaultdict(list)
    for one in inside.values():
        for name in one.operands:
            users[name].append(one)

    def readers(name: str) -> list[Instruction]:
        """Return the users behind bitcasts."""
        found = []
        for user in users[name]:
            found += readers(user.name) if user.opcode == "bitcast" else [user]
        return found

    reads = []
    for one in inside.values():
        if one.opcode == "parameter":
            size, by = _size(one.shape), readers(one.name)
            if by and all(user.opcode in ("slice", "dynamic-slice", "gather") for user in by):
                size = min(size, sum(_size(user.shape) for user in by))
            elif by and all(
                user.opcode == "dynamic-update-slice" and user.operands[0] == one.name
                for user in by
            ):
                size = 0  # written in place
            reads.append(size)
    root = next(one for one in inside.values() if one.root)
    if root.opcode == "dynamic-update-slice":
        written = _size(inside[root.operands[1]].shape)
    return reads, written


def _flops(one: Instruction, table: Computation) -> int:
    """Return the operations of a matrix product or a convolution; of others 0."""
    is_conv = one.target.startswith("__cudnn$conv")
    if one.opcode != "dot" and not is_conv and not one.target.startswith("__cublas"):
        return 0
    left, right = (_sides(table[name].shape) for name in one.operands[:2])
    out = _sides(one.shape)
    if not is_conv:
        summed = one.attribute(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
        return 2 * math.prod(out) * math.prod(left[i] for i in _numbers(summed))
    # The labels name input, kernel and output of the forward convolution, which makes
    # kernel positions x input channels products for each output.
    kernel, y = right, out
    if "BackwardInput" in one.target:
        y = left
    elif "BackwardFilter" in one.target:
        kernel, y = out, right
    labels = one.attribute(r"dim_labels=\w+_(\w+)->")
    inputs = [n for label, n in zip(labels, kernel, strict=True) if label != "o"]
    return 2 * math.prod(y) * math.prod(inputs)
