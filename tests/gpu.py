"""What only a GPU can prove: a step captured as a CUDA graph is the step that runs one kernel at a time, bit for bit.

    python tests/gpu.py --data-dir data                  # real images
    python tests/gpu.py gan-guo cvaegan                  # some of the cases, on random images
    python tests/gpu.py --device cpu                     # the same comparison without a graph

Each case runs its script's own `train` for six epochs of two steps, so that steps, the seeding of epochs, samples and
checkpoints are those of a real run. First twelve eager steps in one go; then the same through common.capture, stopped
after six and resumed, from a checkpoint that looks as if a CPU had written it. Both runs end with the same networks,
optimizers, moving averages and losses, and every captured step had its graph. With deterministic algorithms, in fp32
and bf16. Prints a line a case; status 1, and the name of the first tensor that differs, if one does.

In the case "large" the captured run's images do not fit on the device. "processes" trains with two processes, unbroken
and resumed; on CUDA it needs two cards. "compare" measures a run on the device and on the CPU.

The first hour on a card
------------------------

Nothing of this has run on a GPU yet. The minutes are estimates for an H100 with 16 cores; `data` holds MNIST/raw and
anime. Every command can be stopped and given again; the third and the fourth need the machine for themselves.

    python tests/gpu.py --data-dir data                              # 4 min: 26 lines that end in "equal"
    DATA_DIR=data python -m pytest                                   # 4 min, on the CPU but for a few tests
    python tests/bench.py --data-dir data --device cuda              # 7 min: ratios to the conventional loop
    python tests/study.py --data-dir data --out-dir runs             # 10 min: all trainings; resumes what was stopped
    python compare.py runs/* --data-dir data --to assets/results     # 3 min: the figures of all runs

If the first finds a difference, run that case alone and mend it before the rest: a study made of wrong steps is worth
nothing. If a capture fails, `python tests/gpu.py --device cpu CASE` tells whether the graph or the resume is at fault,
and CUDA_GRAPH=0 lets the scripts train without graphs. The study's table holds seconds and images per second. Keep
`runs` and the output of every command.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS may vary

import torch  # noqa: E402

import common  # noqa: E402
from tests.bench import TRAININGS  # noqa: E402

CASES = {name: (training.script, training.options) for name, training in TRAININGS.items()} | {
    "dcgan-guo-full-ema": ("dcgan", "--augment full --ema 0.999"),
    "cvaegan-paper": ("cvaegan", "--weights paper"),
    "large": ("cvaegan", ""),
}
EPOCHS = 6  # of two steps: the first three make the optimizers' state, the fourth captures, the fifth replays


def load_random(name: str, data_dir: str, train: bool = True, size: int | None = None) -> common.Data:
    """Random images of a data set's shape."""
    shape = (1, 28, 28) if name in common.LABELLED else (3, size, size)
    images = torch.randint(0, 256, (512, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return common.Data(images, torch.arange(512) % 10 if name in common.LABELLED else None)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors and numbers of nested dicts and lists, with their paths; without the times of a history."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in ("seconds", "images per second"):
                yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


def first_difference(script_name: str, options: list[str], load_data: Callable = load_random, large=False) -> str:
    """The first place at which an eager run and a captured, resumed one differ, or ""; `large`: off the device."""
    script = importlib.import_module(script_name)
    steps, capture = [], common.capture

    def load_two_batches(*args, **kwargs) -> common.Data:
        data = load_data(*args, **kwargs)
        return common.Data(*(part if part is None else part[: 2 * batch_size] for part in data))

    def capture_and_keep(step: Callable, device: torch.device) -> Callable:
        steps.append(capture(step, device))
        torch.backends.cudnn.benchmark = False  # it may choose another algorithm each time
        return steps[-1]

    def train(folder: Path, epochs: int, capture: Callable, *more: str) -> dict:
        args = script.parse_args([*options, "--out-dir", str(folder), "--epochs", str(epochs), *more])
        with mock.patch.multiple(common, capture=capture, load_data=load_two_batches):
            script.train(args)
        return common.load_checkpoint(folder)

    batch_size = script.parse_args(options).batch_size
    with contextlib.ExitStack() as kept:
        folder = kept.enter_context(tempfile.TemporaryDirectory())
        kept.enter_context(contextlib.redirect_stdout(io.StringIO()))
        eager = train(Path(folder, "eager"), EPOCHS, lambda step, device: step)
        captured = Path(folder, "captured")
        if large:
            kept.enter_context(mock.patch.object(common.Data, "to", lambda data, device: data))
        checkpoint = train(captured, EPOCHS // 2, capture_and_keep)
        for optimizer in checkpoint["optimizers"].values():
            for group in optimizer["param_groups"]:
                group["capturable"] = False  # as a CPU leaves it: the optimizer that goes on keeps its own flags
        torch.save(checkpoint, captured / "checkpoint.pt")
        resumed = train(captured, EPOCHS, capture_and_keep, "--resume")
    for step in steps:
        if isinstance(step, common.GraphedStep) and step.graph is None:
            return "the graph, which was not made"
    if torch.device(eager["options"]["device"]).type == "cuda" and not isinstance(steps[-1], common.GraphedStep):
        return "the graph, which was not asked for"
    return difference(eager, resumed)


def difference(one: dict, other: dict) -> str:
    """The first tensor or figure that two checkpoints don't share, or ""."""
    kinds = ("networks", "optimizers", "history")
    ours, theirs = (dict(leaves({kind: run[kind] for kind in kinds})) for run in (one, other))
    if ours.keys() != theirs.keys():
        return min(ours.keys() ^ theirs.keys())
    for path, value in ours.items():
        same = torch.equal(value, theirs[path]) if isinstance(value, torch.Tensor) else value == theirs[path]
        if not same:
            return path
    return ""


def two_processes(options: list[str]) -> str:
    """The first place at which an unbroken and a resumed run of two processes differ, or ""."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "cvaegan.py"]
    with tempfile.TemporaryDirectory() as folder:
        for name, epochs, *more in (("one", 2), ("two", 1), ("two", 2, "--resume")):
            where = ["--dataset", "digits", "--batch-size", "500", "--out-dir", f"{folder}/{name}"]
            command = [*torchrun, *options, *where, "--epochs", str(epochs), *more]
            subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        return difference(*(common.load_checkpoint(Path(folder, name)) for name in ("one", "two")))


def measured_twice(options: list[str]) -> str:
    """The first of compare.py's figures that is another on the device than on the CPU, by more than 1 %, or ""."""
    import compare
    import vae

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        vae.main(["--dataset", "digits", "--epochs", "1", *options, "--out-dir", f"{folder}/run"])
        rows = []
        for kind in ("cpu", vae.parse_args(options).device):
            words = [f"{folder}/run", "--data-dir", folder, "--device", kind, "--samples", "1000", "--to"]
            compare.main([*words, f"{folder}/{kind}"])
            rows.append(json.loads(Path(f"{folder}/{kind}.json").read_text())["rows"][1])
    for name in compare.COLUMNS:
        if abs(rows[0].get(name, 0) - rows[1].get(name, 0)) > 0.01 * abs(rows[0].get(name, 0)):
            return f"{name}: {rows[0][name]} and {rows[1][name]}"
    return ""


OTHERS = {"processes": two_processes, "compare": measured_twice}


def lacking(name: str, options: list[str], load_data: Callable) -> str:
    """What this machine lacks for a case, or ""."""
    if name in OTHERS:
        return "two cards" if name == "processes" and "cuda" in options and torch.cuda.device_count() < 2 else ""
    script, words = CASES[name]
    args = importlib.import_module(script).parse_args([*words.split(), *options])
    try:
        load_data(args.dataset, args.data_dir, size=getattr(args, "image_size", None))
    except common.UserError as error:
        return str(error)
    return ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"of {', '.join([*CASES, *OTHERS])} (all)")
    parser.add_argument("--data-dir", help="folder with MNIST/raw and anime; what it lacks is left out (random images)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: two eager runs (cuda)")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - {*CASES, *OTHERS}:
        parser.error(f"no case named {', '.join(sorted(unknown))}: there are {', '.join([*CASES, *OTHERS])}")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("this machine has no CUDA: --device cpu compares two eager runs")
        torch.use_deterministic_algorithms(True)
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")

    load_data = functools.cache(common.load_data) if options.data_dir else load_random
    differing = []
    for name in options.names or [*CASES, *OTHERS]:
        words = ["--device", options.device, "--data-dir", options.data_dir or "data"]
        if lack := lacking(name, words, load_data):
            print(f"{name:20} left out: {lack}")
            continue
        for precision in ("fp32", "bf16"):
            start, words_now = time.perf_counter(), [*words, "--precision", precision]
            try:
                if name in OTHERS:
                    found = OTHERS[name](words_now)
                else:
                    script, own_words = CASES[name]
                    found = first_difference(script, [*own_words.split(), *words_now], load_data, name == "large")
            except (Exception, SystemExit):  # the other cases are worth their time
                traceback.print_exc()
                found = "the run, which failed"
            told = f"differs first in {found}" if found else "equal"
            print(f"{name:20}{precision:>6}{time.perf_counter() - start:>8.1f} s  {told}", flush=True)
            differing += [f"{name} in {precision}"] if found else []
    if differing:
        print(f"not equal: {', '.join(differing)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    with common.reporting_errors("gpu.py"):
        main()
