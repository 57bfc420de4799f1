"""Several processes, as torchrun starts them, over gloo: one writes, all agree, a lost one ends all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from tests.conftest import ROOT, TRAININGS, Script, make_folder, write_idx


def test_processes_share_a_batch_and_all_that_is_drawn(monkeypatch):
    data = common.Data(torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1), None)
    dropout = common.Dropout2d(0.5)

    def drawn(count: int) -> list[torch.Tensor]:
        common.seed_everything(5)
        batches = [images for images, _ in common.batches(data, 4)]
        noise = [common.randn(count, 3, device="cpu"), common.rand(count, 3, device="cpu")]
        return [*batches, *noise, dropout(torch.ones(count, 16, 2, 2))]

    whole = drawn(4)
    assert all(torch.equal(one, other) for one, other in zip(whole, drawn(4)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(drawn(2))
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat([first, second])) and not torch.equal(first, second)


def test_dropout_of_channels_is_torchs():
    values = torch.rand(200, 50, 3, 3) + 1
    dropped = common.Dropout2d(0.25)(values)
    kept = dropped.flatten(2).all(2)
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(dropped, torch.where(kept[:, :, None, None], values / 0.75, torch.zeros(())))
    assert torch.equal(common.Dropout2d(0.25).eval()(values), values)


def start(script: str | Path, folder: Path, *options) -> list[Script]:
    """The two processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    return [Script(script, *options, cwd=folder, environment=place | rank) for rank in ranks]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder with data."""
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "tiny")
    make_folder(tmp_path / "faces")
    return tmp_path


def assert_same_losses(one: str, other: str) -> None:
    """Losses agree to floating-point noise: same batches, same noise, averaged gradients."""
    first, second = (common.load_checkpoint(run)["history"] for run in (one, other))
    assert len(first) == len(second) and first[0].keys() == second[0].keys()
    names = [name for name in first[0] if name.endswith("[nats]")]
    for row, other_row in zip(first, second):
        assert [row[name] for name in names] == pytest.approx([other_row[name] for name in names], rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gan-guo", "dcgan-banerjee", "vae-banerjee-conv"])
def test_two_processes_train_as_one_does_and_one_of_them_writes(name, folder, trainings):
    """Those without batch norm, which on a CPU takes each process's share alone, or dropout of a joint batch."""
    options = [*TRAININGS[name].split(), "--precision", "fp32"]
    first, second = start(name.split("-")[0], folder, *options, "--out-dir", "two", "--epochs", 2)
    assert first.finish() == second.finish() == 0, first.err + second.err
    assert "2 processes" in first.out and second.out == second.err == ""
    assert len(Path("two/log.csv").read_text().splitlines()) == 3
    trainings.train(name, folder / "one", "--precision", "fp32", "--data-dir", folder / "tiny")
    assert_same_losses("one", "two")
    for run in ("one", "two"):  # by another number of processes
        trainings.main(name, "--out-dir", folder / run, "--resume", "--epochs", 3)
    assert_same_losses("one", "two")


@pytest.mark.full
@pytest.mark.parametrize("name", ["dcgan-faces", "cvaegan-guo"])
def test_two_processes_train_with_batch_norm_an_average_and_a_folder(name, folder):
    first, second = start(name.split("-")[0], folder, *TRAININGS[name].split(), "--out-dir", "two", "--epochs", 2)
    assert first.finish() == second.finish() == 0, first.err + second.err
    assert common.load_checkpoint("two")["epoch"] == 2 and second.out == second.err == ""
    assert Path("two/progress.gif").exists()


@pytest.mark.full
def test_torchrun_starts_them(folder, trainings):
    options = [*TRAININGS["vae-guo"].split(), "--precision", "fp32"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "vae.py"), *options, "--epochs", "2", "--out-dir", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trainings.train("vae-guo", folder / "one", "--precision", "fp32", "--data-dir", folder / "tiny")
    assert_same_losses("one", "two")


@pytest.mark.full
def test_a_batch_that_cannot_be_shared_is_refused_once(folder):
    for run in start("gan", folder, "--data-dir", "tiny", "--batch-size", 21):
        assert run.finish() == 2
        assert "can't be shared evenly by 2 processes" in run.err and run.err.count("\n") == 1, run.err


@pytest.mark.full
def test_a_lost_process_ends_all_and_leaves_a_checkpoint(folder, trainings):
    options = [*TRAININGS["gan-guo"].split(), "--out-dir", "run"]
    first, second = start("gan", folder, *options, "--epochs", 5000)
    first.wait_for("3/5000")
    second.process.kill()
    assert first.finish() not in (0, 130) and "Connection" in first.err, first.err
    epoch = common.load_checkpoint("run")["epoch"]
    assert epoch >= 1
    trainings.main("gan-guo", "--out-dir", folder / "run", "--resume", "--epochs", epoch + 1)


UNLUCKY = """
import common, gan

make_step = gan.make_step

def make_unlucky_step(*parts):
    step = make_step(*parts)
    return lambda *batch: {name: loss * float("nan") ** common.rank() for name, loss in step(*batch).items()}

gan.make_step = make_unlucky_step
gan.main()
"""


@pytest.mark.full
def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_its_name(folder):
    (folder / "unlucky.py").write_text(UNLUCKY)
    for run in start(folder / "unlucky", folder, *TRAININGS["gan-guo"].split(), "--out-dir", "run"):
        assert run.finish() == 2, run.err
        assert "loss [nats] is nan in epoch 1, step 1: no checkpoint was written" in run.err, run.err
