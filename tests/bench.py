"""Speed of every training against the conventional loop, both timed in turns in one process.

    python tests/bench.py --data-dir data                 # all trainings, at most eight minutes
    python tests/bench.py --data-dir data gan-guo         # some of them
    python tests/bench.py --scaling                       # how seconds grow with batch, image, data and processes

Prints images per second of both (the best of several rounds, data path included), the ratio, the ratio that is asked
for, and the share of our step spent outside matrix products and convolutions. Ends with status 1 when a ratio is too
low. Figures mean something only on an idle machine.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.14's profiler would write notes between the rows

import torch  # noqa: E402

import common  # noqa: E402
from tests import conventional  # noqa: E402


class Training(NamedTuple):
    script: str
    options: str
    asked: float  # times the conventional loop


TRAININGS = {
    "gan-guo": Training("gan", "--preset guo", 2.8),
    "gan-banerjee": Training("gan", "--preset banerjee", 1.0),
    "dcgan-guo": Training("dcgan", "--preset guo", 2.2),
    "dcgan-guo-anime": Training("dcgan", "--preset guo --dataset anime", 2.5),
    "dcgan-banerjee": Training("dcgan", "--preset banerjee", 1.7),
    "vae-guo": Training("vae", "--preset guo", 2.5),
    "vae-banerjee-linear": Training("vae", "--preset banerjee-linear", 1.8),
    "vae-banerjee-conv": Training("vae", "--preset banerjee-conv", 1.5),
    "cvaegan": Training("cvaegan", "", 2.0),
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "conv2d", "conv_transpose", "slow_conv", "linear_backward")


def cpu() -> common.Compute:
    """The processor in the precision that `--precision auto` takes there."""
    device = torch.device("cpu")
    return common.Compute(device, "bf16" if common.has_native_bf16(device) else "fp32")


def ours(script, args: argparse.Namespace, compute: common.Compute) -> Iterator[None]:
    """Our training, a step at a time."""
    size = getattr(args, "image_size", None)
    data = common.load_data(args.dataset, args.data_dir, size=size)
    networks = {name: network.to(compute.device) for name, network in script.build(args).items()}
    step = script.make_step(args, compute, networks, script.make_optimizers(args, networks))
    while True:
        for images, labels in common.batches(data, args.batch_size, compute.device):
            step(images, labels)
            yield


def seconds_of(steps: Iterator[None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.perf_counter() - start


def compare(steps: dict[str, Iterator[None]], seconds: float) -> dict[str, float]:
    """Seconds a step of each, the best of rounds that take turns, so that a busy moment of the machine hits all."""
    counts, best = {}, {}
    for name, iterator in steps.items():
        seconds_of(iterator, 3)
        best[name] = seconds_of(iterator, 3) / 3
        counts[name] = max(1, round(seconds / 12 / best[name]))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, iterator in steps.items():
            best[name] = min(best[name], seconds_of(iterator, counts[name]) / counts[name])
    return best


def share_outside_products(steps: Iterator[None], count: int) -> float:
    """The part of a step's time that is neither a matrix product nor a convolution: the median of five rounds.

    Each round sets the products of some steps against other steps beside them, which the profiler does not slow down.
    """
    shares = []
    for _ in range(5):
        seconds, inside = seconds_of(steps, count), 0.0
        with torch.profiler.profile() as profile:
            seconds_of(steps, count)
        for event in profile.key_averages():
            name = event.key.removeprefix("aten::").removeprefix("mkldnn_").lstrip("_")
            if name.startswith(PRODUCTS):
                inside += event.self_cpu_time_total / 1e6
        shares.append(1 - inside / seconds)
    return max(0.0, statistics.median(shares))


def step_seconds(script: str, options: str, size: int = 28, seconds: float = 4) -> float:
    """Seconds a step on random images."""
    module = importlib.import_module(script)
    args = module.parse_args(options.split())
    shape = (args.batch_size, 1, 28, 28) if size == 28 else (args.batch_size, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    networks = module.build(args)
    step = module.make_step(args, cpu(), networks, module.make_optimizers(args, networks))
    return compare({"": iter(lambda: step(images), None)}, seconds)[""]


def process_rate(count: int) -> float:
    """Images a second of `gan.py --preset banerjee` on digits with so many processes of one thread each."""
    options = "--preset banerjee --dataset digits --epochs 2 --batch-size 1024 --out-dir run"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [str(Path(common.__file__).with_name("gan.py")), *options.split()]
        subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        return common.load_checkpoint(Path(folder, "run"))["history"][-1]["images per second"]


def scaling() -> None:
    """Prints how time grows: a row a case, on random images."""
    print("batch size, gan.py --preset guo: microseconds an image")
    for size in (25, 50, 100, 200, 400, 800):
        print(f"{size:>12,}{step_seconds('gan', f'--batch-size {size}') / size * 1e6:>10.1f}")
    print("image size, dcgan.py on a folder, batch 32: milliseconds an image")
    for size in (32, 64, 128):
        seconds = step_seconds("dcgan", f"--dataset anime --batch-size 32 --image-size {size}", size, 8)
        print(f"{size:>12,}{seconds / 32 * 1e3:>10.2f}")
    print("images in a mapped cache (64x64): milliseconds to map, microseconds an image in random batches, once read")
    for count in (10_000, 100_000, 1_000_000):
        with tempfile.NamedTemporaryFile() as file:  # a sparse file: it takes no room
            size = count * 3 * 64 * 64
            file.truncate(size)
            start = time.perf_counter()
            images = torch.from_file(file.name, size=size, dtype=torch.uint8).view(count, 3, 64, 64)
            mapped = time.perf_counter() - start
            for _ in range(2):  # the same images twice: the first time they are read into memory
                torch.manual_seed(0)
                start = time.perf_counter()
                for _, _ in zip(range(70), common.batches(common.Data(images, None), 128)):
                    pass
            fetched = (time.perf_counter() - start) / 70 / 128
            print(f"{count:>12,}{mapped * 1e3:>10.2f}{fetched * 1e6:>10.1f}")
            del images
    print("processes of one thread, gan.py --preset banerjee, batch 1,024: images a second")
    for count in (1, 2):
        print(f"{count:>12,}{process_rate(count):>10,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"trainings to time, of {', '.join(TRAININGS)} (all)")
    parser.add_argument("--data-dir", default="data", help="folder with MNIST/raw and anime (data)")
    parser.add_argument("--seconds", type=float, default=36.0, help="time for each training, in seconds (36)")
    parser.add_argument("--scaling", action="store_true", help="print the second table instead")
    options = parser.parse_args()
    if options.scaling:
        return scaling()
    if unknown := set(options.names) - set(TRAININGS):
        parser.error(f"no training named {', '.join(sorted(unknown))}: there are {', '.join(TRAININGS)}")

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'training':24}{'batch':>6}{'ours':>10}{'convent.':>10}{'ratio':>7}{'asked':>7}{'outside':>9}")
    print(f"{'':24}{'':>6}{'images/s':>10}{'images/s':>10}{'':>7}{'':>7}{'products':>9}")
    slow = []
    for name in options.names or TRAININGS:
        training = TRAININGS[name]
        script = importlib.import_module(training.script)
        args = script.parse_args([*training.options.split(), "--data-dir", options.data_dir])
        common.seed_everything(0)
        steps = {
            "ours": ours(script, args, cpu()),
            "conventional": getattr(conventional, name.replace("-", "_"), getattr(conventional, training.script))(args),
        }
        best = compare(steps, options.seconds)
        ratio = best["conventional"] / best["ours"]
        outside = share_outside_products(steps["ours"], max(2, round(0.15 / best["ours"])))
        rates = [args.batch_size / best[which] for which in ("ours", "conventional")]
        print(
            f"{name:24}{args.batch_size:>6}{rates[0]:>10,.0f}{rates[1]:>10,.0f}"
            f"{ratio:>7.2f}{training.asked:>7.1f}{outside:>9.0%}",
            flush=True,
        )
        slow += [name] if ratio < training.asked else []
    if slow:
        raise SystemExit(f"slower than asked: {', '.join(slow)}")


if __name__ == "__main__":
    main()
