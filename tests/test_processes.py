"""Several processes, as torchrun starts them, over gloo: one writes, all agree, a lost one ends all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from tests.conftest import ONE_OF_EACH, ROOT, TRAININGS, Script, make_folder, tensors_of, write_idx


def test_processes_share_the_images_of_a_batch_and_draw_noise_of_their_own(monkeypatch):
    data = common.Data(torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1), None)

    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        common.seed_everything(5)
        images = torch.stack([images for images, _ in common.batches(data, 4)])  # (3 batches, N, 1, 1, 1)
        return images, torch.randn(4)

    whole, noise = drawn()
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(drawn())
    assert torch.equal(whole, torch.cat([images for images, _ in parts], dim=1))
    assert torch.equal(noise, parts[0][1]) and not torch.equal(noise, parts[1][1])
    assert torch.equal(parts[1][1], drawn()[1])  # each time the same


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


@pytest.mark.full
@pytest.mark.parametrize("name", ["gan-guo", "vae-guo"])
def test_two_processes_without_noise_train_as_one_does(name, folder):
    """Those that have neither dropout nor batch norm, which on a CPU sees each process's share alone."""
    module = name.split("-")[0]
    silence = "torch.randn = lambda *shape, generator=None, **kind: torch.zeros(*shape, **kind)"
    (folder / "quiet.py").write_text(f"import torch, {module}\n{silence}\n{module}.main()\n")
    options = [*TRAININGS[name].split(), "--precision", "fp32", "--epochs", 2, "--out-dir"]
    for run in (
        *start(folder / "quiet", folder, *options, "two"),
        Script(folder / "quiet", *options, "one", cwd=folder),
    ):
        assert run.finish() == 0, run.err
    one, two = (common.load_checkpoint(run) for run in ("one", "two"))
    names = [name for name in one["history"][0] if name.endswith("[nats]")]
    for row, other in zip(one["history"], two["history"], strict=True):
        assert [row[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-3)
    moments = [tensors_of(checkpoint["optimizers"]) for checkpoint in (one, two)]  # of the average of all gradients
    torch.testing.assert_close(*moments, rtol=0.01, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_two_processes_train_and_one_of_them_writes(name, folder, trainings):
    first, second = start(name.split("-")[0], folder, *TRAININGS[name].split(), "--out-dir", "two", "--epochs", 2)
    assert first.finish() == second.finish() == 0, first.err + second.err
    assert "processes 2" in first.out and second.out == second.err == ""
    assert len(Path("two/log.csv").read_text().splitlines()) == 3 and Path("two/progress.gif").exists()
    trainings.main(name, "--out-dir", folder / "two", "--resume", "--epochs", 3)  # by one process
    assert common.load_checkpoint("two")["epoch"] == 3


@pytest.mark.full
def test_torchrun_starts_them(folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "vae.py"), *TRAININGS["vae-guo"].split(), "--epochs", "2", "--out-dir", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("processes 2") == 1, done.stderr


@pytest.mark.full
def test_a_lost_process_ends_all_and_leaves_a_checkpoint(folder):
    first, second = start("gan", folder, *TRAININGS["gan-guo"].split(), "--out-dir", "run", "--epochs", 5000)
    first.wait_for("3/5000")
    second.process.kill()
    assert first.finish() not in (0, 130) and "Connection" in first.err, first.err
    assert common.load_checkpoint("run")["epoch"] >= 1


@pytest.mark.full
def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_its_name(folder):
    unlucky = "import common, gan\nloss = gan.generator_loss\n"
    unlucky += 'gan.generator_loss = lambda logits: loss(logits) * float("nan") ** common.rank()\ngan.main()\n'
    (folder / "unlucky.py").write_text(unlucky)
    for run in start(folder / "unlucky", folder, *TRAININGS["gan-guo"].split(), "--out-dir", "run"):
        assert run.finish() == 2, run.err
        assert "loss [nats] is nan in epoch 1: no checkpoint was written" in run.err, run.err
