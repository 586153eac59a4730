"""The benchmarks: their arithmetic, their files, and that the peer is the same net."""

import json
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import create_model
from alexnet_jax.training import metrics
from benchmarks.reliability import repeats, soak
from benchmarks.speed import (
    gpu,
    growth,
    jax_alexnet,
    measure,
    operators,
    roofline,
    side_by_side,
    start_up,
)
from benchmarks.speed.measure import Setting
from tests.models.test_alexnet import random_variables, torch_network

PAPER_MULTIPLY_ADDS = 724_406_816
CONV1_MULTIPLY_ADDS = 55 * 55 * 96 * 11 * 11 * 3
PAPER_PARAMETERS = 60_965_224
NARROW = Setting(batch=2, width=1 / 16)


def test_candidates_take_turns_in_changing_order():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure.alternate(candidates, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(s >= 0 for found in seconds.values() for s in found)


def test_the_ratio_is_of_each_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "torch": [2.0, 3.0, 4.0]}
    found = measure.ratio(seconds, "ours", "torch")
    assert found == {"median": 1.5, "min": 1.0, "max": 2.0}


def test_a_setting_counts_every_step_of_a_call():
    setting = Setting(batch=128, steps=4)
    assert setting.images_per_second([2.0, 0.5]) == [256.0, 1024.0]
    assert str(Setting(1024, "bfloat16", 0.5)) == "bfloat16, batch 1,024, width 0.5"


def test_the_command_is_told_without_paths(monkeypatch):
    words = ["x", "--out=/a/b", "--short", "--data=c/d", "--batch", "2", "--out", "o"]
    monkeypatch.setattr(sys, "argv", words)
    command = measure.machine()["command"]
    expected = "--out=DIR --short --data=PATH --batch 2 --out DIR"
    assert command.endswith(f" {expected}")


def test_a_result_is_three_files_and_a_printed_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", f"--out={tmp_path}"])
    figure = measure.bar_chart(
        {"ours": [3.0, 4.0], "torch": [1.0]}, title="t", unit="images/s", ceiling=5.0
    )
    table = measure.markdown_table(["a", "b"], [["1", "2"]])
    measure.write_result(tmp_path, "name", {"x": 1}, table=table, figure=figure)
    record = json.loads((tmp_path / "name.json").read_text())
    assert record["x"] == 1
    assert record["machine"]["versions"]["jax"] == jax.__version__
    assert record["machine"]["cores"] > 0
    page = (tmp_path / "name.md").read_text()
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |\n" in page
    assert str(tmp_path) not in page + json.dumps(record)
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
    assert "conv2 input gradient" in costs
    norm1 = 128 * 55 * 55 * 96 * 4
    assert costs["norm1 forward"] == roofline.Cost("norm1 forward", 0, 2 * norm1)
    assert costs["norm1 backward"].bytes == 3 * norm1
    assert costs["update"].bytes == 5 * 4 * PAPER_PARAMETERS
    fc7 = 4 * (128 * 4096 * 2 + 4096 * 4096 + 4096)
    assert costs["fc7 kernel gradient"].bytes == fc7
    narrow = jax_alexnet.network(Setting(precision="bfloat16"))
    parts = roofline.training(narrow, 128, kernel_itemsize=2)
    half = {cost.name: cost for cost in parts}
    assert half["fc7 kernel gradient"].bytes == fc7 / 2
    assert half["norm1 forward"].bytes == norm1
    assert half["update"].bytes == costs["update"].bytes  # parameters stay float32


def test_the_roofline_takes_the_slower_of_two_limits_for_each_part():
    costs = [roofline.Cost("a", 10.0, 1.0), roofline.Cost("b", 1.0, 10.0)]
    assert roofline.seconds(costs, flop_rate=10.0, bandwidth=5.0) == 1.0 + 2.0


