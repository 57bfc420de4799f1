"""Data and device helpers for the four scripts, and what a run leaves on the disk; no model.

In reading order: errors and files, the command line, device and processes, optimizer steps, data,
pictures, a run's folder, sampling. Images are uint8 (N, C, H, W) until a training step uses them.
"""

import argparse
import atexit
import contextlib
import csv
import errno
import functools
import hashlib
import importlib
import io
import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

LABELLED = ("mnist", "fashion", "digits")  # data sets of 28x28 grey images in ten classes
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # others may start programs
CHECKPOINT_FORMAT = 1
NOT_KEPT = {"script", "out_dir", "resume", "sample", "to", "label", "evaluate", "checkpoint"}
TEMPORARY = f".*.{'[0-9a-f]' * 12}.tmp"  # the names of `replacing`
SAVE_SECONDS = 10  # between two checkpoints, when epochs are shorter
COLOURS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()


# --------------------------------------------------------------------------------- errors and files
class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2."""


def message_lines(error: Exception) -> list[str]:
    """Those of a library's message, at least one: of an empty message the error's type."""
    return (str(error).strip() or type(error).__name__).splitlines()


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path that replaces `path` at the end, whole, or not at all. Raises UserError."""
    path = Path(path)
    made = not path.parent.exists()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:  # for the case of a power cut
            with open(temporary, "rb+") as file:
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                        raise  # else the file system knows no such thing
        for _ in range(10):
            with contextlib.suppress(PermissionError):  # on Windows, while another program reads it
                os.replace(temporary, path)
                return
            time.sleep(0.1)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            if made:
                path.parent.rmdir()  # if it is empty


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder: SQLite locks on every system, until a process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            sqlite3 = importlib.import_module("sqlite3")  # which some Pythons lack
            lock = stack.enter_context(contextlib.closing(sqlite3.connect(folder / ".lock", timeout=0)))
            lock.execute("PRAGMA journal_mode = MEMORY")  # no second file
            lock.execute("BEGIN EXCLUSIVE")
        except Exception as error:
            if "locked" in str(error):
                raise UserError(f"another process writes to {folder}: wait, or name another folder") from error
            show_line(f"no lock on {folder} ({error}): let no other process write there")
        yield


def clock(seconds: float) -> str:
    """Seconds as 0:00:05."""
    return str(timedelta(seconds=min(round(seconds), 10**13)))  # which is near timedelta's limit


def on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def show_line(line: str, end: str = "\n") -> None:
    """Print a line, in process 0 alone; on a terminal it replaces an unfinished one, cut to fit."""
    if on_terminal():
        line = "\r" + (line if end else line[: shutil.get_terminal_size().columns - 1]) + "\x1b[K"
    if rank() == 0:
        print(line, end=end, flush=True)


class Progress:
    """A line of the work done, its rate and the time left: rewritten, or now and then a new one."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit, self.start, self.first = total, unit, None, 0
        self.shown = time.monotonic()

    def update(self, done: int, text: str = "") -> None:
        now = time.monotonic()
        if self.start is None:  # the time before the first result tells nothing of the rate
            self.start, self.first = now, done
        if now - self.shown > (0.2 if on_terminal() else 10) and done > self.first:
            self.shown, rate = now, (done - self.first) / (now - self.start)
            left = clock((self.total - done) / rate)
            line = f"{done:,} of {self.total:,} {self.unit}, {rate:,.1f} a second, {left} left {text}"
            show_line(line, end="" if on_terminal() else "\n")


# --------------------------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, and ignores a notebook's own arguments."""

    def parse_known_args(self, args=None, namespace=None):
        in_cell = args is None and "kernel_launcher" in sys.argv[0]
        return super().parse_known_args([] if in_cell else args, namespace)

    def error(self, message: str):
        leave(2, self.prog, f"error: {message}")


def leave(status: int, program: str, message: str) -> NoReturn:
    """End with a status and one line on standard error, whatever names from outside are in it."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    if on_terminal():
        show_line("", end="")  # off the unfinished progress line
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def absolute_path(text: str) -> str:
    return os.path.abspath(os.path.expanduser(text))


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite int or float in [low, high], or in (low, high] if `above`."""
    noun = "a whole number" if kind is int else "a number"
    noun += f" above {low:g}" if above else f" of at least {low:g}"
    noun += f" and at most {high:g}" if high < math.inf else ""

    def convert(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and abs(value) < 2**63 and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}")

    return convert


