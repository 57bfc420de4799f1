"""The promises that each script keeps: the same bits whatever stops a run, whole files, one line, nothing lost."""

import contextlib
import gc
import importlib
import itertools
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import dcgan
import gan
from tests.conftest import ONE_OF_EACH, SCRIPTS, TRAININGS, Script, assert_same_run, make_folder, write_idx
from tests.test_common import FakeTraining

# ------------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("name", TRAININGS)
def test_stopped_and_resumed_is_the_unbroken_run(name, trainings, tmp_path):
    """Every training: half of it, then the rest; and a sample of it."""
    unbroken, run = trainings.finished(name), tmp_path / "run"
    trainings.train(name, run, "--epochs", 1)
    assert (run / "progress.gif").exists() and (run / "progress.png").exists()  # for the epochs so far
    trainings.main(name, "--out-dir", run, "--resume", "--epochs", 2)
    assert_same_run(unbroken, run)
    trainings.main(name, "--out-dir", run, "--sample", 12, "--to", tmp_path / "grid.png")
    side = 34 if name == "dcgan-faces" else 30
    assert Image.open(tmp_path / "grid.png").size == (4 * side + 2, 3 * side + 2)


@pytest.mark.parametrize("name", ["gan-guo", "dcgan-guo", "vae-guo", "cvaegan-guo"])
def test_another_seed_is_another_run_and_another_sample(name, trainings, tmp_path):
    run = Path(shutil.copytree(trainings.finished(name), tmp_path / "run"))
    (run / "progress.png").unlink()
    trainings.main(name, "--out-dir", run, "--resume")  # nothing left to train: the last pictures are made again
    checkpoint = common.load_checkpoint(run)
    torch.save(checkpoint, run / "checkpoint.pt")  # saving what was loaded is the identity
    assert_same_run(trainings.finished(name), run)
    for seed, to in ((5, "a"), (5, "b"), (6, "c")):
        trainings.main(name, "--out-dir", run, "--sample", 4, "--seed", seed, "--to", tmp_path / f"{to}.png")
    a, b, c = ((tmp_path / f"{to}.png").read_bytes() for to in "abc")
    assert a == b and (b != c or name == "dcgan-guo")  # whose pictures are still one grey
    trainings.train(name, tmp_path / "other", "--epochs", 1, "--seed", 7)
    other, generator = common.load_checkpoint(tmp_path / "other")["networks"], list(checkpoint["networks"])[0]
    assert any(
        not torch.equal(value, other[generator][key]) for key, value in checkpoint["networks"][generator].items()
    )


def assert_whole(folder: Path) -> None:
    """No file is half written: every picture can be read, and the checkpoint too if there is one."""
    assert not [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]
    for path in folder.rglob("*.*"):
        if path.suffix in (".png", ".gif"):
            Image.open(path).load()
    if (folder / "log.csv").exists():  # written after the checkpoint, which alone is believed
        assert len((folder / "log.csv").read_text().splitlines()) <= common.load_checkpoint(folder)["epoch"] + 1


FULL = pytest.mark.full
MOMENTS = [pytest.param(name, os, "replace", marks=[FULL] if name != "gan-guo" else []) for name in ONE_OF_EACH]
MOMENTS += [pytest.param(name, common.Run, "log", marks=FULL) for name in ONE_OF_EACH]


@pytest.mark.parametrize(("name", "owner", "function"), MOMENTS)
def test_interrupted_at_any_file_or_step_it_goes_on_as_if_nothing_were(
    name, owner, function, trainings, tmp_path, monkeypatch, capfd
):
    """Ctrl-C at the first call of a function, the second and so on: whole files, 130, one line, then the same run."""
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)  # save after every epoch
    real, run, whole = getattr(owner, function), tmp_path / "run", tmp_path / "whole"
    trainings.train(name, whole)
    for moment in itertools.count(1):
        calls = itertools.count(1)

        def interrupt(*args, calls=calls, moment=moment):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return real(*args)

        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, interrupt)
            try:
                trainings.train(name, run)
            except SystemExit as stop:
                assert stop.code == 130
            else:
                break  # all moments were tried
        error = capfd.readouterr().err
        assert error.startswith(f"{name.split('-')[0]}.py: interrupted: ") and "--resume" in error
        assert error.count("\n") == 1, error
        assert_whole(run)
        resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
        trainings.train(name, run, *resume)
        assert_same_run(whole, run)
        shutil.rmtree(run)
    assert moment > 2


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_divergence_keeps_the_last_finite_checkpoint(name, trainings, tmp_path, refusal):
    """An absurd rate drives the losses to infinity: the run stops and names loss, epoch and step, or the weights."""
    shutil.copytree(trainings.finished(name), tmp_path / "run")
    file = tmp_path / "run/checkpoint.pt"
    checkpoint = common.load_checkpoint(tmp_path / "run")
    for optimizer in checkpoint["optimizers"].values():
        optimizer["param_groups"][0]["lr"] = 1e30
    torch.save(checkpoint, file)
    kept = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dcgan.PRESETS["guo"]["folder"], "features", 8)
        error = refusal(name.split("-")[0], "--out-dir", tmp_path / "run", "--resume", "--epochs", 20)
    assert "is kept" in error and ("step" in error or "weights" in error)
    after = common.load_checkpoint(tmp_path / "run")
    assert file.read_bytes() == kept or after["epoch"] > checkpoint["epoch"]
    for network in after["networks"].values():
        assert all(tensor.isfinite().all() for tensor in network.values())


