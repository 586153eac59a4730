"""The operators of `operators` in torch, eager, in both memory formats."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import summary
from benchmarks.speed.measure import Setting
from benchmarks.speed.operators import Builder, Layer, convolutions
from benchmarks.speed.torch_alexnet import LRNS, local_response_norm, paper_network, use_precision

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def operators(model: AlexNet, setting: Setting, device: str) -> Iterator[tuple[str, str, Builder]]:
    """Yield (operator, "torch FORMAT", builder of its call), named as in `roofline`."""
    use_precision(setting.precision)
    dtype = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
    for format_name, form in FORMATS.items():
        make = _Maker(setting.batch, dtype, device, form)
        who = f"torch {format_name}"
        for layer in convolutions(model):
            yield from ((name, who, build) for name, build in make.conv(layer))
        before: tuple[int, ...] = ()
        for row in summary(model):
            if row.name.startswith("pool"):
                pool = partial(F.max_pool2d, kernel_size=3, stride=2)
                for name, build in make.through(row.name, before, pool):
                    yield name, who, build
            if row.name.startswith("norm"):
                for lrn in LRNS:
                    norm = partial(local_response_norm, form=lrn)
                    for name, build in make.through(row.name, before, norm):
                        yield name, f"{who} LRN {lrn}", build
            if row.name.startswith("fc") and format_name == "contiguous":
                for name, build in make.dense(row.name, before, row.shape[0]):
                    yield name, who, build
            before = row.shape
    yield "update", "torch fused", lambda: _update(device)


@dataclass(frozen=True)
class _Maker:
    """Makes the builders of one memory format."""

    batch: int
    dtype: torch.dtype
    device: str
    form: torch.memory_format

    def random(self, *shape: int) -> torch.Tensor:
        x = torch.randn(*shape, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=self.form) if len(shape) == 4 else x

    def images(self, shape: tuple[int, ...]) -> torch.Tensor:
        height, width, channels = shape
        return self.random(self.batch, channels, height, width)

    def conv(self, layer: Layer) -> Iterator[tuple[str, Builder]]:
        (top, bottom), (left, right) = layer.padding
        # torch pads both sides alike; conv1's right and bottom are a step before.
        same = (top, left) == (bottom, right)
        padding, stride = (top if same else 0), layer.stride
        kh, kw, cin, cout = layer.kernel

        def padded(x: torch.Tensor) -> torch.Tensor:
            return x if same else F.pad(x, (left, right, top, bottom))

        def convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
            return F.conv2d(padded(x), kernel, None, stride, padding, 1, layer.groups)

        def forward() -> Callable[[], Any]:
            x, kernel = self.images(layer.shape), self.random(cout, cin, kh, kw)
            return self.call(lambda: convolve(x, kernel))

        def backward(mask: list[bool]) -> Callable[[], Any]:
            x, kernel = self.images(layer.shape), self.random(cout, cin, kh, kw)
            g, x = torch.randn_like(convolve(x, kernel)), padded(x)
            both = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], layer.groups)
            function = torch.ops.aten.convolution_backward
            return self.call(lambda: function(g, x, kernel, None, *both, mask))

        yield f"{layer.name} forward", forward
        if layer.name != "conv1":
            yield f"{layer.name} input gradient", lambda: backward([True, False, False])
        yield f"{layer.name} kernel gradient", lambda: backward([False, True, False])

    def through(
        self, name: str, shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[str, Builder]]:
        def run(x: torch.Tensor) -> torch.Tensor:
            # As in the network; a part of torch's own LRN has no bfloat16 on a CPU.
            bfloat16 = self.dtype is torch.bfloat16
            with torch.autocast(self.device, torch.bfloat16, enabled=bfloat16):
                return function(x)

        def forward() -> Callable[[], Any]:
            x = self.images(shape)
            return self.call(lambda: run(x))

        def backward() -> Callable[[], Any]:
            x = self.images(shape).requires_grad_()
            y = run(x)
            g = torch.randn_like(y)
            return self.call(lambda: torch.autograd.grad(y, x, g, retain_graph=True), grad=True)

        yield f"{name} forward", forward
        yield f"{name} backward", backward

    def dense(
        self, name: str, shape: tuple[int, ...], features: int
    ) -> Iterator[tuple[str, Builder]]:
        n = torch.Size(shape).numel()

        def build(product: Callable[..., torch.Tensor]) -> Callable[[], Any]:
            x, kernel = self.random(self.batch, n), self.random(features, n)
            g = self.random(self.batch, features)
            return self.call(lambda: product(x, kernel, g))

        yield f"{name} forward", lambda: build(lambda x, kernel, g: x @ kernel.T)
        yield f"{name} input gradient", lambda: build(lambda x, kernel, g: g @ kernel)
        yield f"{name} kernel gradient", lambda: build(lambda x, kernel, g: g.T @ x)

    def call(self, function: Callable[[], Any], grad: bool = False) -> Callable[[], None]:
        """Return a call that waits for the device."""

        def finished() -> None:
            with torch.set_grad_enabled(grad):
                function()
            if self.device != "cpu":
                torch.cuda.synchronize()

        return finished


def _update(device: str) -> Callable[[], None]:
    network = paper_network().to(device)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )

    def call() -> None:
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return call
