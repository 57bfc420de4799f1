"""Speed of every training against the conventional loop, both timed in turns in one process.

    python tests/bench.py --data-dir data                 # all trainings, at most eight minutes
    python tests/bench.py --data-dir data gan-guo         # some of them
    python tests/bench.py --data-dir data --device cuda   # by CUDA graphs; the conventional loop on the same card
    python tests/bench.py --scaling                       # how seconds grow with batch, image, data and processes

It prints images per second of both (the best of several rounds, data path included), their ratio, the ratio that is
asked for on a CPU, and the share of our step outside matrix products and convolutions. Status 1 says that a ratio is
too low. Figures mean something only on an idle machine.

The conventional loop (tests/conventional.py) is a torchvision data set through a DataLoader, sigmoid and BCELoss, fresh
noise for each player, `.item()` every step, plain Adam, float32. Ratios on four idle processors, 2 cores each, torch
2.14.1 (Zen 4: 2.15). The first two ran in bfloat16, the others, which lack it, in float32:

    training               asked   Xeon with AMX   EPYC Zen 4   Xeon Ice Lake   EPYC Zen 3
    gan-guo                  2.8            3.35         4.11            3.47         3.72
    gan-banerjee             1.0            2.68         3.10            2.96         2.81
    dcgan-guo *              2.2            2.86                                      1.77
    dcgan-guo-anime          2.5            3.32         2.24            1.52
    dcgan-banerjee           1.7            3.51         1.98            1.46         1.35
    vae-guo                  2.5            3.12         3.63            3.91         5.18
    vae-banerjee-linear      1.8            1.95         2.38            2.36         2.89
    vae-banerjee-conv        1.5            2.69         1.60            1.29         1.13
    cvaegan                  2.0            4.32         3.50            3.02         3.36

    * with the digits' discriminator before 1 December 2026; the new one was not timed

Where a gap is, nothing was measured. With AMX every training has the ratio that is asked for. Without bfloat16 those
that are nearly all convolutions have not. The faces take 2.27 GFLOP an image, 2.48 in the conventional loop (torch's
own count). They ran at 166 GFLOP/s on the Ice Lake, where a product of matrices ran at 150.

bfloat16 against float32, the same step, on the Xeon with AMX: gan-guo 0.96, gan-banerjee 1.28, vae-guo 1.02,
vae-banerjee-linear 1.12, dcgan-guo 1.29, cvaegan 1.21, vae-banerjee-conv 2.86.

What pays: images in memory as bytes, one pass of the generator for both players, gradients of one player at a time,
losses on logits, the fused optimizer, channels-last convolutions, bfloat16. What does not: `torch.compile` of the
networks made steps 2 to 20 % slower (gan.py, vae.py, dcgan.py on digits), before the 5 to 25 seconds that it takes.

--scaling on the Zen 4, measured apart from the table, in which gan-guo took 39.5 microseconds an image and not 51:

    batch of gan.py: 25, 100, 800                                        136, 51, 24 microseconds an image
    side of dcgan.py's images, batch 32: 32, 64, 128                     1.9, 8.2, 38 ms an image
    images in a mapped cache, in memory: 10 thousand, 100 thousand, 1 million      0.8, 0.8, 3.2 microseconds an image
    processes of one thread, gan.py --preset banerjee, batch 1,024: 1, 2           13,484, 19,305 images/s

Nothing here has been measured on a GPU yet.
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
os.environ.setdefault("TEARDOWN_CUPTI", "0")  # before CUDA 12.6 a second profile beside CUDA graphs crashes without it

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


def make_step(script, args: argparse.Namespace, device: torch.device):
    """Our step on new networks, in the precision that `--precision auto` takes, not captured yet."""
    networks = {name: network.to(device) for name, network in script.build(args).items()}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=common.has_native_bf16(device))
    return script.make_step(args, device, autocast, networks, script.make_optimizers(args, networks))


def ours(args: argparse.Namespace, data: common.Data, step, device: torch.device) -> Iterator[None]:
    """Our training, a step at a time."""
    while True:
        for images, labels in common.batches(data, args.batch_size, device):
            step(images, labels) if args.script == "cvaegan" else step(images)
            yield


def seconds_of(steps: Iterator[None], count: int, device: torch.device) -> float:
    """Seconds until `count` steps are done: on CUDA between two events, since a step returns before its work is."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    start = time.perf_counter()
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    return time.perf_counter() - start