def parse(parser: Parser, presets: dict, argv: list[str] | None) -> argparse.Namespace:
    """What was typed, over the checkpoint's options (if one is asked for), over the preset's."""
    args = parser.parse_args(argv)
    numbers = dict(presets[args.preset])
    of_folders = numbers.pop("folder", {})  # what differs for folders of images
    if args.dataset not in LABELLED:
        if not any("folder" in preset for preset in presets.values()):
            names = ", ".join(LABELLED)
            parser.error(f"--dataset {args.dataset} is none of {names}; folders of images are for dcgan.py")
        numbers |= of_folders
    script = parser.prog.removesuffix(".py")
    out_dir = args.out_dir or f"runs/{script}-{args.preset}-{Path(args.dataset).name}"
    parser.set_defaults(**numbers, script=script, out_dir=out_dir, checkpoint=None)
    args = parser.parse_args(argv)
    if args.to is not None and args.sample is None:
        parser.error("--to says where --sample writes: give --sample N too")
    if args.sample is not None and args.resume:
        parser.error("--sample draws from a finished run, --resume trains: give one of them")
    if not (args.resume or args.sample is not None or getattr(args, "evaluate", False)):
        return args
    checkpoint = load_checkpoint(out_dir, script)
    stored, fresh = checkpoint["options"], run_options(args)
    if {k: type(v) for k, v in stored.items()} != {k: type(v) for k, v in fresh.items()}:
        odd = sorted(set(stored) ^ set(fresh)) or "of other types"
        parser.error(f"the checkpoint is of another {script}.py (options {odd}): train anew")
    parser.set_defaults(**stored, checkpoint=checkpoint)
    args = parser.parse_args(argv)
    free = {"epochs", "data_dir", "device", "precision"} | (set() if args.resume else {"seed"})
    if not {args.dataset, stored["dataset"]} & set(LABELLED):
        free.add("dataset")  # the images may have moved: Run tells whether they are the same
    for name, value in run_options(args).items():
        if value != stored[name] and name not in free:
            typed, own = f"--{name.replace('_', '-')} {value}", stored[name]
            parser.error(f"{typed} contradicts the checkpoint's {own}: leave it out, or train anew")
    return args


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint keeps."""
    return {name: value for name, value in vars(args).items() if name not in NOT_KEPT}


@contextlib.contextmanager
def reporting_errors(program: str) -> Iterator[None]:
    """End with a line, not a traceback: status 2 for a mistake, 130 for Ctrl-C and SIGTERM."""
    program += f" (process {rank()})" if rank() else ""
    with contextlib.suppress(ValueError):  # outside the main thread Python allows no handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for kind in (signal.SIGINT, signal.SIGTERM):  # another, while Python ends, is ignored
        atexit.register(signal.signal, kind, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # a notebook's output, or none at all
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early takes its connections with it
    except KeyboardInterrupt as interrupt:
        leave(130, program, str(interrupt) or "interrupted: a training goes on with --resume")
    except BrokenPipeError as error:
        sys.stdout = None  # nobody reads it any more
        leave(2, program, f"error: the output was closed: {error.strerror}")
    except (UserError, OSError) as error:
        leave(getattr(error, "status", 2), program, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()  # torch has no type for the processor's memory
        if isinstance(error, MemoryError) or ("alloc" in text and "memory" in text):
            leave(2, program, "error: out of memory: a smaller --batch-size needs less")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------- device and processes
def rank() -> int:
    """This process's number under torchrun, else 0. Only process 0 prints and writes."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