@pytest.mark.parametrize("script", ["gan", *(pytest.param(script, marks=FULL) for script in SCRIPTS[1:])])
def test_batches_of_any_size_work_or_are_refused_with_the_size_to_give(script, tmp_path, monkeypatch, refusal):
    """1, 2, just under and all of the data train; more than all, or one where batch norm is, do not."""
    monkeypatch.chdir(tmp_path)
    module, few, data = importlib.import_module(script), 13, common.draw_digits(train=False)
    monkeypatch.setattr(common, "load_data", lambda *_, **__: common.Data(data.images[:few], data.labels[:few]))
    options = ["--dataset", "digits", "--epochs", "1", "--batch-size"]
    for size in (1, 2, few - 1, few):
        if (script, size) == ("cvaegan", 1):
            assert "batch norm needs two images" in refusal(script, *options, size)
            continue
        module.main([*options, str(size), "--out-dir", f"run-{size}"])
        assert common.load_checkpoint(f"run-{size}")["epoch"] == 1
    error = refusal(script, *options, few + 1)
    assert "--batch-size 14 is larger than the data: 13 images: give --batch-size 13 or less" in error
    assert len(list(tmp_path.iterdir())) < 6 and not Path("runs").exists()


@pytest.mark.parametrize("name", ["a b", "Größe", "two\nlines", "-dash", "\x1b[31mred"])
def test_odd_names_work_or_get_one_line(name, trainings, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    options = ["--data-dir", str(trainings.folder / "tiny"), "--epochs", "1", "--batch-size", "20"]
    gan.main([*options, f"--out-dir={name}"])
    gan.main(["--sample", "4", f"--out-dir={name}"])
    assert (tmp_path / name / "sample.png").exists()
    assert "\x1b" not in refusal("gan", *options, f"--out-dir={name}/sample.png")


@contextlib.contextmanager
def full_disk(limit: int):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "name", "victim"),
    [(100_000, "gan-guo", "checkpoint.pt"), (4_000, "gan-guo", "checkpoint.pt"), (50_000, "dcgan-faces", "faces")],
)
def test_a_full_disk_gets_one_line_and_leaves_whole_files(limit, name, victim, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "tiny")
    make_folder(tmp_path / "faces")
    with full_disk(limit):
        error = refusal(name.split("-")[0], *TRAININGS[name].split(), "--out-dir", "run")
    assert victim in error and "File too large" in error
    assert_whole(tmp_path)
    assert not list(tmp_path.glob("*.images"))


def test_a_full_disk_spares_the_checkpoint_that_was_there(trainings, tmp_path, refusal):
    shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    with full_disk(100_000):
        error = refusal("gan", "--out-dir", tmp_path / "run", "--resume", "--epochs", 9)
    assert "checkpoint.pt" in error and (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_clock_that_runs_backwards_changes_nothing(trainings, tmp_path, monkeypatch):
    backwards = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    trainings.train("gan-guo", tmp_path / "run")
    assert_same_run(trainings.finished("gan-guo"), tmp_path / "run")


# ------------------------------------------------------------------------------------------- in processes of their own


def start(name: str, folder: Path, *options) -> Script:
    return Script(name.split("-")[0], *TRAININGS[name].split(), *options, cwd=folder)


def kill_and_resume(name: str, numbers: list[int], folder: Path) -> None:
    """Stop a run at random moments by these signals and resume it until it ends: it is the run that was not stopped."""
    write_idx(folder / "tiny")
    make_folder(folder / "faces")
    unbroken, killed, started = folder / "unbroken", folder / "killed", time.monotonic()
    assert start(name, folder, "--epochs", 10, "--out-dir", unbroken).finish() == 0
    length = time.monotonic() - started

    def go_on() -> Script:
        resume = ["--resume"] if (killed / "checkpoint.pt").exists() else []
        return start(name, folder, "--epochs", 10, "--out-dir", killed, *resume)

    while numbers:
        run = go_on()
        run.wait_for("device")  # what comes before is Python's own
        run.process.join(random.uniform(0, 0.9) * length)
        with contextlib.suppress(ProcessLookupError):
            run.interrupt(numbers[0])
        status = run.finish()
        if status == 0:  # it was through before: once more, and sooner
            shutil.rmtree(killed)
            length *= 0.8
            assert length > 1e-3, "no signal reaches it"
        elif numbers.pop(0) == signal.SIGKILL:
            assert status == -signal.SIGKILL
        else:
            assert status == 130 and run.err.count("\n") == 1 and "interrupted" in run.err, run.err
            assert_whole(killed)
    run = go_on()
    assert run.finish() == 0, run.err
    assert_same_run(unbroken, killed)
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.full
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_killed_and_resumed_is_the_unbroken_run(name, tmp_path):
    kill_and_resume(name, [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_killed_thirty_times(name, tmp_path):
    kill_and_resume(name, [signal.SIGKILL, signal.SIGINT, signal.SIGTERM] * 10, tmp_path)


@pytest.mark.full
def test_two_runs_on_one_data_folder_at_once(tmp_path):
    make_folder(tmp_path / "faces")
    both = [start("dcgan-faces", tmp_path, "--epochs", 2, "--out-dir", name) for name in ("a", "b")]
    assert [run.finish() for run in both] == [0, 0]
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.full
def test_thousands_of_short_epochs_stay_flat(tmp_path):
    """Memory and open files do not grow, the log is complete, the animation stays small."""

    def memory() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    epochs = 1000
    training, before = FakeTraining(tmp_path / "run", epochs), {}
    for epoch in range(1, epochs + 1):
        training.epoch({"loss [nats]": 1.0})
        if epoch in (200, epochs):
            before[epoch] = memory(), len(os.listdir("/proc/self/fd"))
    training.run.finish()
    assert before[epochs][0] - before[200][0] < 30
    assert before[epochs][1] <= before[200][1]
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == epochs + 1
    assert (tmp_path / "run/progress.gif").stat().st_size < 4_000_000
    assert len(list((tmp_path / "run/samples").iterdir())) == epochs
