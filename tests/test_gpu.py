"""tests/gpu.py on the CPU, and the scripts' way to a GPU as far as a CPU can show it."""

import contextlib
import importlib
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch

import common
from tests import gpu
from tests.conftest import BF16, ROOT, TRAININGS, write_idx

LONGER = [pytest.param(name, marks=pytest.mark.full) for name in gpu.CASES if name not in ("gan-banerjee", "cvaegan")]


def compare(name: str) -> str:
    script, options = gpu.CASES[name]
    return gpu.first_difference(script, f"{options} --device cpu --batch-size 8".split())


@pytest.mark.parametrize("name", ["gan-banerjee", "cvaegan", *LONGER])
def test_two_runs_are_equal(name):
    assert compare(name) == ""


def test_what_a_resume_loses_is_named(monkeypatch):
    restore = common.restore
    monkeypatch.setattr(common, "restore", lambda parts, states: None if "adam" in parts else restore(parts, states))
    assert compare("vae-guo").startswith("/networks/encoder/")


def test_a_difference_is_the_exit_status_and_what_has_no_data_is_left_out(tmp_path, monkeypatch, capsys):
    found = iter(["/networks/generator/0.weight", ""])
    monkeypatch.setattr(gpu, "first_difference", lambda *parts: next(found))
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--device", "cpu", "--data-dir", str(write_idx(tmp_path)), "dcgan-guo-anime", "gan-guo"])
    out, err = capsys.readouterr()
    assert "dcgan-guo-anime      left out: " in out
    assert "differs first in /networks/generator/0.weight" in out and "bf16" in out and "equal" in out
    assert err == "not equal: gan-guo in fp32\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_captured_steps_are_eager_steps():
    command = [sys.executable, "tests/gpu.py", "gan-banerjee", "dcgan-guo-full-ema", "cvaegan"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count("equal") == 6, told.stdout + told.stderr


def test_a_resumed_optimizer_runs_as_its_own_device_wants():
    network = torch.nn.Linear(2, 2)
    saved = common.adam(network.parameters(), 0.1)
    common.descend(network(torch.ones(1, 2)).sum(), saved)
    own = torch.optim.Adam(network.parameters(), 0.2, capturable=True, fused=False)
    common.restore({"adam": own}, {"adam": saved.state_dict()})
    group = own.param_groups[0]
    assert (group["capturable"], group["fused"], group["lr"]) == (True, False, 0.2)  # as was asked for
    assert own.state_dict()["state"][0]["step"] == 1


def test_a_resumed_optimizer_has_its_parameters_layout_and_shapes():
    """A run of the CPU, in channels-last, goes on on a device without: the fused kernel walks memory."""
    saved = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = common.adam(saved.parameters(), 0.1)
    common.descend(saved(torch.rand(1, 3, 4, 4)).square().sum(), optimizer)
    expected = optimizer.state_dict()["state"][0]["exp_avg"]
    own = torch.nn.Conv2d(3, 4, 2)
    resumed = common.adam(own.parameters(), 0.1)
    common.restore({"adam": resumed}, {"adam": optimizer.state_dict()})
    moment = resumed.state[own.weight]["exp_avg"]
    assert moment.stride() == own.weight.stride() != expected.stride() and torch.equal(moment, expected)
    other = common.adam(torch.nn.Conv2d(3, 4, 3).parameters(), 0.1)
    with pytest.raises(common.UserError, match="does not fit"):
        common.restore({"adam": other}, {"adam": optimizer.state_dict()})


@pytest.mark.parametrize("name", TRAININGS)
def test_networks_are_channels_last_on_the_cpu_and_on_no_device_that_is_unknown(name):
    """The device "meta" stands for Apple's mps, which no test machine has: neither is the CPU or CUDA."""
    module, kernels = importlib.import_module(name.split("-")[0]), {}
    for device in ("cpu", "meta"):
        for key, network in module.build(module.parse_args(TRAININGS[name].split())).items():
            for part, weight in common.to_device(network, torch.device(device), BF16).named_parameters():
                if weight.dim() == 4 and min(weight.shape[1:]) > 1:
                    kernels[device, key, part] = weight
    for (device, *_), weight in kernels.items():
        assert weight.is_contiguous(memory_format=torch.channels_last) == (device == "cpu")
        assert weight.is_contiguous() == (device == "meta")


def test_a_graph_needs_cuda_and_one_process_and_can_be_switched_off(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(common, "GraphedStep", lambda step: "graph")
    assert common.capture("step", cuda) == "graph" and common.capture("step", cpu) == "step"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.capture("step", cuda) == "step"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("CUDA_GRAPH", "0")
    assert common.capture("step", cuda) == "step"


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(common.UserError, match="2 processes, 1 GPUs: take --nproc-per-node=1, or --device cpu"):
        common.choose_device(types.SimpleNamespace(device="cuda"))


def test_a_card_that_torch_has_no_kernels_for_is_a_line(monkeypatch):
    def zeros(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(common.UserError, match="no kernel image is available .*: take --device cpu"):
        common.choose_device(types.SimpleNamespace(device="cpu"))


@pytest.mark.parametrize("error", [None, RuntimeError("operation not permitted"), torch.OutOfMemoryError()])
def test_a_step_is_captured_at_the_fourth_call_or_ends_with_a_line(error, monkeypatch):
    """Of torch.cuda no more than the calls of GraphedStep: a replay does nothing, a capture may fail."""

    @contextlib.contextmanager
    def capture(graph, stream):
        try:
            yield
            if error:
                raise error
        finally:
            if error:
                raise RuntimeError("the end of a capture that failed")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    weight = torch.ones(1, requires_grad=True)
    step = mock.Mock(side_effect=lambda images: {"loss": (images * weight).sum()})
    graphed = common.GraphedStep(step)
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else common.UserError
    with pytest.raises(kind, match="not permitted.*CUDA_GRAPH=0|^$") if error else contextlib.nullcontext():
        for i in range(6):
            losses = graphed(torch.full((2,), float(i)))
            assert not losses["loss"].requires_grad
        assert torch.equal(graphed.batch[0], torch.full((2,), 5.0))  # the graph's own, filled anew
    assert step.call_count == 4
