"""What all tests share: real data where DATA_DIR points to it, tiny data otherwise, scripts run as by a user."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # tiny work: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def run_script(tmp_path):
    """Run `python SCRIPT.py options...` in an empty folder: returns the finished process with its output as text."""

    def run(script: str, *options, cwd: Path = tmp_path, environment: dict | None = None, timeout: float = 120):
        return subprocess.run(
            [sys.executable, str(ROOT / f"{script}.py"), *map(str, options)],
            cwd=cwd,
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


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