def processes() -> int:
    """How many processes torchrun started, else 1."""
    started = {"RANK", "MASTER_ADDR", "WORLD_SIZE"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if started else 1


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that `--device` names; UserError if it is absent. Joins torchrun's processes."""
    try:
        importlib.import_module("torchvision")
        ImageFont.load_default(size=12)  # which needs FreeType
        best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    except Exception as error:  # libraries that don't fit each other raise anything
        raise UserError(f"{message_lines(error)[0]}: pip install -r requirements.txt mends it") from error
    kind = best if args.device == "auto" else args.device
    if kind not in ("cpu", best):
        raise UserError(f"--device {kind}: this machine has {best}; --device auto takes it")
    device = torch.device(kind)
    if kind == "cuda":
        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > cards:
            raise UserError(f"{here} processes, {cards} GPUs: take --nproc-per-node={cards}, or --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if processes() > 1 and not dist.is_initialized():
        # A day: the others wait while the first decodes a folder; torchrun ends all if one is lost.
        how = dict(timeout=timedelta(days=1), device_id=device if kind == "cuda" else None)
        try:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", **how)
        except (ValueError, RuntimeError) as error:  # variables of a launcher, but not all
            raise UserError(f"can't join {processes()} processes: {error}") from error
    return device


def choose_autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """A context for matrix products and convolutions in `--precision`. Prints it and the device."""
    precision, why = args.precision, "as asked"
    if precision == "auto":
        native = has_native_bf16(device)
        precision, why = ("bf16", "native here: yes") if native else ("fp32", "native here: no")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name += f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name += f", {processes()} processes" if processes() > 1 else ""
    show_line(f"{args.script}: device {name}; precision {precision} (bf16 {why})")
    load = 0
    with contextlib.suppress(AttributeError, OSError):  # not every system tells
        load = os.getloadavg()[0]
    if device.type == "cpu" and 1 < torch.get_num_threads() > (os.cpu_count() or 1) - load + 0.5:
        show_line(f"{args.script}: this machine is busy (load {load:.1f}): OMP_NUM_THREADS=1 is faster then")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied in hardware; others (a T4, an older CPU) emulate it slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if device.type == "cpu" and cpuinfo.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed all that is random from both: of what came before, an epoch sees the weights alone."""
    # The CPU's generator keeps 32 bits of its seed: mix, so that no two epochs of two seeds agree.
    torch.manual_seed(int(hashlib.sha256(f"{seed} {epoch}".encode()).hexdigest()[:8], 16))


def rand(count: int, *shape: int, device: torch.device | str) -> Tensor:
    """This process's rows (count, *shape) of the numbers in [0, 1) drawn for the whole batch."""
    return own_rows(torch.rand(count * processes(), *shape, device=device))


def randn(count: int, *shape: int, device: torch.device | str) -> Tensor:
    """This process's rows (count, *shape) of the Gaussian noise drawn for the whole batch."""
    return own_rows(torch.randn(count * processes(), *shape, device=device))


def own_rows(whole: Tensor) -> Tensor:
    """This process's share of what every process has drawn alike for the whole batch."""
    return whole.chunk(processes())[rank()]


class Dropout2d(nn.Dropout2d):
    """nn.Dropout2d, which under several processes draws other masks in each."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        ones = values.new_ones(len(values) * processes(), values.shape[1], 1, 1)
        return values * own_rows(nn.functional.dropout2d(ones, self.p))


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum. Its gradient reaches this process's part, weighed for apply_gradients' average."""
    if not dist.is_initialized():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + processes() * (values - values.detach())


# ---------------------------------------------------------------------------------- optimizer steps
def adam(parameters, lr: float, beta1: float = 0.9) -> torch.optim.Adam:
    """Adam in one kernel a step (fused), which a CUDA graph can capture."""
    parameters = list(parameters)
    kind = parameters[0].device.type
    graphed = kind == "cuda" and processes() == 1 and os.environ.get("CUDA_GRAPH") != "0"
    return torch.optim.Adam(parameters, lr, (beta1, 0.999), fused=kind in ("cpu", "cuda"), capturable=graphed)


def gradients(loss: Tensor, optimizer: torch.optim.Optimizer, retain: bool = False) -> tuple:
    """Gradients of `loss` for this optimizer's parameters alone: other networks cost nothing."""
    return torch.autograd.grad(loss, optimizer.param_groups[0]["params"], retain_graph=retain)


def apply_gradients(gradients: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` down the gradients, averaged over all processes."""
    if dist.is_initialized():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.div_(processes()).split([gradient.numel() for gradient in gradients])
        gradients = [part.view(gradient.shape) for part, gradient in zip(parts, gradients)]
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients):
        if gradient.stride() != parameter.stride():  # the fused kernel walks both in memory order
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    optimizer.step()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step down `loss`; moves no other network and leaves no gradient on one."""
    apply_gradients(gradients(loss, optimizer), optimizer)


def distribute(network: nn.Module) -> nn.Module:
    """Batch norm over the whole batch instead of each process's share, where it can be (CUDA)."""
    shared = processes() > 1 and any(parameter.is_cuda for parameter in network.parameters())
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if shared else network


def capture(step: Callable, device: torch.device) -> Callable:
    """`step` as one CUDA graph, where that can be unless the environment has CUDA_GRAPH=0."""
    if device.type != "cuda" or os.environ.get("CUDA_GRAPH") == "0":
        return step
    if processes() > 1:
        show_line("no CUDA graph: several processes exchange gradients within a step")
        return step
    warnings.filterwarnings("ignore", message=".*capturable=True.*")  # of steps before the capture
    return GraphedStep(step)


class GraphedStep:
    """A training step replayed as one CUDA graph; the next replay overwrites its results."""

    def __init__(self, step: Callable):
        self.step, self.calls, self.graph, self.stream = step, 0, None, torch.cuda.Stream()

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
        batch = [part for part in batch if part is not None]
        self.calls += 1
        if self.calls <= 3:  # real steps, on the capture's stream, make the optimizers' state
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.run(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.graph is None:
            self.batch, self.graph = [part.clone() for part in batch], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.losses = self.run(self.batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = message_lines(error)[0]
                raise UserError(f"a step can't be captured ({why}): set CUDA_GRAPH=0") from error
        for own, part in zip(self.batch, batch):
            own.copy_(part)
        self.graph.replay()
        return self.losses

    def run(self, batch) -> dict[str, Tensor]:
        return {name: loss.detach() for name, loss in self.step(*batch).items()}


# --------------------------------------------------------------------------------------------- data
class Data(NamedTuple):
    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None  # int64 (N,), or None for a folder of images

    def to(self, device: torch.device) -> "Data":
        """The same on the device, if the images fit into half of its free memory."""
        if device.type != "cuda" or self.images.nbytes >= torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return Data(self.images.to(device), None if self.labels is None else self.labels.to(device))

    def digest(self) -> str:
        """What tells these images from others, wherever they lie: their shape, a hash of 1,000."""
        some = self.images[:: -(-len(self.images) // 1000)].cpu().contiguous()
        return f"{list(self.images.shape)} {hashlib.sha256(some.numpy().tobytes()).hexdigest()}"


def load_data(name: str, data_dir: str | Path, train: bool = True, size: int | None = None) -> Data:
    """mnist, fashion, digits 1x28x28 with labels; anime or a folder 3 x size x size. Or UserError."""
    if rank() > 0:
        dist.barrier()  # until the first process is through: it downloads and builds caches
    if name == "digits":
        data = draw_digits(train)
    elif name in LABELLED:
        data = load_idx(name, Path(data_dir), train)
    else:
        folder = Path(data_dir, "anime") if name == "anime" else Path(name)
        data = Data(load_folder(folder, size, Path(data_dir)), None)
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    return data


def load_idx(name: str, data_dir: Path, train: bool) -> Data:
    """MNIST or Fashion-MNIST in torchvision's layout, <data_dir>/<MNIST or FashionMNIST>/raw."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[name]
    raw, parts = data_dir / kind.__name__ / "raw", ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = [raw / f"{'train' if train else 't10k'}-{part}" for part in parts]
    nested = [file / file.name for file in files]  # as some programs unpack them
    files = nested if all(file.is_file() for file in nested) else files
    if not all(file.exists() for file in files):
        show_line(f"downloading {kind.__name__} to {raw}")
        socket.setdefaulttimeout(60)  # for a server that says nothing
        try:
            kind(data_dir, download=True)
        except Exception as error:  # whatever a server's answer leads to
            cause = message_lines(error)[-1]
            names = ", ".join(f"{split}-{part}" for split in ("train", "t10k") for part in parts)
            way_out = f"put {names} into {raw}, or try --dataset digits, which needs none"
            raise UserError(f"{kind.__name__} can't be downloaded ({cause}): {way_out}") from error
        finally:
            socket.setdefaulttimeout(None)
    try:
        images = datasets.mnist.read_image_file(str(files[0]))
        labels = datasets.mnist.read_label_file(str(files[1]))
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:  # of no labels an error
            raise ValueError
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise UserError(f"{files[0]} or its labels are damaged: delete both to fetch them again") from error
    return Data(images[:, None], labels.long())


def draw_digits(train: bool = True) -> Data:
    """Digits in Pillow's font, turned, slanted and sized at random; always the same pictures."""
    count, seed = (10_000, "digits") if train else (2_000, "digits, test")
    chance, font, glyphs = random.Random(seed), ImageFont.load_default(size=64), {}
    for digit, stroke in itertools.product(range(10), range(4)):
        glyphs[digit, stroke] = glyph = Image.new("L", (96, 96))
        ImageDraw.Draw(glyph).text((48, 48), str(digit), 255, font, anchor="mm", stroke_width=stroke)
    labels = [i % 10 for i in range(count)]
    chance.shuffle(labels)
    pictures = bytearray()
    for label in labels:
        angle, slant = chance.gauss(0, 0.12), chance.gauss(0, 0.15)
        across, down = chance.uniform(1.05, 1.6), chance.uniform(1.1, 1.4)  # glyph pixels a pixel
        cos, sin = math.cos(angle), math.sin(angle)
        a, b = across * (cos + slant * sin), across * (slant * cos - sin)
        d, e = down * sin, down * cos
        x, y = 28 + chance.uniform(-3, 3), 28 + chance.uniform(-3, 3)
        matrix = (a, b, 48 - a * x - b * y, d, e, 48 - d * x - e * y)
        glyph = glyphs[label, chance.randrange(4)]
        glyph = glyph.transform((56, 56), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        pictures += glyph.reduce(2).tobytes()
    images = torch.frombuffer(pictures, dtype=torch.uint8).view(count, 1, 28, 28)
    return Data(images, torch.tensor(labels))


def load_folder(folder: Path, size: int, data_dir: Path) -> Tensor:
    """The images under `folder` as uint8 (N, 3, size, size), mapped from a file made once in `data_dir`."""
    if not folder.is_dir():
        hint = "--dataset takes a name or a folder; python crawl_anime.py fills data/anime"
        raise UserError(f"there is no folder {folder} ({hint})")
    names, digest = list_files(folder)
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    name = folder.name.encode(errors="replace")[:150].decode(errors="ignore")  # 255 is a limit
    cache = data_dir / f"{name}-{place}-{digest}-{size}.images"
    found = next(data_dir.glob(f"*-{digest}-{size}.images"), None)  # made here, or before a move
    if found:
        cache, count, told = found, found.stat().st_size // (3 * size * size), " (cached)"
        if (broken := sum(map(claims_a_picture, names)) - count) > 0:
            told += f"; skipped {broken:,} files"
    else:
        count, told = build_cache(cache, folder, names, size)
        for earlier in {*data_dir.glob(f"*-{place}-{'?' * len(digest)}-{size}.images")} - {cache}:
            with contextlib.suppress(OSError):
                earlier.unlink()
    show_line(f"{count:,} images in {folder}{told}")
    return map_file(cache, count * 3 * size * size).view(count, 3, size, size)


def map_file(path: Path, size: int, shared: bool = False) -> Tensor:
    """A file's first bytes, mapped: uint8 (size,). If `shared`, the file gets what is written."""
    try:
        return torch.from_file(str(path), shared=shared, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(f"{path} can't be mapped: {message_lines(error)[0]}") from error


def list_files(folder: Path) -> tuple[list[str], str]:
    """Relative paths of all files but hidden ones, sorted, and a digest that changes with them."""

    def fail(error: OSError):
        raise UserError(f"can't read {error.filename}: {error.strerror}") from error

    files, seen = [], set()
    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (place := os.path.realpath(directory)) in seen or (seen and ".made" in names):
            folders.clear()  # reached by a link, perhaps to where we are, or a run's own pictures
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")  # those that are walked
        for path in (os.path.join(directory, name) for name in names if name[0] != "."):
            with contextlib.suppress(OSError):  # removed by now
                if os.path.isfile(path) and not path.endswith(".images"):
                    name, status = os.path.relpath(path, folder), os.stat(path)
                    files.append((name, status.st_size, status.st_mtime_ns))
    files.sort()
    text = "".join(f"{name}\0{size}\0{modified}\0" for name, size, modified in files)
    return [name for name, _, _ in files], hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def build_cache(cache: Path, folder: Path, names: list[str], size: int) -> tuple[int, str]:
    """Decode files into a mapped file, which may exceed memory: how many, and what was skipped."""
    for leftover in cache.parent.glob(".*.images.*.tmp"):  # of builders that were killed
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    count, skipped, length, progress = 0, [], 3 * size * size, Progress(len(names), "files")
    with replacing(cache) as temporary:
        with open(temporary, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # on a mapped page a full disk is a signal
                os.posix_fallocate(file.fileno(), 0, max(1, len(names)) * length)
        pixels = map_file(temporary, len(names) * length, shared=True)
        decode = functools.partial(decode_files, folder=folder, size=size)
        decoded = map_in_workers(decode, names, workers=len(names) // 256)
        for i, (picture, name) in enumerate(zip(decoded, names), start=1):  # this order: to its end
            if isinstance(picture, OSError):
                raise UserError(f"can't read {folder / name}: {picture.strerror}")
            if isinstance(picture, str):
                skipped.append(f"{name} ({picture})")
            elif picture is not None:
                pixels[count * length :][:length] = torch.frombuffer(picture, dtype=torch.uint8)
                count += 1
            progress.update(i)
        first = "".join(c if c.isprintable() else "?" for c in ", ".join(skipped[:3] or ["other kinds"]))
        if not count:
            what = f"{len(names):,} files, none a usable image: {first}" if names else "no file"
            raise UserError(f"{folder} holds {what}; {', '.join(IMAGE_FORMATS)} are read")
        del pixels
        os.truncate(temporary, count * length)
    more = ", ..." if len(skipped) > 3 else ""
    return count, f"; skipped {len(skipped):,} files: {first}{more}" if skipped else ""


def map_in_workers(function: Callable, items: list, workers: int) -> Iterator:
    """All results, in order, of function(part) -> list for parts of items, in up to 8 processes."""
    workers = min(workers, os.cpu_count() or 1, 8)  # each holds the libraries: about 0.2 GB
    how = dict(num_workers=workers, multiprocessing_context="spawn", worker_init_fn=end_if_orphaned)
    interrupted = False
    try:
        with interrupts_wait(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer cores than processes
            parts = iter(DataLoader(Itself(), 16, sampler=items, collate_fn=function, **how if workers else {}))
        for results in parts:
            yield from results
    except RuntimeError as error:
        why = 'out of memory, or a program without `if __name__ == "__main__":`'
        raise UserError(f"lost a process that decodes, perhaps {why}: {message_lines(error)[0]}") from error
    except KeyboardInterrupt:
        interrupted = True  # and no traceback holds the processes
    with interrupts_wait():
        parts = None  # ends them now, and not as failures when this process exits
    if interrupted:
        raise KeyboardInterrupt


class Itself:
    """A data set whose items are their own indices: processes start without the list, which would fill
    the pipe to one that fails to start, and Python would wait for it for ever."""

    def __getitem__(self, item):
        return item


def end_if_orphaned(_) -> None:
    """Torch's own watch misses a parent that was killed while this process started."""
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect at the end. Processes that are started within never get it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    came = []
    resource_tracker.ensure_running()  # its start would unblock signals
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))  # of threads that don't block it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit that
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def decode_files(names: list[str], folder: Path, size: int) -> list:
    return [decode_file(folder / name, size) for name in names]


def decode_file(path: Path, size: int) -> bytearray | str | OSError | None:
    """Pixels, 3 x size x size, or why there are none, now or ever; None for a file of another kind."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        image = ImageOps.fit(open_picture(path, size), (size, size), Image.Resampling.BICUBIC)
        return bytearray().join(band.tobytes() for band in image.split())
    except MemoryError:
        return OSError(errno.ENOMEM, "out of memory")
    except OSError as error:
        return error
    except ValueError as error:
        if str(error) != "no image":
            return str(error)[:80]
    if kind and kind not in IMAGE_FORMATS:
        return f"{kind} is not read"
    return "no image" if claims_a_picture(path.name) else None


def claims_a_picture(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return not suffix or suffix in Image.registered_extensions()


def open_picture(source: Path | bytes, size: int = 0) -> Image.Image:
    """A picture by its content as RGB; a large JPEG at about twice `size`. Raises ValueError that says
    why there is none, OSError when the file can't be read now."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    with opened as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # before pixels are read
        is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
        try:
            return decode_picture(file, size)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError("too large") from None
        except Image.UnidentifiedImageError:
            reason = "no image" if file.seek(0, os.SEEK_END) else "empty"
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
                raise
            reason = f"damaged: {error}"
        if is_png:  # a text or profile of any size or damage does not condemn the pixels
            with contextlib.suppress(Exception):
                return decode_picture(without_metadata(file), size)
        raise ValueError(reason)


def decode_picture(file: io.IOBase, size: int) -> Image.Image:
    file.seek(0)
    Image.init()
    image = Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    if size:
        image.draft(None, (2 * size, 2 * size))
    image.load()
    return to_rgb(image)


def without_metadata(png: io.IOBase) -> io.BytesIO:
    """A PNG of nothing but its pixels."""
    png.seek(8)
    kept = bytearray(b"\x89PNG\r\n\x1a\n")
    while head := png.read(8):
        chunk = head + png.read(int.from_bytes(head[:4], "big") + 4)
        if head[4:] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept += chunk
    return io.BytesIO(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: upright, in sRGB, 16 bits as 8, transparency over white."""
    with contextlib.suppress(Exception):  # damaged EXIF data do not damage the picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data or image.mode == "P":
        image = image.convert("RGBA")
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        with contextlib.suppress(Exception):  # nor do damaged profiles, or a Pillow that reads none
            own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            if "srgb" not in ImageCms.getProfileDescription(own).lower():
                mode = image.mode.replace("CMYK", "RGB")
                image = ImageCms.profileToProfile(image, own, srgb, outputMode=mode)
    if image.mode == "RGBA":
        if image.getextrema()[3] != (0, 0):  # where nothing would be seen, alpha is not used
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def batches(data: Data, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Data]:
    """An epoch's whole batches in random order, this process's share of each, on the device."""
    device, share = torch.device(device), batch_size // processes()
    order = torch.randperm(len(data.images)).to(data.images.device)  # once: each copy is waited for
    for start in range(0, len(order) - batch_size + 1, batch_size):
        picked = order[start + rank() * share : start + (rank() + 1) * share]
        images = data.images.index_select(0, picked)
        if device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory()  # which alone may be copied without waiting
        labels = None if data.labels is None else data.labels.index_select(0, picked).to(device)
        yield Data(images.to(device, non_blocking=images.is_pinned()), labels)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1]."""
    return images.float().div_(255)


def to_symmetric(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1], the range of tanh."""
    return images.float().div_(127.5).sub_(1)


def symmetric_to_unit(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to float32 in [0, 1]."""
    return images.float().add(1).div_(2)


# ----------------------------------------------------------------------------------------- pictures
def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] to the nearest uint8, on the CPU."""
    return images.detach().float().mul(255).add_(0.5).clamp_(0, 255).to("cpu", torch.uint8)


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Images (N, C, H, W) as one picture (C, rows * (H + 2) + 2, columns * (W + 2) + 2)."""
    from torchvision.utils import make_grid

    channels = images.shape[1]
    return make_grid(images, nrow=columns)[:channels]  # it makes three channels of one


def to_picture(image: Tensor | Image.Image) -> Image.Image:
    """A float (C, H, W) in [0, 1], or its uint8, as a Pillow image, grey for one channel."""
    from torchvision.transforms.functional import to_pil_image

    if isinstance(image, Image.Image):
        return image
    return to_pil_image(image if image.dtype == torch.uint8 else to_bytes(image))


def show_in_notebook(picture: Image.Image, **options) -> None:
    """Show a picture in line, in a notebook; `options` are those of IPython's display."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        from IPython.display import display

        display(picture, **options)


def write_picture(path: str | Path, image: Tensor | Image.Image) -> None:
    with replacing(path, sync=False) as temporary:  # of thousands, each of which can be drawn again
        to_picture(image).save(temporary, format="PNG")


def write_gif(path: str | Path, frames: list[Image.Image]) -> None:
    """An endless animation that rests on its last frame; few colours keep it small."""
    frames = [frame.quantize(16 if frame.mode == "L" else 256) for frame in frames]
    milliseconds = [150] * (len(frames) - 1) + [2000]
    with replacing(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def write_log(path: str | Path, history: list[dict]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[-1], extrasaction="ignore")  # a resumed run's first
        writer.writeheader()  # epochs may have other losses
        writer.writerows(history)


def label_panels(panels: list[tuple[str, Image.Image]], columns: int = 2) -> Image.Image:
    """Pictures side by side, each under its title: the reports' four-panel figure."""
    width, height = max(p.width for _, p in panels), max(p.height for _, p in panels)
    gap, columns = max(12, height // 18), min(columns, len(panels))
    font, rows = ImageFont.load_default(size=gap), math.ceil(len(panels) / columns)
    across, down = width + gap, height + 3 * gap
    figure = Image.new("RGB", (columns * across + gap, rows * down), "white")
    for i, (title, panel) in enumerate(panels):
        x, y = gap + i % columns * across, 2 * gap + i // columns * down
        ImageDraw.Draw(figure).text((x + width / 2, y - gap), title, "black", font, anchor="mm")
        figure.paste(panel, (x, y))
    return figure


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Up to seven round numbers (1, 2, 5 times a power of ten) within, at least `least` apart."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    step = max(step, least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


class Plot:
    """A figure of 800x500 with axes and legend; draw on `draw` at `point(x, y)`, twice as large."""

    left, top, right, bottom = 150, 40, 1560, 890  # of the axes

    def __init__(self, x_range, y_range, x_label: str, y_label: str, legend: dict, log_y=False):
        self.image, self.legend = Image.new("RGB", (1600, 1000), "white"), legend
        self.draw = ImageDraw.Draw(self.image)
        self.draw.font = ImageFont.load_default(size=28)
        self.scale = math.log10 if log_y else float
        (self.x0, self.x1), (self.y0, self.y1) = x_range, map(self.scale, y_range)
        for x in ticks(self.x0, self.x1, least=1 if x_label == "epoch" else 0):
            column, _ = self.point(x, y_range[0])
            self.draw.line((column, self.top, column, self.bottom), "#e6e6e6", 2)
            self.draw.text((column, self.bottom + 12), f"{x:g}", "black", anchor="ma")
        for tick in ticks(self.y0, self.y1, least=1 if log_y else 0):
            y = 10.0**tick if log_y else tick
            _, row = self.point(self.x0, y)
            self.draw.line((self.left, row, self.right, row), "#e6e6e6", 2)
            self.draw.text((self.left - 12, row), f"{y:g}", "black", anchor="rm")
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), None, "black", 2)
        self.draw.text(((self.left + self.right) / 2, 984), x_label, "black", anchor="md")
        side = Image.new("L", (self.bottom - self.top, 40))
        ImageDraw.Draw(side).text((side.width / 2, 20), y_label, 255, self.draw.font, anchor="mm")
        self.image.paste("black", (8, self.top), side.rotate(90, expand=True))

    def point(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0) * (self.right - self.left)
        up = (self.scale(y) - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)
        return self.left + across, self.bottom - up

    def finish(self) -> Image.Image:
        """The figure with its legend on top."""
        left, top = self.right - 90 - max(map(self.draw.textlength, self.legend)), self.top + 10
        bottom = top + 10 + 38 * len(self.legend)
        self.draw.rectangle((left, top, self.right - 10, bottom), "white", "#bbbbbb", 2)
        for i, (name, colour) in enumerate(self.legend.items()):
            y = top + 24 + 38 * i
            self.draw.rectangle((left + 12, y - 5, left + 52, y + 5), colour)
            self.draw.text((left + 64, y), name, "black", anchor="lm")
        return self.image.reduce(2)


def plot_lines(curves: dict[str, list[float]], x_label: str, y_label: str) -> Image.Image:
    """Curves over 1, 2, 3... as a figure, with a logarithmic y axis if they span two decades."""
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    log_y = low > 0 and high / low > 100
    margin = 0.05 * (high - low) or max(0.5, abs(high) / 2)
    y_range = (low / 1.3, high * 1.3) if log_y else (low - margin, high + margin)
    colours = dict(zip(curves, COLOURS))
    plot = Plot((1, max(2, *map(len, curves.values()))), y_range, x_label, y_label, colours, log_y)
    for name, curve in curves.items():
        points = [plot.point(x, y) for x, y in enumerate(curve, start=1)]
        plot.draw.line(points, colours[name], 4)
        if len(points) == 1:
            x, y = points[0]
            plot.draw.ellipse((x - 6, y - 6, x + 6, y + 6), colours[name])
    return plot.finish()


# ----------------------------------------------------------------------------------- a run's folder
def load_checkpoint(out_dir: str | Path, script: str | None = None) -> dict:
    """A run's checkpoint; runs no code of it. UserError if absent, damaged or another script's."""
    path = Path(out_dir, "checkpoint.pt")
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint: train first, or name the run's --out-dir")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign file's bytes
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    parts = dict(format=int, script=str, options=dict, epoch=int, history=list, networks=dict, optimizers=dict)
    types = {k: type(v) for k, v in checkpoint.items()} if isinstance(checkpoint, dict) else {}
    if dict(types, data=str) != dict(parts, data=str) or checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is no checkpoint of this version: train anew")
    if script not in (None, checkpoint["script"]):
        raise UserError(f"{path} was written by {checkpoint['script']}.py: use it with that script")
    return checkpoint


def restore(parts: dict, states: dict) -> None:
    """Give networks or optimizers their states by name; UserError when they don't fit."""
    try:
        for name, part in parts.items():
            state = states[name]
            if isinstance(part, torch.optim.Optimizer):  # how it runs is the device's matter
                own = {name: part.param_groups[0][name] for name in ("fused", "capturable")}
                state = state | dict(param_groups=[group | own for group in state["param_groups"]])
            part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        why = message_lines(error)[0]
        raise UserError(f"the checkpoint does not fit this version's networks ({why}): train anew") from error


class Run(contextlib.ExitStack):
    """The record of a training in its folder, locked: log, pictures, checkpoint, animation."""

    def __init__(self, args: argparse.Namespace, data: Data):
        super().__init__()
        self.args, self.folder, count = args, Path(args.out_dir), len(data.images)
        self.history = list(args.checkpoint["history"]) if args.checkpoint else []
        self.steps, self.data, self.losses, self.warned = count // args.batch_size, data.digest(), [], set()
        self.saved, self.saved_at = len(self.history), -math.inf  # the last saved epoch, and when
        if self.saved > args.epochs:
            raise UserError(f"the run has {self.saved} epochs already, --epochs asks for {args.epochs}")
        batch = f"--batch-size {args.batch_size}"
        if count < args.batch_size:
            most = f"{count:,} images: give --batch-size {count // processes() * processes()} or less"
            raise UserError(f"{batch} is larger than the data: {most}")
        if args.batch_size % processes():
            raise UserError(f"{batch} can't be shared evenly by {processes()} processes")
        if args.checkpoint and args.checkpoint.get("data", self.data) != self.data:
            if args.dataset != args.checkpoint["options"]["dataset"]:
                raise UserError(f"--dataset {args.dataset} holds other images than the run's")
            show_line(f"{args.script}: {args.dataset} has changed since the checkpoint: {count:,} images now")
        if rank() == 0:
            try:
                self.open_folder(data.images)
            except BaseException:  # a notebook lives on: let go of the folder
                self.close()
                raise
        self.started = self.shown = time.perf_counter()

    def open_folder(self, images: Tensor) -> None:
        """Lock it, move a run in the way aside, clear what a kill left, draw real images."""
        args, folder = self.args, self.folder
        ours = (folder / ".made").exists() or not (folder / ".lock").exists()  # not the user's own
        self.enter_context(locked(folder))
        if args.checkpoint is None and (folder / "checkpoint.pt").exists():
            load_checkpoint(folder)  # UserError if it is another program's
            inner = next(folder.glob("*/**/.lock"), None)  # of another run, which would move along
            if inner or not ours or Path.cwd().is_relative_to(folder.resolve()):
                raise UserError(f"{folder} holds a run, and is not moved aside: --resume it or name another")
            if os.name == "nt":  # which renames no folder of an open file
                self.close()
            places = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            folder.rename(aside)
            self.close()
            self.enter_context(locked(folder))
            show_line(f"{args.script}: the run that was in {folder} is now {aside}; --resume would have continued it")
        if all(path.name == ".lock" for path in folder.iterdir()):  # new, so ours to move aside later
            (folder / ".made").touch()
        for leftover in (*folder.glob(TEMPORARY), *folder.glob(f"samples/{TEMPORARY}")):
            leftover.unlink(missing_ok=True)
        told = f"{args.preset} on {args.dataset}, {len(images):,} images, {self.steps} steps an epoch"
        show_line(f"{args.script}: {told}")
        self.save_picture("real.png", grid(to_unit(images[:64].cpu())))

    def log(self, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses without waiting for the device. Names carry units: "loss [nats]"."""
        self.names = list(losses)
        self.losses.append(torch.stack([loss.detach() for loss in losses.values()]))
        now = time.perf_counter()
        if now - self.shown > 0.5 and on_terminal() and rank() == 0:
            self.shown = now
            self.show(dict(zip(self.names, self.losses[-1].tolist())), end="")

    def show(self, figures: dict[str, float], end: str = "\n") -> None:
        """The progress line, within an epoch or at its end."""
        epoch, total, done = len(self.history) + 1, self.args.epochs, len(self.losses)
        seconds = time.perf_counter() - self.started
        whole = seconds * self.steps / done  # of this epoch
        each = self.history[-1]["seconds"] if self.history else whole
        left = clock(each * (total - epoch) + whole - seconds)
        shown = "  ".join(f"{k.partition(' [')[0]} {v:.4g}" for k, v in figures.items())
        rate = f"{done * self.args.batch_size / seconds:,.0f} images/s"
        # The losses last: on a narrow terminal the line's end is cut off.
        show_line(f"epoch {epoch:>{len(str(total))}}/{total}  {left} left  {rate}  {shown}", end)

    def end_epoch(self, figures: dict[str, float] | None = None) -> None:
        """Keep the epoch's mean losses and more `figures`. UserError if a loss is not finite."""
        figures, epoch = figures or {}, len(self.history) + 1
        losses = torch.stack(self.losses).float()
        if dist.is_initialized():  # so that all processes find a loss that is not finite in one
            dist.all_reduce(losses)
            losses /= processes()
        losses = losses.cpu().double()
        for step, column in (~losses.isfinite()).nonzero().tolist():
            self.fail(f"{self.names[column]} is {losses[step, column]:g} in epoch {epoch}, step {step + 1}")
        for name, value in figures.items():
            if not math.isfinite(value):
                self.fail(f"{name} is {value:g} after epoch {epoch}")
        means = dict(zip(self.names, losses.mean(0).tolist()))
        seconds = time.perf_counter() - self.started
        self.show(means | {k: v for k, v in figures.items() if k.startswith("test loss")})
        if self.history and seconds > 2.5 * min(row["seconds"] for row in self.history) + 1:
            self.warn("slow", "this epoch took 2.5 times the fastest: other work wants the cores or threads")
        images = len(losses) * self.args.batch_size
        times = {"seconds": round(seconds, 3), "images per second": round(images / seconds, 1)}
        self.history.append({"epoch": epoch, **means, **figures, **times})
        self.losses = []

    def fail(self, fault: str) -> NoReturn:
        kept = f"the checkpoint of epoch {self.saved} is kept" if self.saved else "no checkpoint was written"
        raise UserError(f"{fault}: {kept}; a lower --lr may help")

    def warn(self, about: str, message: str | Exception) -> None:
        if about not in self.warned:
            show_line(f"{self.args.script}: warning: {message}")
        self.warned.add(about)

    def save_samples(self, images: Tensor) -> None:
        """The epoch's picture of the fixed latents, (N, C, H, W) in [0, 1]; a notebook shows it."""
        picture, name = to_picture(grid(images)), f"samples {id(self)}"
        self.save_picture(f"samples/epoch-{len(self.history):04}.png", picture)
        show_in_notebook(picture, display_id=name, update=name in self.warned)
        self.warned.add(name)

    def save_picture(self, name: str, image, write: Callable = write_picture) -> None:
        """A by-product: float (C, H, W) in [0, 1], a Pillow image, or what `write` takes."""
        if rank() == 0:
            try:
                write(self.folder / name, image)
            except UserError as error:
                self.warn(Path(name).parts[0], error)

    def save(self, networks: dict[str, nn.Module], optimizers: dict) -> None:
        """Write checkpoint, log and curves: at the end, before it at most every ten seconds."""
        epoch = len(self.history)
        if epoch == self.args.epochs or time.perf_counter() - self.saved_at > SAVE_SECONDS:
            weights = {name: network.state_dict() for name, network in networks.items()}
            for name, state in weights.items():
                if not all(tensor.isfinite().all() for tensor in state.values()):
                    self.fail(f"the {name} has weights that are not finite after epoch {epoch}")
            if rank() == 0:
                states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
                kept = dict(format=CHECKPOINT_FORMAT, script=self.args.script, options=run_options(self.args))
                kept |= dict(epoch=epoch, history=self.history, data=self.data)
                buffer = io.BytesIO()  # torch.save's own file errors hide the reason
                torch.save(kept | dict(networks=weights, optimizers=states), buffer)
                with replacing(self.folder / "checkpoint.pt") as temporary:
                    temporary.write_bytes(buffer.getbuffer())
                self.save_log()
            self.saved, self.saved_at = epoch, time.perf_counter()
        self.started = time.perf_counter()

    def save_log(self) -> None:
        self.save_picture("log.csv", self.history, write_log)
        _, *names, _, _ = self.history[-1]  # without the epoch and the times
        known = [name for name in names if name in self.history[0]]
        curves = {name: [row[name] for row in self.history] for name in known}
        kinds = "loss" if all(" [" in name for name in known) else "loss or probability"
        self.save_picture("losses.png", plot_lines(curves, "epoch", kinds))

    def finish(self) -> None:
        """The four-panel figure, the animation, and the last line. The log too: a kill may have left it behind."""
        self.save_log()
        total, pictures = self.args.epochs, {}
        quarters = {max(1, round(total * part / 4)) for part in (1, 2, 3, 4)}
        moments = {1 + round(i * (total - 1) / 39) for i in range(40)}
        for epoch in sorted(quarters | moments):
            path = self.folder / f"samples/epoch-{epoch:04}.png"
            try:
                with Image.open(path) as picture:
                    pictures[epoch] = picture.copy()
            except Exception as error:  # a damaged file raises whatever its bytes lead to
                self.warn("samples", f"{path} can't be read: {error}")
        panels = [(f"Epoch {epoch}", pictures[epoch]) for epoch in pictures if epoch in quarters]
        frames = [pictures[epoch] for epoch in pictures if epoch in moments]
        if panels and frames:
            self.save_picture("progress.png", label_panels(panels))
            self.save_picture("progress.gif", frames, write_gif)
        show_line(f"{self.args.script}: done, pictures in {self.folder}: look at {self.folder / 'progress.png'}")


# ----------------------------------------------------------------------------------------- sampling
class Sampler(NamedTuple):
    """What a trained model offers to anyone who knows nothing about it."""

    latent_size: int
    # (latents (N, latent_size), labels (N,) or None) -> images float32 (N, C, H, W) in [0, 1]
    generate: Callable
    parameters: int  # weights of all networks
    classes: int = 0  # labels that `generate` takes; 0 for an unconditional model
    # (images uint8 (N, C, H, W), samples=500) -> bounds on log p(x) by name, in nats
    evaluate: Callable | None = None


def draw(sampler: Sampler, count: int, seed: int, device, label: int | None = None) -> Iterator:
    """`count` samples in chunks: uint8 (n, C, H, W) on the CPU; labels (n,), in turn, or None."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, 500):
        numbers = torch.arange(start, min(start + 500, count))
        latents = torch.randn(500, sampler.latent_size, generator=generator)[: len(numbers)].to(device)
        labels = None
        if sampler.classes:
            labels = numbers % sampler.classes if label is None else torch.full_like(numbers, label)
        images = sampler.generate(latents, None if labels is None else labels.to(device))
        yield to_bytes(images), labels


def sample(args: argparse.Namespace, sampler: Sampler, device: torch.device) -> None:
    """--sample N --to PATH: a grid if its name ends in .png, else a folder with a PNG an image."""
    target, count = Path(args.to or Path(args.out_dir, "sample.png")), args.sample
    as_grid = target.suffix.lower() == ".png"
    if not as_grid and not target.is_dir() and target.suffix.lower() in Image.registered_extensions():
        raise UserError(f"--to {target}: a grid is a PNG: give a name that ends in .png, or a folder")
    images = None if args.dataset in LABELLED else Path(args.data_dir, args.dataset).resolve()
    if images and target.resolve().is_relative_to(images):
        raise UserError(f"--to {target}: a run learns from what is in {images}: name another place")
    if target.exists() and target.is_dir() == as_grid:
        raise UserError(f"--to {target}: there is a {'folder' if as_grid else 'file'} of that name")
    if as_grid and count > 10_000:
        raise UserError("a grid shows at most 10,000 images: --to FOLDER writes any number")
    label, digits = getattr(args, "label", None), max(5, len(str(count - 1)))

    def place(i: int) -> Path:
        """00000.png and on; labelled images in a sub-folder a class."""
        kind = i % sampler.classes if sampler.classes and label is None else label
        return target / ("" if kind is None else str(kind)) / f"{i:0{digits}}.png"

    for path in target.rglob("*"):
        known = path.stem.isdecimal() and int(path.stem) < count and place(int(path.stem)) == path
        if path.match(TEMPORARY):  # of a kill
            path.unlink(missing_ok=True)
        elif not known and not path.is_dir():
            raise UserError(f"--to {target} holds other files, such as {path.name}: name an empty folder")
    progress, columns, written, picture = Progress(count, "images"), math.ceil(count**0.5), 0, None
    for images, _ in draw(sampler, count, args.seed, device, label):
        for image in map(to_picture, images):
            if as_grid:
                width, height = image.width + 2, image.height + 2
                size = (columns * width + 2, math.ceil(count / columns) * height + 2)
                picture = picture or Image.new(image.mode, size)
                picture.paste(image, (written % columns * width + 2, written // columns * height + 2))
            else:
                write_picture(place(written), image)
            written += 1
        progress.update(written)
    if as_grid:
        write_picture(target, picture)
        show_in_notebook(picture)
    show_line(f"{args.script}: {count:,} images in {target}; another --seed draws others")
