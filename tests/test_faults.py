"""What happens when a training is stopped, killed or diverges, and on full disks, in odd folders and odd terminals."""

import contextlib
import importlib
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import gan
import vae
from tests.conftest import ONE_OF_EACH, ROOT, SCRIPTS, TRAININGS, Script, assert_same_run, make_folder, write_idx
from tests.test_common import FakeTraining

FULL = pytest.mark.full


# ------------------------------------------------------------------------------------------ stopped, in this process
SLOWER = ("dcgan-banerjee", "vae-banerjee-conv", "cvaegan-guo")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[FULL] * (name in SLOWER)) for name in TRAININGS])
def test_stopped_and_resumed_is_the_unbroken_run(name, trainings, tmp_path):
    """Every training: half of it, then the rest; and a sample of it."""
    unbroken, run = trainings.finished(name), tmp_path / "run"
    trainings.train(name, run, "--epochs", 1)
    assert (run / "progress.gif").exists() and (run / "progress.png").exists()  # for the epochs so far
    trainings.main(name, "--out-dir", run, "--resume", "--epochs", 2)
    assert_same_run(unbroken, run)
    trainings.main(name, "--out-dir", run, "--sample", 64, "--to", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == (run / "samples/epoch-0002.png").read_bytes()
    trainings.main(name, "--out-dir", run, "--walk", 3)
    assert max(Image.open(run / "walk.png").size) >= 480
    if name in ("gan-guo", "cvaegan-guo"):  # others are still of one colour, and equal frames are one
        assert Image.open(run / "walk.gif").n_frames == (30 if name == "cvaegan-guo" else 24)


@pytest.mark.parametrize("name", ["gan-guo", "dcgan-guo", "vae-guo", "cvaegan-guo"])
def test_another_seed_is_another_run_and_another_sample(name, trainings, tmp_path):
    run = trainings.finished(name)
    for seed, to in ((5, "a"), (5, "b"), (6, "c")):
        trainings.main(name, "--out-dir", run, "--sample", 4, "--seed", seed, "--to", tmp_path / f"{to}.png")
    a, b, c = ((tmp_path / f"{to}.png").read_bytes() for to in "abc")
    assert a == b and (b != c or name == "dcgan-guo")  # whose pictures are still one grey
    trainings.train(name, tmp_path / "other", "--epochs", 1, "--seed", 7)
    states = [common.load_checkpoint(folder)["networks"] for folder in (run, tmp_path / "other")]
    one, other = (next(iter(networks.values())) for networks in states)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def assert_whole(folder: Path) -> None:
    """No file is half written: every picture can be read, and the checkpoint too if there is one."""
    assert not list(folder.rglob(common.TEMPORARY))
    for path in folder.rglob("*.*"):
        if path.suffix in (".png", ".gif"):
            Image.open(path).load()
    if (folder / "log.csv").exists():  # written after the checkpoint, which alone is believed
        assert len((folder / "log.csv").read_text().splitlines()) <= common.load_checkpoint(folder)["epoch"] + 1


MOMENTS = [pytest.param(name, os, "replace", marks=FULL) for name in ONE_OF_EACH]
MOMENTS += [pytest.param(name, common.Run, "log", marks=[FULL] * (name != "gan-guo")) for name in ONE_OF_EACH]


@pytest.mark.parametrize(("name", "owner", "function"), MOMENTS)
def test_interrupted_anywhere_it_goes_on(name, owner, function, trainings, tmp_path, monkeypatch, capfd):
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
        kept = rf"(: no epoch was kept|: --resume goes on from epoch [12] of {re.escape(str(run))})?"
        assert re.fullmatch(rf"{name.split('-')[0]}.py: interrupted{kept}\n", error)
        assert_whole(run)
        resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
        trainings.train(name, run, *resume)
        assert_same_run(whole, run)
        shutil.rmtree(run)
    assert moment > 2


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_divergence_keeps_the_last_finite_checkpoint(name, trainings, tmp_path, capfd):
    """An absurd rate drives the losses to infinity: the run stops and names loss and epoch, or the weights."""
    shutil.copytree(trainings.finished(name), tmp_path / "run")
    checkpoint = common.load_checkpoint(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        trainings.main(name, "--out-dir", tmp_path / "run", "--resume", "--epochs", 20, "--lr", "1e18")
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "is kept" in error
    assert re.search(r" is (nan|-?inf) in epoch | has weights that are not finite ", error)
    after = common.load_checkpoint(tmp_path / "run")
    assert checkpoint["epoch"] <= after["epoch"] < 20
    assert all(tensor.isfinite().all() for network in after["networks"].values() for tensor in network.values())


@pytest.mark.parametrize("script", [pytest.param(script, marks=[FULL] * (script != "cvaegan")) for script in SCRIPTS])
def test_batches_of_any_size_work_or_are_refused(script, tmp_path, monkeypatch, refusal):
    """1, 2, just under and all of the data train; one where batch norm is does not."""
    monkeypatch.chdir(tmp_path)
    module, few, data = importlib.import_module(script), 13, common.draw_digits(train=False)
    monkeypatch.setattr(common, "load_data", lambda *_, **__: common.Data(data.images[:few], data.labels[:few]))
    options = ["--dataset", "digits", "--epochs", "1", "--batch-size"]
    for size in (1, 2, few - 1, few):
        if (script, size) == ("cvaegan", 1):
            assert "batch norm needs two images" in refusal(script, *options, size)
        else:
            module.main([*options, str(size), "--out-dir", f"run-{size}"])
            assert common.load_checkpoint(f"run-{size}")["epoch"] == 1


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
    ("limit", "name", "victim"), [(100_000, "gan-guo", "checkpoint.pt"), (50_000, "dcgan-faces", "faces")]
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


# ---------------------------------------------------------------------------------- killed, in processes of their own
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


@FULL
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_killed_and_resumed_is_the_unbroken_run(name, tmp_path):
    kill_and_resume(name, [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_killed_thirty_times(name, tmp_path):
    kill_and_resume(name, [signal.SIGKILL, signal.SIGINT, signal.SIGTERM] * 10, tmp_path)


@FULL
def test_two_runs_on_one_data_folder_at_once(tmp_path):
    make_folder(tmp_path / "faces")
    both = [start("dcgan-faces", tmp_path, "--epochs", 2, "--out-dir", name) for name in ("a", "b")]
    assert [run.finish() for run in both] == [0, 0]
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------------------------- a run's folder
def words_for(run: str | Path, trainings, epochs: int = 1) -> list[str]:
    return f"--data-dir {trainings.folder / 'tiny'} --batch-size 20 --out-dir {run} --epochs {epochs}".split()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_holds_its_folder(trainings, tmp_path, refusal):
    run = Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run"))
    words, before = words_for(run, trainings, epochs=3), contents(tmp_path)
    with common.locked(run):
        assert "another process writes to" in refusal("gan", *words)
        assert "another process writes to" in refusal("gan", *words, "--resume")
    assert contents(tmp_path) == before
    gan.main([*words, "--resume"])  # for it lets go of it


def test_a_lock_is_gone_with_its_process(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, os, pathlib\n"
    program += "with common.locked(pathlib.Path('run')): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == -signal.SIGKILL
    with common.locked(tmp_path / "run"):
        assert (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database is locked"), ImportError("No module _sqlite3")])
def test_where_no_file_can_be_locked_a_training_goes_on(error, trainings, tmp_path, monkeypatch, capsys):
    def fail(path):
        path.touch()  # as SQLite does
        raise error

    monkeypatch.setattr(common, "lock_file", fail)
    gan.main(words_for(tmp_path / "run", trainings))
    assert f"no lock on {tmp_path / 'run'} ({error}): let no other process write there\n" in capsys.readouterr().out
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 1 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("out_dir", ["place", "link", "."])
def test_an_earlier_run_is_moved_aside_whole(out_dir, trainings, tmp_path, monkeypatch):
    """Also one that a symbolic link leads to, which then leads to the new run, and one in the current folder."""
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    for seed in range(3):
        monkeypatch.chdir(tmp_path / "place" if out_dir == "." else tmp_path)
        gan.main([*words_for(out_dir, trainings), "--seed", str(seed)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place", "place-1", "place-2"]
    folders = [tmp_path / name for name in ("place-1", "place-2", "link")]
    assert [common.load_checkpoint(folder)["options"]["seed"] for folder in folders] == [0, 1, 2]
    assert all((folder / "samples/epoch-0001.png").exists() for folder in folders)


@pytest.mark.parametrize("other", ["thesis.txt", "inner/checkpoint.pt"])
def test_a_folder_that_holds_other_files_is_not_moved_aside(other, trainings, tmp_path, refusal):
    run = Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run"))
    (run / other).parent.mkdir(exist_ok=True)
    (run / other).write_text("mine")
    before = contents(tmp_path)
    assert other.split("/")[0] in refusal("gan", *words_for(run, trainings))
    assert contents(tmp_path).items() - before.items() <= {(run / ".lock", b"")}


def test_what_a_kill_left_half_written_is_cleared_and_nothing_else(trainings, tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    others = [run / name for name in ("notes.tmp", ".hidden", ".report.odt.tmp", ".log.csv.99.tmp")]
    left = [run / name for name in (".log.csv.0123456789ab.tmp", "samples/.epoch-2.png.0123456789ab.tmp")]
    for path in others + left:
        path.touch()
    trainings.train("gan-guo", run)
    assert all(path.exists() for path in others) and not any(path.exists() for path in left)


@pytest.mark.parametrize("name", ["gan-guo", "cvaegan-guo"])
def test_samples_never_mix_with_other_files(name, trainings, tmp_path, refusal):
    drawn, run = tmp_path / "drawn", trainings.finished(name)
    words = ("--out-dir", run, "--data-dir", trainings.folder / "tiny", "--sample", 12, "--to", drawn)
    trainings.main(name, *words)
    numbers = [f"{i}/{i:05}.png" if name == "cvaegan-guo" else f"{i:05}.png" for i in range(10)]
    assert all((drawn / number).exists() for number in numbers) and len(list(drawn.rglob("*.png"))) == 12
    before = contents(tmp_path)
    assert f"{drawn}: there are files in it" in refusal(name.split("-")[0], *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["a b", "Größe", "two\nlines", "-dash"])
def test_odd_names_work_or_get_one_line(name, trainings, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    gan.main([*words_for("overridden", trainings), f"--out-dir={name}"])
    gan.main(["--sample", "4", f"--out-dir={name}"])
    assert (tmp_path / name / "sample.png").exists()
    assert "sample.png" in refusal("gan", *words_for("overridden", trainings), f"--out-dir={name}/sample.png")


def test_a_sample_that_cannot_be_read_is_left_out(trainings, tmp_path):
    run = Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run"))
    (run / "samples/epoch-0001.png").write_bytes(b"damaged")
    trainings.main("gan-guo", "--out-dir", run, "--resume")  # nothing is left to train
    assert Image.open(run / "progress.gif").n_frames == 1


# ------------------------------------------------------------------------------------------------------ images, output
def test_images_that_moved_are_the_same_and_others_get_a_line(tmp_path, refusal, capfd, trainings):
    faces, moved, others = make_folder(tmp_path / "a/faces", 24), tmp_path / "b/faces", make_folder(tmp_path / "c", 25)
    data, run = ("--data-dir", tmp_path / "data"), ("--out-dir", tmp_path / "run")
    trainings.main(
        "dcgan-faces", "--dataset", faces, *data, *run, *"--image-size 32 --batch-size 12 --epochs 1".split()
    )
    shutil.move(faces, moved)
    trainings.main("dcgan-faces", *run, "--resume", "--epochs", 2, "--dataset", moved)
    trainings.main("dcgan-faces", *run, "--sample", 3, "--dataset", moved)
    assert common.load_checkpoint(tmp_path / "run")["options"]["dataset"] == str(moved)
    assert "other images than the run's" in refusal("dcgan", *run, "--resume", "--epochs", 3, "--dataset", others)
    (moved / "000.png").unlink()
    capfd.readouterr()
    trainings.main("dcgan-faces", *run, "--resume", "--epochs", 3)
    assert "has changed since the checkpoint: 23 images now" in capfd.readouterr().out
    assert "contradicts" in refusal("dcgan", *run, "--resume", "--epochs", 4, "--dataset", "mnist")


def test_a_run_keeps_out_of_the_images_that_it_learns_from(tmp_path, monkeypatch, refusal):
    make_folder(tmp_path / "a/pictures", 4)
    monkeypatch.chdir(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    for out_dir in ("pictures", ".", "pictures/b"):
        assert "overlap" in refusal("dcgan", "--dataset", "pictures", "--out-dir", out_dir)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_what_cannot_be_encoded_is_escaped(encoding, tmp_path, monkeypatch, trainings):
    output, run = io.TextIOWrapper(io.BytesIO(), encoding=encoding), tmp_path / "日本 Größe ·"
    monkeypatch.setattr(sys, "stdout", output)
    trainings.train("gan-guo", run, "--epochs", 1)
    trainings.main("gan-guo", "--out-dir", run, "--sample", 4)
    output.flush()
    text = output.buffer.getvalue().decode(encoding)
    assert "done: look at" in text and "4 images in" in text and ("\\u" in text or encoding == "cp932")


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_gets_no_codes(term, tmp_path, monkeypatch, trainings):
    output = io.StringIO()
    output.isatty = lambda: True
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", output)
    trainings.train("gan-guo", tmp_path / "run")
    assert ("\x1b" in output.getvalue()) == (term == "xterm")


def test_off_a_terminal_a_line_within_an_epoch_comes_each_half_minute(tmp_path, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    run, lines = FakeTraining(tmp_path / "run", epochs=30).run, []  # 60 steps
    for seconds in (10, 29, 31, 40, 62):
        now = seconds
        run.log({f"loss {i} of a long name [nats]": torch.tensor(0.5) for i in range(9)})
        lines.append(capsys.readouterr().out)
    assert [line.count("\n") for line in lines] == [0, 0, 1, 0, 1]
    assert lines[2].startswith("epoch  1/30  0:09:49 left  ") and "loss 0 of a long name 0.5" in lines[2][:80]


def test_libraries_that_do_not_fit_are_told_before_any_work(monkeypatch, refusal, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(torch, "accelerator")
    line = refusal("gan", "--dataset", "digits")
    assert "accelerator" in line and "requirements.txt" in line
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "torchvision" in refusal("gan", "--dataset", "digits")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- resuming and moving on
def test_one_command_starts_and_goes_on_and_says_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    job = "--dataset digits --batch-size 5000 --device cpu --resume --epochs".split()
    gan.main([*job, "1"])
    assert "no checkpoint in runs/gan-guo-digits: a new run starts\n" in capsys.readouterr().out
    gan.main([*job, "1"])
    assert "nothing to do: epoch 1 is there; a larger --epochs goes further" in capsys.readouterr().out
    gan.main([*job, "2", "--batch-size", "2500", "--lr", "1e-4"])
    assert "from here on --batch-size 2500, before 5000" in capsys.readouterr().out
    checkpoint = common.load_checkpoint("runs/gan-guo-digits")
    assert (checkpoint["epoch"], checkpoint["options"]["batch_size"], checkpoint["options"]["lr"]) == (2, 2500, 1e-4)
    assert checkpoint["optimizers"]["generator"]["param_groups"][0]["lr"] == 1e-4


def test_a_run_of_another_machine_draws_and_is_measured_here(tmp_path, monkeypatch, trainings):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trainings.finished("vae-guo"), "run")
    checkpoint = common.load_checkpoint("run")
    checkpoint["options"] |= dict(data_dir="/their/data", device="cuda", dataset="digits")
    torch.save(checkpoint, "run/checkpoint.pt")
    for option in (["--sample", "4"], ["--evaluate"]):
        args = vae.parse_args(["--out-dir", "run", *option])
        assert (args.data_dir, args.device) == (str(tmp_path / "data"), "auto")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_dcgan_starts_from_another_runs_networks(trainings, tmp_path, refusal):
    start = trainings.finished("dcgan-faces")
    trainings.train("dcgan-faces", tmp_path / "run", "--epochs", 1, "--init", start, "--lr", "1e-9")
    one, other = (common.load_checkpoint(folder)["networks"]["generator"] for folder in (start, tmp_path / "run"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one if name.endswith("weight"))
    options = ["--dataset", "digits", "--out-dir", tmp_path / "other", "--init", start]
    assert "does not fit these networks" in refusal("dcgan", *options)
    assert "was written by gan.py" in refusal("dcgan", *options[:-1], trainings.finished("gan-guo"))


def test_a_flipped_byte_in_a_checkpoint_is_found(trainings, tmp_path, refusal):
    shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run")
    with open(tmp_path / "run/checkpoint.pt", "r+b") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 1]))
    assert "is damaged" in refusal("gan", "--out-dir", tmp_path / "run", "--sample", 4)


def test_samples_that_are_all_the_same_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gan, "generate", lambda generator, latents: torch.ones(len(latents), 1, 28, 28))
    gan.main(f"--dataset digits --batch-size 5000 --epochs 1 --out-dir {tmp_path}/run".split())
    assert "warning: all samples are the same" in capsys.readouterr().out


@FULL
@pytest.mark.parametrize("script", [*SCRIPTS, "compare", "crawl_anime"])
def test_without_docstrings(script, tmp_path):
    told = subprocess.run([sys.executable, "-OO", ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--help" in told.stdout and not told.stderr
