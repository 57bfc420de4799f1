"""tests/gpu.py on the CPU: a run that was stopped and resumed is the run that was not, and a difference is named."""

import subprocess
import sys

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
