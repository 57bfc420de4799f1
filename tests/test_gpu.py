"""tests/gpu.py on the CPU: a run that was stopped and resumed is the run that was not, and a difference is named."""

import contextlib
import subprocess
import sys
import types

import pytest
import torch

import common
from tests import gpu
from tests.conftest import ROOT


def compare(name: str, precision: str = "fp32") -> str:
    script, options = gpu.CASES[name]
    options = f"{options} --device cpu --batch-size 8 --precision {precision}"
    return gpu.first_difference(script, options.split())


@pytest.mark.parametrize("name, precision", [("gan-banerjee", "bf16"), ("cvaegan", "fp32")])
def test_two_runs_are_equal(name, precision):
    assert compare(name, precision) == ""


@pytest.mark.full
@pytest.mark.parametrize("name", gpu.CASES)
def test_two_runs_of_any_training_are_equal(name):
    assert compare(name) == ""


@pytest.mark.parametrize("lost", ["encoder", "adam"])
def test_what_a_resume_loses_is_named(lost, monkeypatch):
    restore = common.restore
    monkeypatch.setattr(common, "restore", lambda parts, states: None if lost in parts else restore(parts, states))
    assert compare("vae-guo").startswith("/networks/encoder/")


def test_a_difference_is_the_exit_status(monkeypatch, capsys):
    found = iter(["/networks/generator/0.weight", ""])
    monkeypatch.setattr(gpu, "first_difference", lambda *parts: next(found))
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--device", "cpu", "gan-guo"])
    out, err = capsys.readouterr()
    assert "differs first in /networks/generator/0.weight" in out and "bf16" in out and "equal" in out
    assert err == "not equal: gan-guo in fp32\n"


def test_a_training_without_its_data_is_left_out(tmp_path, capsys):
    (tmp_path / "anime").mkdir()
    gpu.main(["--device", "cpu", "--data-dir", str(tmp_path), "dcgan-guo-anime"])
    assert capsys.readouterr().out.startswith("dcgan-guo-anime      left out: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_captured_steps_are_eager_steps():
    command = [sys.executable, "tests/gpu.py", "gan-banerjee", "dcgan-guo-full-ema", "cvaegan"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count("equal") == 6, told.stdout + told.stderr


# ----------------------------------------------------------------------- the GPU path, as far as a CPU can show it


def test_a_resumed_optimizer_runs_as_its_own_device_wants():
    network = torch.nn.Linear(2, 2)
    saved = common.adam(network.parameters(), 0.1)
    common.descend(network(torch.ones(1, 2)).sum(), saved)
    state = saved.state_dict()
    own = torch.optim.Adam(network.parameters(), 0.1, capturable=True, fused=False)
    common.restore({"adam": own}, {"adam": state})
    assert (own.param_groups[0]["capturable"], own.param_groups[0]["fused"]) == (True, False)
    assert own.param_groups[0]["lr"] == 0.1 and own.state_dict()["state"][0]["step"] == 1
    assert (state["param_groups"][0]["capturable"], state["param_groups"][0]["fused"]) == (False, True)


def test_the_graph_can_be_switched_off_and_needs_one_process(monkeypatch, capsys):
    def step():
        pass

    cuda = torch.device("cuda")
    assert common.capture(step, torch.device("cpu")) is step
    monkeypatch.setenv("CUDA_GRAPH", "0")
    assert common.capture(step, cuda) is step
    monkeypatch.delenv("CUDA_GRAPH")
    monkeypatch.setattr(common, "processes", lambda: 2)
    monkeypatch.setattr(common, "rank", lambda: 0)
    assert common.capture(step, cuda) is step and "no CUDA graph" in capsys.readouterr().out


class FakeStream:
    def wait_stream(self, other):
        pass


def fake_cuda(monkeypatch, error: Exception | None = None) -> None:
    """Stand-ins for what GraphedStep calls: a replay is counted, a capture may fail."""

    @contextlib.contextmanager
    def capture(graph, stream=None):
        assert isinstance(stream, FakeStream)  # the one of the steps before
        yield
        if error:
            raise error

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", capture)


def test_a_step_is_captured_at_the_fourth_call_and_its_results_are_detached(monkeypatch):
    fake_cuda(monkeypatch)
    weight, calls = torch.ones(1, requires_grad=True), []

    def step(images, labels=None):
        calls.append(images)
        return {"loss": (images * weight).sum()}

    graphed = common.GraphedStep(step)
    for i in range(6):
        losses = graphed(torch.full((2,), float(i)), None)
        assert not losses["loss"].requires_grad
    assert len(calls) == 4 and graphed.graph is not None and torch.equal(graphed.batch[0], torch.full((2,), 5.0))


def test_a_step_that_cannot_be_captured_ends_with_a_line(monkeypatch):
    for error, told in ((RuntimeError("operation not permitted"), common.UserError), (torch.OutOfMemoryError(), None)):
        fake_cuda(monkeypatch, error)
        graphed = common.GraphedStep(lambda images: {"loss": images.sum()})
        with pytest.raises(told or torch.OutOfMemoryError, match="CUDA_GRAPH=0" if told else None):
            for _ in range(4):
                graphed(torch.ones(2))


def test_batch_norm_is_shared_by_the_networks_device_and_too_many_processes_are_told(monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: 2)
    monkeypatch.setattr(common, "rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert common.distribute(network) is network  # --device cpu on a machine with CUDA
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(common.UserError, match="2 processes, 1 GPUs: take --nproc-per-node=1, or --device cpu"):
        common.choose_device(types.SimpleNamespace(device="cuda"))


def test_only_pinned_images_are_copied_without_waiting(monkeypatch):
    copies, to = [], torch.Tensor.to

    def remember(tensor, *args, **kwargs):
        if "non_blocking" in kwargs:
            copies.append((kwargs["non_blocking"], tensor.is_pinned()))
        return to(tensor, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", remember)
    data = common.Data(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), None)
    for device in ("mps", "cpu"):
        list(common.batches(data, 4, device))
    assert copies == [(False, False)] * 4


def test_the_others_wait_for_a_day_while_the_first_decodes(monkeypatch):
    told = {}
    monkeypatch.setattr(common, "processes", lambda: 2)
    monkeypatch.setattr(common, "rank", lambda: 0)
    monkeypatch.setattr(common.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(common.dist, "init_process_group", lambda backend, **how: told.update(how, backend=backend))
    common.choose_device(types.SimpleNamespace(device="cpu"))
    assert told["backend"] == "gloo" and told["timeout"].days == 1 and told["device_id"] is None
