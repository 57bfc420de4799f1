"""Several processes, as torchrun starts them, over gloo: one writes, all agree, a lost one ends all."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import gan
from tests.conftest import ROOT, write_idx


def start(script: str | Path, folder: Path, *options, count: int = 2) -> list[subprocess.Popen]:
    """The processes that torchrun would start, without its own seconds of start-up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(count):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        found.append(
            subprocess.Popen(
                [sys.executable, "-u", str(ROOT / f"{script}.py"), *map(str, options)],
                cwd=folder,
                env=os.environ | {name: str(value) for name, value in place.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    output = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, output)]


def test_two_processes_train_as_one_does_and_one_of_them_writes(tmp_path):
    """Losses of an epoch agree to floating-point noise: same batches, same noise, averaged gradients."""
    write_idx(tmp_path / "tiny", 300)
    options = ["--data-dir", "tiny", "--batch-size", 50, "--precision", "fp32", "--out-dir"]
    first, second = finish(start("gan", tmp_path, *options, "two", "--epochs", 2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert re.search(r"2 processes", first[1]) and second[1] == second[2] == ""
    assert len((tmp_path / "two/log.csv").read_text().splitlines()) == 3
    resumed = ["--out-dir", "two", "--resume", "--epochs", 3]  # by another number of processes
    for words in ([*options, "one", "--epochs", 1], resumed):
        ((status, _, error),) = finish(start("gan", tmp_path, *words, count=1))
        assert status == 0, error
    one, two = (common.load_checkpoint(tmp_path / folder)["history"] for folder in ("one", "two"))
    assert len(two) == common.load_checkpoint(tmp_path / "two")["epoch"] == 3
    for name in ("discriminator loss [nats]", "generator loss [nats]"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused_once(tmp_path):
    write_idx(tmp_path / "tiny", 300)
    done = finish(start("gan", tmp_path, "--data-dir", "tiny", "--batch-size", 51))
    assert all(status == 2 for status, _, _ in done)
    assert "can't be shared evenly by 2 processes" in done[0][2] and done[0][2].count("\n") == 1


def test_a_lost_process_ends_all_with_a_line(tmp_path):
    write_idx(tmp_path / "tiny", 300)
    options = ["--data-dir", "tiny", "--batch-size", 50, "--out-dir", "run", "--epochs", 5000]
    processes = start("gan", tmp_path, *options)
    for line in processes[0].stdout:
        if line.startswith("epoch") and "3/5000" in line:
            processes[1].send_signal(signal.SIGKILL)
            break
    (status, _, error), _ = finish(processes)
    assert status == 2 and error.startswith("gan.py: error: lost another process"), error
    assert common.load_checkpoint(tmp_path / "run")["epoch"] >= 1


UNLUCKY = """
import common, gan

make_step = gan.make_step

def make_unlucky_step(*parts):
    step = make_step(*parts)
    return lambda *batch: {name: loss * float("nan") ** common.rank() for name, loss in step(*batch).items()}

gan.make_step = make_unlucky_step
gan.main()
"""


def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_its_name(tmp_path, monkeypatch):
    write_idx(tmp_path / "tiny", 300)
    (tmp_path / "unlucky.py").write_text(UNLUCKY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = finish(start(tmp_path / "unlucky", tmp_path, "--data-dir", "tiny", "--batch-size", 50, "--out-dir", "run"))
    for status, _, error in done:
        assert status == 2 and "loss [nats] is nan in epoch 1, step 1: no checkpoint was written" in error, error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("preset", ["guo", "banerjee"])
def test_a_captured_step_is_the_eager_step(preset):
    """Twenty steps by CUDA graph and twenty one kernel at a time, from the same weights, batches and seeds."""
    device = torch.device("cuda")
    compute, results = common.Compute(device, "fp32"), []
    data = common.draw_digits()
    for wrap in (lambda step: step, common.GraphedStep):
        args = gan.parse_args(["--preset", preset])
        common.seed_everything(0)
        networks = {name: network.to(device) for name, network in gan.build(args).items()}
        step = wrap(gan.make_step(args, compute, networks, gan.make_optimizers(args, networks)))
        losses = []
        for _, (images, labels) in zip(range(20), common.batches(data, args.batch_size, device)):
            losses.append({name: float(value) for name, value in step(images, labels).items()})
        results.append(losses)
    assert all(one == pytest.approx(other, rel=1e-3) for one, other in zip(*results))