def compare(steps: dict[str, Iterator[None]], seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds a step of each, the best of rounds that take turns, so that a busy moment of the machine hits all."""
    counts, best = {}, {}
    for name, iterator in steps.items():
        seconds_of(iterator, 5, device)  # the fourth step captures the graph
        best[name] = seconds_of(iterator, 3, device) / 3
        counts[name] = max(1, round(seconds / 12 / best[name]))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, iterator in steps.items():
            best[name] = min(best[name], seconds_of(iterator, counts[name], device) / counts[name])
    return best


def share_outside_products(steps: Iterator[None], eager: Iterator[None], count: int, device: torch.device) -> float:
    """The part of a step's time that is neither a matrix product nor a convolution: the median of five rounds.

    Each round sets the products of some steps, in the device's own time, against other steps beside them, which the
    profiler does not slow down. It watches `eager` steps: in a graph it can't tell whose the kernels are.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    shares = []
    seconds_of(eager, 3, device)
    for _ in range(5):
        seconds, inside = seconds_of(steps, count, device), 0.0
        with torch.profiler.profile(activities=activities) as profile:
            seconds_of(eager, count, device)
        for event in profile.key_averages():
            name = event.key.removeprefix("aten::").removeprefix("mkldnn_").removeprefix("cudnn_").lstrip("_")
            if name.startswith(PRODUCTS):
                inside += getattr(event, clock) / 1e6
        shares.append(1 - inside / seconds)
    return max(0.0, statistics.median(shares))


def random_steps(script: str, options: str, size: int, device: torch.device) -> Iterator[None]:
    """Our training on one batch of random images, again and again."""
    module = importlib.import_module(script)
    args = module.parse_args(options.split())
    shape = (args.batch_size, 1, 28, 28) if size == 28 else (args.batch_size, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    labels = torch.arange(args.batch_size).remainder(10).to(device)
    step = common.capture(make_step(module, args, device), device)
    while True:
        step(images, labels) if script == "cvaegan" else step(images)
        yield


def step_seconds(script: str, options: str, device: torch.device, size: int = 28, seconds: float = 4) -> float:
    """Seconds a step on random images, the best of several rounds."""
    return compare({"": random_steps(script, options, size, device)}, seconds, device)[""]


def process_rate(count: int) -> float:
    """Images a second of `gan.py --preset banerjee` on digits with so many processes of one thread each."""
    options = "--preset banerjee --dataset digits --epochs 2 --batch-size 1024 --device cpu --out-dir run"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [str(Path(common.__file__).with_name("gan.py")), *options.split()]
        subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        return common.load_checkpoint(Path(folder, "run"))["history"][-1]["images per second"]


def scaling(device: torch.device) -> None:
    """Prints how time grows: a row a case, on random images."""
    print("batch size, gan.py --preset guo: microseconds an image")
    for size in (25, 50, 100, 200, 400, 800):
        print(f"{size:>12,}{step_seconds('gan', f'--batch-size {size}', device) / size * 1e6:>10.1f}")
    print("image size, dcgan.py on a folder, batch 32: milliseconds an image")
    for size in (32, 64, 128):
        seconds = step_seconds("dcgan", f"--dataset anime --batch-size 32 --image-size {size}", device, size, 8)
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
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA, if any (auto)")
    parser.add_argument("--seconds", type=float, default=36.0, help="time for each training, in seconds (36)")
    parser.add_argument("--scaling", action="store_true", help="print the second table instead")
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = common.choose_device(options)
    if options.scaling:
        return scaling(device)
    if unknown := set(options.names) - set(TRAININGS):
        parser.error(f"no training named {', '.join(sorted(unknown))}: there are {', '.join(TRAININGS)}")

    on_cuda = device.type == "cuda"
    place = torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {place}, {'bf16' if common.has_native_bf16(device) else 'fp32'}")
    print(f"{'training':24}{'batch':>6}{'ours':>10}{'convent.':>10}{'ratio':>7}{'asked':>7}{'outside':>9}")
    print(f"{'':24}{'':>6}{'images/s':>10}{'images/s':>10}{'':>7}{'':>7}{'products':>9}")
    slow = []
    for name in options.names or TRAININGS:
        training = TRAININGS[name]
        script = importlib.import_module(training.script)
        args = script.parse_args([*training.options.split(), "--data-dir", options.data_dir])
        data = common.load_data(args.dataset, args.data_dir, size=getattr(args, "image_size", None)).to(device)
        common.seed_everything(0)
        step = common.capture(make_step(script, args, device), device)
        conventional_steps = getattr(conventional, training.script)(args, device)
        steps = {"ours": ours(args, data, step, device), "conventional": conventional_steps}
        best = compare(steps, options.seconds, device)
        ratio = best["conventional"] / best["ours"]
        eager = ours(args, data, make_step(script, args, device), device) if on_cuda else steps["ours"]
        outside = share_outside_products(steps["ours"], eager, max(2, round(0.15 / best["ours"])), device)
        rates = [args.batch_size / best[which] for which in ("ours", "conventional")]
        asked = "" if on_cuda else f"{training.asked:.1f}"
        print(
            f"{name:24}{args.batch_size:>6}{rates[0]:>10,.0f}{rates[1]:>10,.0f}{ratio:>7.2f}{asked:>7}{outside:>9.0%}",
            flush=True,
        )
        slow += [name] if not on_cuda and ratio < training.asked else []
    if slow:
        raise SystemExit(f"slower than asked: {', '.join(slow)}")


if __name__ == "__main__":
    with common.reporting_errors("bench.py"):
        main()
