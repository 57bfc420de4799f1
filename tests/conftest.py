"""What all tests share: tiny data, the nine trainings in small, scripts run as by a user."""

import functools
import importlib
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import dcgan

ROOT = Path(__file__).parent.parent
SCRIPTS = ("gan", "dcgan", "vae", "cvaegan")
CPU = torch.device("cpu")
FP32, BF16 = (torch.autocast("cpu", torch.bfloat16, enabled=enabled) for enabled in (False, True))
torch.set_num_threads(1)  # tiny work: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
common.draw_digits = functools.cache(common.draw_digits)  # which are the same for every test


# -------------------------------------------------------------------------------------------------------------- data
@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST/raw and anime that DATA_DIR names; the test is skipped without it."""
    folder = Path(os.environ.get("DATA_DIR", "none")).resolve()
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip("DATA_DIR names no folder with MNIST/raw")
    return folder


def write_idx(folder: Path, count: int = 40) -> Path:
    """A tiny MNIST in torchvision's layout: `count` train and 10 test images of noise."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", count), ("t10k", 10)):
        pixels = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        header = b"\0\0\x08\x03" + n.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        labels = bytes(i % 10 for i in range(n))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + labels)
    return folder


def make_folder(folder: Path, count: int = 48) -> Path:
    """A folder of small pictures of two colours."""
    folder.mkdir(parents=True)
    for i in range(count):
        chance = random.Random(i)
        image = Image.new("RGB", (40, 36), tuple(chance.randrange(256) for _ in range(3)))
        image.paste(tuple(chance.randrange(256) for _ in range(3)), (5, 5, 20 + i % 15, 25))
        image.save(folder / f"{i:03}.png")
    return folder


# --------------------------------------------------------------------------------------------------------- trainings
TRAININGS = {  # all that the reports train, in small: two epochs of two steps
    "gan-guo": "--preset guo --data-dir tiny --batch-size 20",
    "gan-banerjee": "--preset banerjee --data-dir tiny --batch-size 20",
    "dcgan-guo": "--preset guo --data-dir tiny --batch-size 20",
    "dcgan-banerjee": "--preset banerjee --data-dir tiny --batch-size 20",
    "dcgan-faces": "--dataset faces --image-size 32 --augment full --ema 0.9 --batch-size 20 --data-dir .",
    "vae-guo": "--preset guo --data-dir tiny --batch-size 20",
    "vae-banerjee-linear": "--preset banerjee-linear --data-dir tiny --batch-size 20",
    "vae-banerjee-conv": "--preset banerjee-conv --data-dir tiny --batch-size 20",
    "cvaegan-guo": "--data-dir tiny --batch-size 20",
}
ONE_OF_EACH = ("gan-guo", "dcgan-faces", "vae-guo", "cvaegan-guo")


class Trainings:
    """Runs of TRAININGS in this process, on data in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, {}
        write_idx(folder / "tiny", 40)
        make_folder(folder / "faces")

    def main(self, name: str, *options) -> None:
        """The training's script with these options, run in the folder of the data."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setitem(dcgan.PRESETS["guo"], "features", 8)
            patch.setitem(dcgan.PRESETS["guo"]["folder"], "features", 8)
            importlib.import_module(name.split("-")[0]).main([str(option) for option in options])

    def train(self, name: str, out_dir: Path, *more) -> None:
        self.main(name, *TRAININGS[name].split(), "--epochs", 2, "--out-dir", out_dir, *more)

    def finished(self, name: str) -> Path:
        """The folder of a finished run that was never stopped, for reading only."""
        if name not in self.runs:
            self.runs[name] = self.folder / "finished" / name
            self.train(name, self.runs[name])
        return self.runs[name]


@pytest.fixture(scope="session")
def trainings(tmp_path_factory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


def tensors_of(states: dict, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dictionaries by their path."""
    found = {}
    for key, value in states.items():
        if isinstance(value, dict):
            found |= tensors_of(value, f"{path}/{key}")
        elif isinstance(value, torch.Tensor):
            found[f"{path}/{key}"] = value
    return found


def rows_of(checkpoint: dict) -> list[dict]:
    """The rows of its log, without the times."""
    times = ("seconds", "images per second")
    return [{name: value for name, value in row.items() if name not in times} for row in checkpoint["history"]]


def pictures_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for kind in ("png", "gif") for path in run.rglob(f"*.{kind}")}


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders agree bit for bit: options, every tensor, every row of the log but its times, every picture."""
    first, second = common.load_checkpoint(one), common.load_checkpoint(other)
    assert (first["epoch"], first["options"]) == (second["epoch"], second["options"])
    for part in ("networks", "optimizers"):
        left, right = tensors_of(first[part]), tensors_of(second[part])
        assert left and left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert rows_of(first) == rows_of(second)
    assert [len((run / "log.csv").read_text().splitlines()) for run in (one, other)] == [first["epoch"] + 1] * 2
    left, right = pictures_of(one), pictures_of(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


# ----------------------------------------------------------------------------------------------------------- scripts
@pytest.fixture
def refusal(capfd):
    """A function that runs a script and returns the one line that it must end with, with status 2."""

    def run(script: str, *options) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).main([str(option) for option in options])
        error = capfd.readouterr().err
        assert stop.value.code == 2, error
        assert error.startswith(f"{script}.py: error: ") and error.count("\n") == 1, error
        return error

    return run


class Script:
    """`python SCRIPT.py options...` in a folder, as a user runs it, but forked from a process that has imported torch.

    That saves some seconds a start. `out` and `err` are what it has printed so far. The process leads a group, as one
    that was started at a terminal.
    """

    def __init__(self, script: str | Path, *options, cwd: Path, environment: dict | None = None):
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["torch._dynamo", "torchvision", "tests.conftest"])
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]
        words, names = [str(ROOT / f"{script}.py"), *map(str, options)], [file.name for file in self.files]
        self.process = forks.Process(target=run_forked, args=(words, cwd, environment or {}, names))
        self.process.start()

    @property
    def out(self) -> str:
        return Path(self.files[0].name).read_text()

    @property
    def err(self) -> str:
        return Path(self.files[1].name).read_text()

    def wait_for(self, text: str) -> None:
        while text not in self.out:
            assert self.process.is_alive(), self.err
            time.sleep(0.01)

    def interrupt(self, number: int) -> None:
        """Send a signal to the process and those that it started, as a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self) -> int:
        """Wait for the end: the exit status, minus the signal's number if it was killed."""
        self.process.join(120)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError("still running after two minutes")
        return self.process.exitcode


def run_forked(words: list[str], cwd: Path, environment: dict, output: list[str]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    os.environ |= environment
    os.chdir(cwd)
    for number, name in enumerate(output, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
