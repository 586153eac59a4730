"""Smoke tests of the benchmarks, and the proof that the peer is the same network."""

import importlib.util
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import create_model
from alexnet_jax.training import metrics
from benchmarks.reliability import repeats, soak
from benchmarks.speed import gpu, jax_alexnet, measure, operators, roofline, side_by_side
from benchmarks.speed.measure import Setting
from tests.models.networks import random_variables
from tests.models.test_torch import torch_network

PAPER_MULTIPLY_ADDS = 724_406_816
CONV1_MULTIPLY_ADDS = 55 * 55 * 96 * 11 * 11 * 3
NARROW = Setting(batch=2, width=1 / 16)


def test_candidates_take_turns():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure.alternate(candidates, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    found = measure.ratio({"a": [1.0, 2.0, 4.0], "b": [2.0, 3.0, 4.0]}, "a", "b")
    assert found == {"median": 1.5, "min": 1.0, "max": 2.0}


def test_a_result_is_three_files_without_paths(tmp_path, capsys, monkeypatch):
    words = ["x", f"--out={tmp_path}", "--data=c/d", "--batch", "2"]
    monkeypatch.setattr("sys.argv", words)
    figure = measure.bar_charts([measure.Bars("t", "u", {"ours": [3.0, 4.0]}, ceiling=5.0)])
    table = measure.markdown_table(["a", "b"], [["1", "2"]])
    measure.write_result(tmp_path, "name", {"x": 1}, table=table, figure=figure)
    record = json.loads((tmp_path / "name.json").read_text())
    assert record["x"] == 1
    assert record["machine"]["command"].endswith(" --out=DIR --data=PATH --batch 2")
    page = (tmp_path / "name.md").read_text()
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |\n" in page
    assert capsys.readouterr().out == page + "\n"
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG")


def test_operations_and_bytes_of_the_paper():
    model = jax_alexnet.network(Setting())
    forward, step = roofline.inference(model, 1), roofline.training(model, 128)
    assert roofline.flops(forward) == 2 * PAPER_MULTIPLY_ADDS
    expected = 3 * PAPER_MULTIPLY_ADDS - CONV1_MULTIPLY_ADDS
    assert roofline.flops(step) == 2 * 128 * expected
    costs = {cost.name: cost for cost in step}
    assert "conv1 input gradient" not in costs
    assert costs["norm1 backward"].bytes == 3 * 128 * 55 * 55 * 96 * 4
    assert costs["update"].bytes == 5 * 4 * 60_965_224
    # The operators' benchmark measures exactly these parts.
    assert set(operators.candidates(model, Setting(), "cpu")) == set(costs)


def peer_with(table, params, lrn, dropout):
    """Return torch, and the peer with our parameters; `table` has no padding in conv1."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.speed import torch_alexnet

    peer = torch_alexnet.paper_network(lrn, width=NARROW.width, num_classes=10, dropout=dropout)
    donor = torch_network(torch, table, params)
    values = donor.state_dict().values()
    peer.load_state_dict(dict(zip(peer.state_dict(), values, strict=True)))
    return torch, peer


@pytest.fixture(scope="module")
def small():
    """Run our narrow network without dropout; return inputs, loss, logits and gradients."""
    kwargs = {"num_classes": 10, "width": NARROW.width, "init": "he"}
    model = create_model("paper", dropout=0.0, **kwargs)
    variables = random_variables(model)
    rng = np.random.default_rng(1)
    images = rng.normal(0, 60, (2, 224, 224, 3)).astype(np.float32)
    labels = np.array([3, 7])

    @jax.jit
    def loss_fn(variables):
        logits = model.apply(variables, images, train=True)
        return jnp.mean(metrics.cross_entropy(logits, labels)), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables)
    # The same layers for torch: Caffe's 227 pixels need no padding in conv1.
    table = create_model("caffe", **kwargs).network
    return table, variables["params"], images, labels, loss, logits, grads["params"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("lrn", ["library", "slices", "roots"])
def test_the_peer_is_the_same_network(small, lrn, channels_last):
    table, params, images, labels, loss, logits, grads = small
    torch, peer = peer_with(table, params, lrn, dropout=0.0)
    form = torch.channels_last if channels_last else torch.contiguous_format
    peer = peer.to(memory_format=form)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=form)
    theirs = peer(x)
    their_loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(labels))
    their_loss.backward()
    scale = np.abs(logits).max()
    assert scale > 1  # the logits say something
    np.testing.assert_allclose(theirs.detach(), logits, atol=1e-4 * scale)
    assert their_loss.item() == pytest.approx(float(loss), rel=1e-4)
    expected = torch_network(torch, table, grads).parameters()
    for ours, parameter in zip(expected, peer.parameters(), strict=True):
        error = (ours - parameter.grad).norm() / ours.norm()
        assert error < 1e-3, tuple(ours.shape)


def test_the_peers_dropout_is_the_papers():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.speed.torch_alexnet import PaperDropout

    layer, x = PaperDropout(0.25), torch.ones(1000)
    torch.manual_seed(0)
    trained = layer(x)
    assert set(trained.tolist()) == {0.0, 1.0}  # not scaled in training
    assert trained.mean().item() == pytest.approx(0.75, abs=0.05)
    assert layer.eval()(x).unique().tolist() == [0.75]  # but in testing


def test_the_fastest_form_is_the_peer(monkeypatch, tmp_path):
    times = {"slow": 4.0, "quick": 2.0, "torch": 2.0, "ours": 1.0}

    def alternate(candidates, *, rounds, warmup=1):
        return {name: [times[name]] * rounds for name in candidates}

    def build_failing():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(measure, "alternate", alternate)
    builders = {"slow": lambda: "", "broken": build_failing, "quick": lambda: "call"}
    record, peer = side_by_side.compare(lambda: 0, builders, Setting(8), rounds=3)
    assert (record["peer"], peer) == ("quick", "call")
    assert record["selection_seconds"]["broken"] == "RuntimeError: no compiler"
    assert record["images_per_second"] == {"ours": [8.0] * 3, "torch": [4.0] * 3}
    # 8 images' work: 40 operations, limits of 4 and of 2 images per second.
    costs = [roofline.Cost("a", 40.0, 0.0), roofline.Cost("b", 0.0, 20.0)]
    side_by_side.add_limits(record, costs, flop_rate=20.0, bandwidth=10.0)
    assert record["gemm_share"] == {"ours": 2.0, "torch": 1.0}
    assert record["roofline_images_per_second"] == 2.0
    side_by_side.write(tmp_path, "train_step", [record])
    page = (tmp_path / "train_step.md").read_text()
    assert "| float32, batch 8 | ours | 8.0 (8.0 to 8.0) | 200% | 400% |" in page


@pytest.mark.nightly
def test_a_training_call_trains():
    call = jax_alexnet.Trainer(NARROW)
    losses = [call() for _ in range(3)]
    assert np.isfinite(losses).all() and len(set(losses)) == 3


def test_the_gpu_plan_names_benchmarks_and_keeps_to_its_time(tmp_path):
    for words, _ in (*gpu.PLAN, *gpu.SHORT_PLAN):
        assert importlib.util.find_spec(f"benchmarks.{words.split()[0]}")
    late = gpu.run((("speed.train_step", 60.0), ("x", 1.0)), tmp_path, budget=11.0)
    assert [outcome["result"] for outcome in late] == ["stopped", "left out"]
    (outcome,) = gpu.run((("speed.no_such", 60.0),), tmp_path, budget=90.0)
    assert outcome["result"] == "failed (1)"


def test_growth_of_a_process_and_differences_of_runs():
    assert soak.sample(os.getpid(), time.monotonic()).resident_mib > 1
    # 2 MiB in half a minute; the first ten seconds of a minute are not counted.
    samples = [soak.Sample(s, 999 if s < 10 else 100 + s / 15, 7, 9) for s in range(0, 61, 5)]
    assert soak.growth(samples)["mib_an_hour"] == pytest.approx(240)
    runs = [{"a": np.ones(4), "b": np.full(2, 2.0)} for _ in range(3)]
    assert repeats.compare(runs) == {"equal": True, "difference": 0.0}
    runs[2]["b"] = runs[2]["b"] + [0.0, 4e-7]
    found = repeats.compare(runs)
    assert not found["equal"]
    assert found["difference"] == pytest.approx(4e-7 / np.sqrt(8))