def peer_with(table, params, lrn, dropout):
    """The peer holding our parameters; `table` is the network's with no padding."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.speed import torch_alexnet

    peer = torch_alexnet.paper_network(
        lrn, width=NARROW.width, num_classes=10, dropout=dropout
    )
    donor = torch_network(torch, table, params)
    values = donor.state_dict().values()
    peer.load_state_dict(dict(zip(peer.state_dict(), values, strict=True)))
    return torch, peer


@pytest.fixture(scope="module")
def small():
    """Our narrowed network without dropout: variables, images, labels, gradients."""
    kwargs = {"num_classes": 10, "width": NARROW.width, "init": "he"}
    model = create_model("paper", dropout=0.0, **kwargs)
    variables = random_variables(model, 224)
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


def fake_times(monkeypatch, times):
    """`measure.alternate` that calls nothing and gives these seconds."""

    def alternate(candidates, *, rounds, warmup=1):
        return {name: [times[name]] * rounds for name in candidates}

    monkeypatch.setattr(measure, "alternate", alternate)


def build_failing():
    raise RuntimeError("no compiler")


def test_the_fastest_form_is_the_peer_and_the_others_are_told(monkeypatch):
    fake_times(monkeypatch, {"slow": 4.0, "quick": 2.0, "torch": 2.0, "ours": 1.0})
    builders = {
        "slow": lambda: "slow call",
        "broken": build_failing,
        "quick": lambda: "quick call",
    }
    record, peer = side_by_side.compare(lambda: 0, builders, Setting(8), rounds=3)
    assert (record["peer"], peer) == ("quick", "quick call")
    assert record["selection_seconds"] == {
        "slow": [4.0, 4.0],
        "broken": "RuntimeError: no compiler",
        "quick": [2.0, 2.0],
    }
    assert record["images_per_second"] == {"ours": [8.0] * 3, "torch": [4.0] * 3}
    assert record["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}


def test_without_torch_ours_is_measured_alone(monkeypatch):
    fake_times(monkeypatch, {"ours": 1.0})
    record, peer = side_by_side.compare(lambda: 0, {}, Setting(8), rounds=2)
    assert peer is None
    assert "ratio" not in record
    side_by_side.add_limits(record, [roofline.Cost("a", 8.0, 0.0)], 2.0, 1.0)
    assert "ours / torch" in side_by_side.table([record])


def test_the_table_and_chart_of_a_comparison(monkeypatch, tmp_path):
    fake_times(monkeypatch, {"form": 2.0, "torch": 2.0, "ours": 1.0})
    builders = {"form": lambda: "call", "broken": build_failing}
    record, _ = side_by_side.compare(lambda: 0, builders, Setting(8), rounds=3)
    # 8 images' work: 40 operations, limits of 4 and of 2 images a second.
    costs = [roofline.Cost("a", 40.0, 0.0), roofline.Cost("b", 0.0, 20.0)]
    side_by_side.add_limits(record, costs, flop_rate=20.0, bandwidth=10.0)
    assert record["gemm_images_per_second"] == 4.0
    assert record["gemm_share"] == {"ours": 2.0, "torch": 1.0}
    assert record["roofline_images_per_second"] == 2.0
    record["memory"] = {"ours": 2.5e9}
    side_by_side._write(tmp_path, "train_step", [record])
    page = (tmp_path / "train_step.md").read_text()
    assert "| float32, batch 8 | ours | 8.0 (8.0 to 8.0) | 200% | 400% |" in page
    assert "**2.00** (2.00 to 2.00)" in page
    assert "| broken | RuntimeError: no compiler |" in page
    assert "| ours | 2.50 |" in page
    assert (tmp_path / "train_step.png").stat().st_size > 1000


def test_settings_and_forms():
    on_gpu = side_by_side.settings(on_gpu=True, short=False)
    assert [(s.precision, s.batch) for s in on_gpu] == [
        (precision, batch)
        for precision in ("bfloat16", "float32", "tensorfloat32")
        for batch in (128, 1024)
    ]
    assert side_by_side.settings(False, False) == [Setting(128, "float32")]
    assert len(side_by_side.settings(True, True)) == 1
    pytest.importorskip("torch", reason="torch is not installed")
    forms = side_by_side.forms(on_gpu=False, short=False)
    assert len({form.name for form in forms}) == 12
    tried = {form.name: [float(i)] for i, form in enumerate(reversed(forms))}
    tried[forms[-1].name] = "RuntimeError"
    assert side_by_side.fastest(forms, tried) == [forms[-2], forms[-3]]


def test_a_training_call_trains():
    call = jax_alexnet.Trainer(NARROW)
    assert call.memory_bytes > 2 * 224 * 224 * 3
    losses = [call() for _ in range(3)]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3


def test_operators_are_the_parts_of_a_step():
    model = jax_alexnet.network(Setting())
    layers = {layer.name: layer for layer in operators.convolutions(model)}
    assert layers["conv1"].padding == ((0, 3), (0, 3))
    assert layers["conv2"].shape == (27, 27, 96)
    assert layers["conv4"].kernel == (3, 3, 192, 384)
    assert [layer.groups for layer in layers.values()] == [1, 2, 1, 2, 2]
    names = {cost.name for cost in roofline.training(model, 128)}
    found = operators.candidates(model, Setting(), "cpu")  # nothing is built yet
    assert set(found) == names
    assert {"ours", "plain"} <= set(found["norm2 backward"])


def test_operators_are_measured_and_put_into_a_table(tmp_path):
    model = jax_alexnet.network(NARROW)
    costs = [
        cost
        for cost in roofline.training(model, NARROW.batch)
        if cost.name in ("norm1 backward", "conv5 kernel gradient")
    ]
    every = operators.candidates(model, NARROW, "cpu")
    seconds = operators.measured({cost.name: every[cost.name] for cost in costs}, 1)
    found = operators.rows(costs, seconds, 1e9, 1e9)
    assert [row["operator"] for row in found] == [cost.name for cost in costs]
    assert found[0]["limit_seconds"] == costs[0].bytes / 1e9
    assert "| norm1 backward | 0.00 GB |" in operators.table(found, 1e9, 1e9)
    measure.write_result(
        tmp_path, "operators", {}, table="", figure=operators.chart(found, "title")
    )


def test_growth_over_batch_and_width(tmp_path):
    points = growth.points(on_gpu=False, short=False, precision="float32")
    assert [s.batch for s in points["batch"]] == [8, 16, 32, 64, 128, 256]
    assert [s.width for s in points["width"]] == [0.25, 0.5, 0.75, 1.0]
    record = {
        "seconds": {"ours": [1.0], "torch": [2.0]},
        "images_per_second": {"ours": [8.0], "torch": [4.0]},
        "roofline_images_per_second": 16.0,
        "ratio": {"median": 2.0},
    }
    found = {
        "batch": [{**record, "batch": 8, "width": 1.0}],
        "width": [{**record, "batch": 8, "width": 0.5}],
    }
    assert "| 0.5 | 8.0 | 4.0 | 16.0 | 50% | 2.00 |" in growth.table(found)
    figure = growth.chart(found, "title")
    measure.write_result(tmp_path, "growth", {}, table="", figure=figure)


def test_start_up(tmp_path):
    assert len(start_up.seconds_of("import json", 2)) == 2
    assert start_up.seconds_of("import no_such_module", 2) == []
    step = {"trace": 0.5, "compile": 1.5, "first step": 3.0}
    record = {
        "batch": 128,
        "import_seconds": {"import alexnet_jax": [0.5]},
        "first_step_seconds": {"cold": [step], "from the cache": [step]},
        "two_columns_bytes": 1.25e9,
    }
    table = start_up.table(record)
    assert "| cold | 0.50 | 1.50 | **2.00** (2.00 to 2.00) | 3.00 |" in table
    assert "needs 1.25 GB on each" in table
    figure = start_up.chart(record)
    measure.write_result(tmp_path, "start_up", {}, table=table, figure=figure)


def test_the_gpu_plan_keeps_to_its_time(tmp_path):
    now, started = [0.0], []
    lasting = {"quick": (0, 10.0), "broken": (3, 20.0), "endless": (None, 50.0)}

    def start(command, seconds):
        name = command[2].removeprefix("benchmarks.")
        status, takes = lasting[name]
        started.append((command[3:], seconds))
        now[0] += min(takes, seconds)
        return status

    plan = [
        gpu.Section("quick", ("--short",), 60.0),
        gpu.Section("broken", (), 60.0),
        gpu.Section("endless", (), 40.0),
        gpu.Section("quick", (), 60.0),
        gpu.Section("quick", ("--short",), 60.0),
    ]
    found = gpu.run(plan, tmp_path, budget=89.0, start=start, clock=lambda: now[0])
    results = [(outcome.result, outcome.seconds) for outcome in found]
    assert results[:3] == [("done", 10.0), ("failed (3)", 20.0), ("stopped", 40.0)]
    assert results[3:] == [("done", 9.0), ("left out", 0.0)]
    assert started[0] == ([f"--out={tmp_path / 'quick-short'}", "--short"], 60.0)
    assert started[3][1] == 9.0  # what is left, less what the end takes
    gpu.report(found, tmp_path)
    assert "| broken | failed (3) | 20 |" in (tmp_path / "gpu.md").read_text()


def test_the_gpu_plan_fits_the_command_lines(monkeypatch, tmp_path):
    parsers = {
        "train_step": lambda: side_by_side.options(""),
        "inference": lambda: side_by_side.options(""),
        "operators": operators.options,
        "growth": growth.options,
        "start_up": lambda: measure.command_line("").parse_args(),
        "repeats": lambda: measure.command_line("").parse_args(),
    }
    for short in (True, False):
        plan = gpu.sections(short)
        assert {section.module for section in plan} == set(parsers)
        for section in plan:
            words = ["x", f"--out={tmp_path}", *section.arguments]
            monkeypatch.setattr(sys, "argv", words)
            parsers[section.module]()


def test_a_process_that_takes_too_long_is_stopped():
    assert gpu.start_process([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    code = "import time; time.sleep(60)"
    assert gpu.start_process([sys.executable, "-c", code], 0.2) is None


def test_without_a_gpu_the_gpu_benchmarks_say_so():
    with pytest.raises(SystemExit, match="backend here is 'cpu', expected a GPU"):
        gpu.require_gpu("cpu")


def test_what_a_process_holds_and_how_it_grows(tmp_path):
    before = soak.sample(os.getpid(), time.monotonic())
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    held = np.ones(2**23)  # 64 MiB
    with open(tmp_path / "file", "wb"):
        after = soak.sample(os.getpid(), time.monotonic())
    done.set()
    thread.join()
    assert after.open_files == before.open_files + 1
    assert after.threads == before.threads + 1
    assert after.resident_mib - before.resident_mib > held.nbytes / 2**20 * 0.9
    # 2 MiB in half a minute; the first ten seconds of a minute are not counted.
    samples = [
        soak.Sample(s, 999 if s < 10 else 100 + s / 15, 7, 9 if s < 60 else 10)
        for s in range(0, 61, 5)
    ]
    found = soak.growth(samples)
    assert found["mib_an_hour"] == pytest.approx(240)
    assert found["resident_mib"]["most"] == pytest.approx(104)
    assert found["open_files"] == {"least": 7, "most": 7}
    assert found["threads"] == {"least": 9, "most": 10}


def test_a_soak_is_over_when_a_process_ends_by_itself():
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    with pytest.raises(RuntimeError, match="training ended after .* with status 3"):
        soak.watch({"training": ended}, minutes=1, every=1)


def test_runs_that_do_not_repeat_are_told():
    runs = [{"a": np.ones(4), "b": np.full(2, 2.0)} for _ in range(3)]
    assert repeats.compare(runs) == {"equal": True, "difference": 0.0}
    runs[2]["b"] = runs[2]["b"] + [0.0, 4e-7]
    found = repeats.compare(runs)
    assert not found["equal"]
    assert found["difference"] == pytest.approx(4e-7 / np.sqrt(8))
    with_flags = [flags for _, flags in repeats.plan(on_gpu=True, short=False)]
    assert with_flags.count(repeats.DETERMINISTIC) == len(with_flags) / 2
