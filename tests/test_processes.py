"""Several processes, as torchrun starts them, over gloo: one writes, all agree, a lost one ends all."""

import socket
from pathlib import Path

import pytest
import torch

import common
import gan
from tests.conftest import Script, write_idx


def start(script: str | Path, folder: Path, *options) -> list[Script]:
    """The two processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    return [Script(script, *options, cwd=folder, environment=place | rank) for rank in ranks]


def test_two_processes_train_as_one_does_and_one_of_them_writes(tmp_path, monkeypatch):
    """Losses of an epoch agree to floating-point noise: same batches, same noise, averaged gradients."""
    write_idx(tmp_path / "tiny", 300)
    options = ["--data-dir", "tiny", "--batch-size", 50, "--precision", "fp32", "--out-dir"]
    first, second = start("gan", tmp_path, *options, "two", "--epochs", 2)
    assert first.finish() == second.finish() == 0, first.err + second.err
    assert "2 processes" in first.out and second.out == second.err == ""
    assert len((tmp_path / "two/log.csv").read_text().splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    gan.main([*map(str, options), "one", "--epochs", "1"])
    gan.main(["--out-dir", "two", "--resume", "--epochs", "3"])  # by another number of processes
    one, two = (common.load_checkpoint(tmp_path / folder)["history"] for folder in ("one", "two"))
    assert len(two) == common.load_checkpoint(tmp_path / "two")["epoch"] == 3
    for name in ("discriminator loss [nats]", "generator loss [nats]"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused_once(tmp_path):
    write_idx(tmp_path / "tiny", 300)
    first, second = start("gan", tmp_path, "--data-dir", "tiny", "--batch-size", 51)
    assert first.finish() == second.finish() == 2
    assert "can't be shared evenly by 2 processes" in first.err and first.err.count("\n") == 1


def test_a_lost_process_ends_all_with_a_line(tmp_path):
    write_idx(tmp_path / "tiny", 300)
    options = ["--data-dir", "tiny", "--batch-size", 50, "--out-dir", "run", "--epochs", 5000]
    first, second = start("gan", tmp_path, *options)
    first.wait_for("3/5000")
    second.process.kill()
    assert first.finish() == 2 and first.err.startswith("gan.py: error: lost another process"), first.err
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


def test_a_loss_that_is_not_finite_in_one_process_ends_all_with_its_name(tmp_path):
    write_idx(tmp_path / "tiny", 300)
    (tmp_path / "unlucky.py").write_text(UNLUCKY)
    for run in start(tmp_path / "unlucky", tmp_path, "--data-dir", "tiny", "--batch-size", 50, "--out-dir", "run"):
        assert run.finish() == 2, run.err
        assert "loss [nats] is nan in epoch 1, step 1: no checkpoint was written" in run.err, run.err


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
