"""The peer: the paper's network in PyTorch, in the forms a user would try.

The same two columns, response normalisation, dropout, loss and update as
`alexnet_jax.create_model("paper")`, the same precision, from the same uint8 images.
torch has no normalisation inside a column of its own and its
`torch.nn.functional.local_response_norm` is slow on some backends, so `Form` has
several ways of writing it. Which form is the fastest is measured, not assumed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.measure import Setting

LRNS = ("library", "slices", "roots")
COLUMNS = 2


@dataclass(frozen=True)
class Form:
    """One way of running the network.

    Attributes:
      lrn: "library" is torch's own, "slices" the sum of five shifted slices and
        `torch.pow`, "roots" the same with two roots for the power, as ours has it.
      compile: the mode of `torch.compile`; empty: eager.
      channels_last: the memory format of images and kernels.
    """

    lrn: str = "library"
    compile: str = ""
    channels_last: bool = False

    @property
    def name(self) -> str:
        mode = f" ({self.compile})" if self.compile not in ("", "default") else ""
        words = ["torch", f"compile{mode}" if self.compile else "eager"]
        if self.channels_last:
            words.append("channels_last")
        return " ".join([*words, f"LRN {self.lrn}"])

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, compiled if the form says so."""
        if not self.compile:
            return function
        # All forms and settings share a function's code, which torch compiles at most
        # eight times before it goes on in eager, silently.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Shapes never change here; told so, torch cannot trade speed for generality.
        return torch.compile(function, mode=self.compile, dynamic=False, fullgraph=True)


def local_response_norm(x: torch.Tensor, form: str) -> torch.Tensor:
    """Return the paper's section 3.3 inside each column of x [B, C, H, W].

    torch divides alpha by the window, so its 5e-4 is the paper's 1e-4. It has no
    columns, so they become examples, which needs them one after the other.
    """
    b, c, h, w = x.shape
    if form == "library":
        columns_last = not x.is_contiguous()
        y = x.reshape(b * COLUMNS, c // COLUMNS, h, w)
        y = F.local_response_norm(y, 5, alpha=5e-4, beta=0.75, k=2.0)
        y = y.reshape(b, c, h, w)
        kind = torch.channels_last if columns_last else torch.contiguous_format
        return y.contiguous(memory_format=kind)
    columns = []
    for column in x.chunk(COLUMNS, dim=1):
        squares, n = F.pad(column * column, (0, 0, 0, 0, 2, 2)), column.shape[1]
        total = squares[:, :n]
        for i in range(1, 5):
            total = total + squares[:, i : i + n]
        base = 2.0 + 1e-4 * total
        if form == "slices":
            columns.append(column * torch.pow(base, -0.75))
        else:
            root = torch.rsqrt(base)
            columns.append(column * (root * torch.sqrt(root)))
    return torch.cat(columns, dim=1)


class LocalResponseNorm(nn.Module):
    """`local_response_norm` as a layer."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return local_response_norm(x, self.form)


class PaperDropout(nn.Dropout):
    """Dropout of the paper's section 4.2: scales in testing, not in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 - self.p)


def paper_network(
    lrn: str = "library", *, width: float = 1.0, num_classes: int = 1000, dropout: float = 0.5
) -> nn.Sequential:
    """Return the network of section 3.5: images [B, 3, 224, 224] -> logits [B, num_classes].

    Weights start as in section 5: N(0, 0.01), biases 1 in conv2, conv4, conv5, fc6
    and fc7. `width` scales as `alexnet_jax.create_model`'s.
    """

    def scaled(features: int) -> int:
        return COLUMNS * max(1, round(features * width / COLUMNS))

    c1, c2, c3, c4, c5 = map(scaled, (96, 256, 384, 384, 256))
    f6, f7 = scaled(4096), scaled(4096)
    network = nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        *(nn.Conv2d(3, c1, 11, stride=4), nn.ReLU()),
        *(LocalResponseNorm(lrn), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(c1, c2, 5, padding=2, groups=COLUMNS), nn.ReLU()),
        *(LocalResponseNorm(lrn), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c3, c4, 3, padding=1, groups=COLUMNS), nn.ReLU()),
        *(nn.Conv2d(c4, c5, 3, padding=1, groups=COLUMNS), nn.ReLU()),
        *(nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(c5 * 36, f6), nn.ReLU(), PaperDropout(dropout)),
        *(nn.Linear(f6, f7), nn.ReLU(), PaperDropout(dropout)),
        nn.Linear(f7, num_classes),
    )
    layers = [m for m in network if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, bias in zip(layers, (0, 1, 0, 1, 1, 1, 1, 0), strict=True):
        nn.init.normal_(layer.weight, 0, 0.01)
        assert layer.bias is not None
        nn.init.constant_(layer.bias, bias)
    return network


def trainer(setting: Setting, form: Form, device: str = "cpu") -> Callable[[], float]:
    """Return a call that makes `setting.steps` updates and returns the last loss.

    SGD with momentum 0.9 and weight decay 0.0005, fused; the batch stays the same.
    """
    network, images, mean = _prepared(setting, form, device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )
    labels = torch.randint(0, 1000, (setting.batch,), device=device)

    def loss_fn(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with _autocast(setting, device):
            return F.cross_entropy(network(images.float() - mean), labels)

    loss_fn = form.compiled(loss_fn)

    def call() -> float:
        loss = torch.zeros(())
        for _ in range(setting.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(images, labels)
            loss.backward()
            optimizer.step()
        return loss.item()  # which waits for the device

    return call


def classifier(setting: Setting, form: Form, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """Return a call that classifies the batch `setting.steps` times, to logits."""
    network, images, mean = _prepared(setting, form, device)
    network.eval()

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with _autocast(setting, device):
            return network(images.float() - mean)

    logits_of = form.compiled(logits_of)

    def call() -> torch.Tensor:
        logits = images
        with torch.inference_mode():
            for _ in range(setting.steps):
                logits = logits_of(images)
        if logits.is_cuda:
            torch.cuda.synchronize()
        return logits

    return call


def _prepared(
    setting: Setting, form: Form, device: str
) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Return the network in training mode, uint8 images and their mean image."""
    use_precision(setting.precision)
    torch.manual_seed(0)
    network = paper_network(form.lrn, width=setting.width).to(device)
    # torch's stubs leave this overload out.
    network = network.to(memory_format=form.memory_format)  # pyright: ignore
    images = torch.randint(0, 256, (setting.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    mean = torch.full((1, 3, 224, 224), 120.0, device=device)
    return (
        network,
        images.contiguous(memory_format=form.memory_format),
        mean.contiguous(memory_format=form.memory_format),
    )


def use_precision(precision: str) -> None:
    """Set for the whole process how a GPU multiplies float32 numbers."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tensorfloat32"
    torch.backends.cudnn.allow_tf32 = precision == "tensorfloat32"
    torch.backends.cudnn.benchmark = True  # XLA tries its algorithms too


def _autocast(setting: Setting, device: str) -> torch.autocast:
    return torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=setting.precision == "bfloat16"
    )
