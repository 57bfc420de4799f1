"""What goes wrong for people, and the promise each script keeps: one line, nothing lost, the same bits in the end."""

import gc
import importlib
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
from tests.conftest import Script, assert_same_run, write_idx
from tests.test_common import checkpoint_file, fake_run

SCRIPTS = ("gan", "dcgan", "vae", "cvaegan")
SHORT = {  # a run of a second or two
    "gan": "--data-dir tiny --epochs 4 --batch-size 50",
    "vae": "--data-dir tiny --epochs 4 --batch-size 50",
    "dcgan": "--dataset ./faces --image-size 32 --epochs 3 --batch-size 16",
    "cvaegan": "--data-dir tiny --epochs 3 --batch-size 100",
}


def prepare_data(folder: Path) -> None:
    """What the short runs train on: a tiny MNIST and a folder of small pictures."""
    write_idx(folder / "tiny", 300)
    make_folder(folder / "faces")


def make_folder(folder: Path, count: int = 48) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        chance = random.Random(i)
        image = Image.new("RGB", (40, 36), tuple(chance.randrange(256) for _ in range(3)))
        image.paste(tuple(chance.randrange(256) for _ in range(3)), (5, 5, 20 + i % 15, 25))
        image.save(folder / f"{i:03}.png")
    return folder


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def put(name: str, text: str | bytes = "in the way"):
    return lambda: Path(name).write_bytes(text.encode() if isinstance(text, str) else text)


def put_checkpoint(kind: str):
    return lambda: checkpoint_file(Path.cwd(), kind)


def broken_images():
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("broken/b.jpg").touch()


