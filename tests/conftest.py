"""What all tests share: real data where DATA_DIR points to it, tiny data otherwise, scripts run as by a user."""

import functools
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # tiny work: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


class Script:
    """`python SCRIPT.py options...` in a folder, as a user runs it, but forked from a process that has imported torch.

    That saves some seconds a start. `out` and `err` are what it has printed so far. No file, these two included, can
    grow beyond `file_limit` bytes, as on a full disk.
    """

    def __init__(self, script: str | Path, *options, cwd: Path, environment: dict | None = None, file_limit: int = -1):
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["torch._dynamo", "torchvision", "tests.conftest"])
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]
        words, names = [str(ROOT / f"{script}.py"), *map(str, options)], [file.name for file in self.files]
        self.process = forks.Process(target=run_forked, args=(words, cwd, environment or {}, file_limit, names))
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

    def finish(self) -> int:
        """Wait for the end: the exit status, minus the signal's number if it was killed."""
        self.process.join(120)
        assert self.process.exitcode is not None, "still running after two minutes"
        return self.process.exitcode


def run_forked(words: list[str], cwd: Path, environment: dict, file_limit: int, output: list[str]) -> None:
    import resource

    os.environ |= environment
    os.chdir(cwd)
    for number, name in enumerate(output, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    if file_limit >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="session", autouse=True)
def digits_drawn_once():
    """The drawn digits are the same for every test: draw them once in this process."""
    common.draw_digits = functools.cache(common.draw_digits)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST/raw and anime that DATA_DIR names; the test is skipped without it."""
    folder = Path(os.environ.get("DATA_DIR", ""))
    if not os.environ.get("DATA_DIR") or not (folder / "MNIST" / "raw").is_dir():
        pytest.skip("DATA_DIR names no folder with MNIST/raw")
    return folder.resolve()


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


def tensors_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their path in it."""
    found = {}

    def walk(value, path):
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(inner, f"{path}/{i}")

    walk({name: checkpoint[name] for name in ("networks", "optimizers")}, "")
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders agree bit for bit: every tensor, every row of the log but its times, every picture."""
    first, second = common.load_checkpoint(one), common.load_checkpoint(other)
    assert first["epoch"] == second["epoch"]
    left, right = tensors_of(first), tensors_of(second)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    times = ("seconds", "images per second")
    rows = [[{k: v for k, v in row.items() if k not in times} for row in c["history"]] for c in (first, second)]
    assert rows[0] == rows[1]
    pictures = sorted(path.relative_to(one) for path in one.rglob("*.png") if path.name != "losses.png")
    assert pictures == sorted(path.relative_to(other) for path in other.rglob("*.png") if path.name != "losses.png")
    assert [str(p) for p in pictures if (one / p).read_bytes() != (other / p).read_bytes()] == []
