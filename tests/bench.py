"""Speed of every training against the conventional loop, both timed in turns in one process.

    python tests/bench.py --data-dir data                 # all trainings, at most eight minutes
    python tests/bench.py --data-dir data gan-guo         # some of them
    python tests/bench.py --data-dir data --device cuda   # by CUDA graphs; the conventional loop on the same card
    python tests/bench.py --scaling                       # how seconds grow with batch, image, data and processes
    python tests/bench.py --busy                          # what threads cost on a busy machine: four minutes

The first table has images per second of both (the best of several rounds, data path included), the ratio, the ratio
that is asked for on a CPU, and the share of our step spent outside matrix products and convolutions. Status 1 says
that a ratio is too low. Figures mean something only on an idle machine.

The conventional loop (tests/conventional.py) is a torchvision data set through a DataLoader, sigmoid and BCELoss, fresh
noise for each player, `.item()` every step, plain Adam, float32. AMD EPYC (Zen 4), 2 cores, torch 2.15, bfloat16:

    torch 2.15.0+cu132, 2 threads
    training                 batch      ours  convent.  ratio  asked  outside
                                    images/s  images/s               products
    gan-guo                    100    25,304     6,151   4.11    2.8      49%
    gan-banerjee               128    14,122     4,556   3.10    1.0      51%
    dcgan-guo-anime            128       139        62   2.24    2.5       4%
    dcgan-banerjee             128       413       209   1.98    1.7      10%
    vae-guo                    128    41,815    11,527   3.63    2.5      54%
    vae-banerjee-linear         64    15,943     6,707   2.38    1.8      52%
    vae-banerjee-conv          128       713       445   1.60    1.5       9%
    cvaegan                    128     2,317       661   3.50    2.0      27%

The faces miss their mark: all but 4 % of that step is convolutions, near the processor's peak but for their weight
gradients. What pays: images in memory as bytes, one pass of the generator for both players, gradients of one player at
a time, losses on logits, the fused optimizer, channels-last convolutions, bfloat16. What does not: `torch.compile` of
the networks made steps 2 to 20 % slower here (gan.py, vae.py, dcgan.py on digits), before counting the 5 to 25 seconds
that it takes.

A processor without bfloat16 gains less where convolutions are all there is. Intel Xeon (Ice Lake, 2.8 GHz), 2 cores,
torch 2.14.1, float32:

    gan-guo                    100    12,036     3,465   3.47    2.8      48%
    gan-banerjee               128     5,450     1,841   2.96    1.0      58%
    dcgan-guo-anime            128        73        48   1.52    2.5       1%
    dcgan-banerjee             128       223       153   1.46    1.7      10%
    vae-guo                    128    26,499     6,772   3.91    2.5      69%
    vae-banerjee-linear         64     8,381     3,559   2.36    1.8      65%
    vae-banerjee-conv          128       427       332   1.29    1.5       9%
    cvaegan                    128     1,328       440   3.02    2.0      27%

AMD EPYC (Zen 3), 2 cores, torch 2.14.1, float32, `--seconds 6`; the digits' dcgan-guo was timed here alone, the faces
were not:

    gan-guo                    100    13,399     3,603   3.72    2.8      32%
    gan-banerjee               128     8,804     3,137   2.81    1.0      37%
    dcgan-guo                  128     1,599       902   1.77    2.2      15%
    dcgan-banerjee             128       197       146   1.35    1.7      10%
    vae-guo                    128    36,075     6,962   5.18    2.5      52%
    vae-banerjee-linear         64    13,515     4,683   2.89    1.8      50%
    vae-banerjee-conv          128       348       308   1.13    1.5       9%
    cvaegan                    128     1,847       551   3.36    2.0      24%

A step of the faces takes 2.27 GFLOP an image, the conventional one 2.48 (torch's own count). 73 images a second are 166
GFLOP/s, and a product of 4096x4096 matrices reached 150 there: in float32 nothing near 2.5 times can be had. That
machine's speed varies by a third from minute to minute. The share outside products is the median of five rounds; in the
first table one profile was set against the best step, which gives lower figures.

--scaling on the first machine:

    batch of gan.py: 25, 100, 800                                        136, 51, 24 microseconds an image
    side of dcgan.py's images, batch 32: 32, 64, 128                     1.9, 8.2, 38 ms an image
    images in a mapped cache, in memory: 10 thousand, 100 thousand, 1 million      0.8, 0.8, 3.2 microseconds an image
    processes of one thread, gan.py --preset banerjee, batch 1,024: 1, 2           13,484, 19,305 images/s

--busy on two cores of an AMD EPYC (Zen 3), torch 2.14.1, milliseconds a step. Threads of OpenMP spin at every barrier,
so that one other busy process costs not half of two cores but two thirds and more:

                                                         gan-guo   vae-guo   cvaegan dcgan-guo
    idle, as started                                         6.3       3.9      73.3      83.9
    idle, OMP_WAIT_POLICY=PASSIVE                            7.1       4.5      77.9      88.4
    idle, OMP_NUM_THREADS=1                                  9.3       5.4     119.7     153.5
    beside one busy process, as started                     17.5      14.1     206.6     269.6
    beside one busy process, OMP_WAIT_POLICY=PASSIVE        10.5       6.4     122.2     160.1
    beside one busy process, OMP_NUM_THREADS=1               8.3       5.0     117.8     144.1

No setting is both within 5 % on an idle machine and within 1.3 times of one thread on a busy one, for all four. Nearest
is GOMP_SPINCOUNT=300, with the same bits: idle 5.9, 3.5 and 81.5 where as started gave 5.5, 3.4 and 80.2 just before;
busy 11.1, 7.0 and 166 where one thread gave 8.7, 5.2 and 153. With 1,000 busy took 13.3, with 100 idle took 6.6.

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
BUSY = ("gan-guo", "vae-guo", "cvaegan", "dcgan-guo")
THREADS = {
    "as started": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


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


def print_mean_milliseconds(script: str, options: str, seconds: float) -> None:
    """Milliseconds a step on the CPU, over all of the time: a busy machine's best moment says nothing."""
    device = torch.device("cpu")
    steps = random_steps(script, options, 28, device)
    seconds_of(steps, 3, device)
    count = max(3, round(seconds / (seconds_of(steps, 3, device) / 3)))
    print(seconds_of(steps, count, device) / count * 1e3)