def bomb():
    """A PNG of a few bytes that claims a hundred thousand pixels a side."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    Path("bombs").mkdir()
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    Path("bombs/bomb.png").write_bytes(png)


EVERY = {  # options for each script: what the line must say, and what has to be there first
    "--epochs 0": ("--epochs", None),
    "--epochs many": ("--epochs", None),
    "--batch-size -3": ("--batch-size", None),
    "--batch-size 10001 --dataset digits": ("10,000 images", None),
    "--lr nan": ("--lr", None),
    "--lr -0.1": ("--lr", None),
    "--seed -1": ("--seed", None),
    "--dataset nothing": ("nothing", None),
    "--preset nobody": ("--preset", None),
    "--device tpu": ("--device", None),
    "--precision fp64": ("--precision", None),
    "--sample 0": ("--sample", None),
    "--sample 3": ("train first", None),
    "--resume": ("train first", None),
    "--resume --sample 3": ("one of them", None),
    "--to somewhere": ("--sample", None),
    "--no-such-option": ("--no-such-option", None),
    "--dataset digits --out-dir file": ("file", put("file")),
    "--dataset digits --out-dir file/below": ("file", put("file")),
    "--dataset digits --out-dir /proc/nowhere": ("/proc/nowhere", None),
    "--dataset mnist --data-dir file": ("file", put("file")),
    "--resume --out-dir run": ("damaged", put_checkpoint("truncated")),
    "--sample 3 --out-dir run": ("damaged", put_checkpoint("malicious")),
}
OWN = [
    ("vae", "--beta -1", "--beta", None),
    ("vae", "--beta nan", "--beta", None),
    ("vae", "--evaluate", "train first", None),
    ("dcgan", "--image-size 33 --dataset anime", "--image-size", None),
    ("dcgan", "--ema 1.5", "--ema", None),
    ("dcgan", "--augment everything", "--augment", None),
    ("dcgan", "--dataset anime", "anime", None),
    ("dcgan", "--dataset ./file", "file", put("file")),
    ("dcgan", "--dataset ./empty", "empty", lambda: Path("empty").mkdir()),
    ("dcgan", "--dataset ./broken", "broken", broken_images),
    ("dcgan", "--dataset ./bombs", "bomb", bomb),
    ("cvaegan", "--label 10", "--label", None),
    ("cvaegan", "--label -1", "--label", None),
    ("cvaegan", "--weights nobody", "--weights", None),
]
CASES = [(script, options, *rest) for script in SCRIPTS for options, rest in EVERY.items()] + OWN


@pytest.mark.parametrize(("script", "options", "words", "prepare"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_a_mistake_gets_one_line_and_changes_nothing(script, options, words, prepare, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(options.split())
    error = capfd.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith(f"{script}.py: error: ") and error.count("\n") == 1 and words in error, error
    assert snapshot(tmp_path) == before


def test_there_are_at_least_sixty_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", ["a b", "Größe", "two\nlines", "-dash", "\x1b[31mred"])
def test_odd_names_work_or_get_one_line(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    gan = importlib.import_module("gan")
    gan.main(["--dataset", "digits", "--epochs", "1", "--batch-size", "5000", f"--out-dir={name}"])
    gan.main(["--sample", "4", f"--out-dir={name}"])
    assert (tmp_path / name / "sample.png").exists()
    capfd.readouterr()
    with pytest.raises(SystemExit):
        gan.main(["--dataset", "digits", f"--out-dir={name}/sample.png"])
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_of_any_size_work_or_are_refused(script, tmp_path, monkeypatch, capfd):
    """1, 2, a prime, just under and all of the data: training goes on, or one line says why not."""
    monkeypatch.chdir(tmp_path)
    module, few = importlib.import_module(script), 31
    data = common.draw_digits()
    monkeypatch.setattr(common, "load_data", lambda *_, **__: common.Data(data.images[:few], data.labels[:few]))
    for size in (1, 2, 13, few - 1, few):
        try:
            module.main(["--dataset", "digits", "--epochs", "1", "--batch-size", str(size), "--out-dir", f"run-{size}"])
        except SystemExit as stop:
            error = capfd.readouterr().err
            assert stop.code == 2 and size == 1 and "batch" in error and error.count("\n") == 1
        else:
            assert common.load_checkpoint(f"run-{size}")["epoch"] == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_command_same_bits_and_seeds_count(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_data(tmp_path)
    module = importlib.import_module(script)
    options = SHORT[script].split()
    options[options.index("--epochs") + 1] = "1"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        module.main([*options, "--out-dir", name, "--seed", str(seed)])
        module.main(["--out-dir", name, "--sample", "9", "--seed", "5"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "c")
    module.main(["--out-dir", "a", "--sample", "9", "--seed", "6", "--to", "other.png"])
    assert Path("other.png").read_bytes() != Path("a/sample.png").read_bytes()
    checkpoint = common.load_checkpoint("a")
    torch.save(checkpoint, "a/checkpoint.pt")
    assert_same_run(tmp_path / "a", tmp_path / "b")  # saving what was loaded is the identity


@pytest.mark.parametrize("script", SCRIPTS)
def test_divergence_keeps_the_last_finite_checkpoint(script, tmp_path, monkeypatch, capfd):
    """An absurd rate drives the losses to infinity: the run stops and names loss, epoch and step, or the weights."""
    monkeypatch.chdir(tmp_path)
    prepare_data(tmp_path)
    options = SHORT[script].split()
    module = importlib.import_module(script)
    module.main([*options, "--out-dir", "run"])
    checkpoint = common.load_checkpoint("run")
    for optimizer in checkpoint["optimizers"].values():
        optimizer["param_groups"][0]["lr"] = 1e30
    torch.save(checkpoint, "run/checkpoint.pt")
    kept = Path("run/checkpoint.pt").read_bytes()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(["--out-dir", "run", "--resume", "--epochs", "20"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "is kept" in error, error
    assert "step" in error or "weights" in error
    after = common.load_checkpoint("run")
    assert Path("run/checkpoint.pt").read_bytes() == kept or after["epoch"] > checkpoint["epoch"]
    for network in after["networks"].values():
        assert all(tensor.isfinite().all() for tensor in network.values())


def kill_and_resume(script: str, kills: int, folder: Path) -> None:
    """Kill a run at random moments and resume it until it ends: it is the run that was never stopped."""
    prepare_data(folder)
    started, options = time.monotonic(), SHORT[script].split()
    assert Script(script, *options, "--out-dir", "unbroken", cwd=folder).finish() == 0
    length, killed = time.monotonic() - started, folder / "killed"

    def start() -> Script:
        resume = ["--resume"] if (killed / "checkpoint.pt").exists() else []
        return Script(script, *options, "--out-dir", "killed", *resume, cwd=folder)

    while kills:
        run = start()
        run.process.join(random.uniform(0, 0.9) * length)
        run.process.kill()
        if run.finish() == -signal.SIGKILL:
            kills -= 1
        else:  # it was through before: once more, and sooner
            shutil.rmtree(killed)
            length *= 0.8
    run = start()
    assert run.finish() == 0, run.err
    assert_same_run(folder / "unbroken", killed)
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_is_the_unbroken_run(script, tmp_path):
    kill_and_resume(script, 2, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_thirty_times(script, tmp_path):
    kill_and_resume(script, 30, tmp_path)


@pytest.mark.parametrize(("script", "number"), [*((s, signal.SIGINT) for s in SCRIPTS), ("gan", signal.SIGTERM)])
def test_interrupts_end_with_130_and_resume(script, number, tmp_path, monkeypatch):
    prepare_data(tmp_path)
    options = SHORT[script].split()
    run = Script(script, *options, "--out-dir", "run", "--epochs", 500, cwd=tmp_path)
    run.wait_for("2/500")
    os.kill(run.process.pid, number)
    assert run.finish() == 130 and run.err.count("\n") == 1, run.err
    assert f"{script}.py: interrupted: python {script}.py --resume --out-dir run goes on after epoch" in run.err
    epoch = common.load_checkpoint(tmp_path / "run")["epoch"]
    assert epoch >= 1
    if script != "gan":  # that a resumed run is the unbroken one is tested for all of them where they are killed
        return
    for sample in (tmp_path / "run/samples").iterdir():  # those of epochs that were drawn and not saved
        if int(sample.stem.split("-")[1]) > epoch + 1:
            sample.unlink()
    monkeypatch.chdir(tmp_path)
    for words in (["--out-dir", "run", "--resume"], ["--out-dir", "unbroken", *options]):
        importlib.import_module(script).main([*words, "--epochs", str(epoch + 1)])
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("limit", "script", "victim"),
    [(100_000, "gan", "checkpoint.pt"), (4_000, "gan", "real.png"), (50_000, "dcgan", "faces")],
)
def test_a_full_disk_gets_one_line_and_leaves_whole_files(limit, script, victim, tmp_path):
    prepare_data(tmp_path)
    run = Script(script, *SHORT[script].split(), "--out-dir", "run", cwd=tmp_path, file_limit=limit)
    assert run.finish() == 2 and run.err.count("\n") == 1, run.err
    assert victim in run.err and "File too large" in run.err
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".tmp")]
    for picture in (tmp_path / "run").rglob("*.png"):
        Image.open(picture).load()


def test_a_full_disk_spares_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_data(tmp_path)
    importlib.import_module("gan").main([*SHORT["gan"].split(), "--out-dir", "run"])
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    run = Script("gan", "--out-dir", "run", "--resume", "--epochs", 9, cwd=tmp_path, file_limit=100_000)
    assert run.finish() == 2 and "checkpoint.pt" in run.err
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_thousands_of_short_epochs_stay_flat(tmp_path):
    """Memory and open files do not grow, the log is complete, the animation stays small."""

    def memory() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    epochs = 1000
    run, before = fake_run(tmp_path / "run", epochs=epochs), {}
    for epoch in run.epochs():
        for _ in run.batches():
            run.record({"loss [nats]": torch.tensor(1.0)})
        run.save_samples(torch.rand(4, 1, 28, 28))
        if epoch in (200, epochs):
            before[epoch] = memory(), len(os.listdir("/proc/self/fd"))
    run.finish()
    assert before[epochs][0] - before[200][0] < 30
    assert before[epochs][1] <= before[200][1]
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == epochs + 1
    assert (tmp_path / "run/progress.gif").stat().st_size < 4_000_000
    assert len(list((tmp_path / "run/samples").iterdir())) == epochs


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    gan = importlib.import_module("gan")
    monkeypatch.chdir(tmp_path)
    prepare_data(tmp_path)
    backwards = iter(range(10**9, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    for name in ("a", "b"):
        gan.main([*SHORT["gan"].split(), "--out-dir", str(tmp_path / name)])
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_two_runs_on_one_data_folder_at_once(tmp_path):
    prepare_data(tmp_path)
    options = SHORT["dcgan"].split()
    both = [Script("dcgan", *options, "--out-dir", name, cwd=tmp_path) for name in ("a", "b")]
    assert [run.finish() for run in both] == [0, 0]
    assert_same_run(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