def print_busy_rows(place: str, seconds: float) -> None:
    """A row for each setting of the threads, each cell in a process of its own: OpenMP reads them when it starts."""
    for title, settings in THREADS.items():
        print(f"{place}, {title}".ljust(50), end="")
        for name in BUSY:
            arguments = (TRAININGS[name].script, TRAININGS[name].options, seconds)
            command = [sys.executable, "-c", f"import tests.bench as b; b.print_mean_milliseconds{arguments}"]
            root = Path(common.__file__).parent
            told = subprocess.check_output(command, cwd=root, env=os.environ | settings, text=True)
            print(f"{float(told):>10.1f}", end="", flush=True)
        print()


def busy(seconds: float) -> None:
    """Prints what threads cost while another process works."""
    print("milliseconds a step".ljust(50) + "".join(f"{name:>10}" for name in BUSY))
    print_busy_rows("idle", seconds)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        print_busy_rows("beside one busy process", seconds)
    finally:
        other.kill()


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
    parser.add_argument("--seconds", type=float, help="time for each training, in seconds (36; --busy: 5)")
    parser.add_argument("--scaling", action="store_true", help="print the second table instead")
    parser.add_argument("--busy", action="store_true", help="print the third table instead")
    options = parser.parse_args()
    if options.busy:
        return busy(options.seconds or 5.0)
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
        best = compare(steps, options.seconds or 36.0, device)
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
