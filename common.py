"""Data and device helpers for the four scripts, and what a run leaves on the disk; no model.

Images are uint8 (N, C, H, W) until a training step uses them.
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import io
import math
import os
import platform
import random
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor, nn

LABELLED = ("mnist", "fashion", "digits")  # data sets of 28x28 grey images in ten classes
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
CHECKPOINT_FORMAT = 1
NOT_KEPT = "script out_dir init resume sample walk to label evaluate checkpoint arithmetic".split()  # in a checkpoint
TEMPORARY = f".*.{'[0-9a-f]' * 12}.tmp"  # the names of `replacing`
SAVE_SECONDS = 10  # between two checkpoints, when epochs are shorter
COLOURS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()


# --------------------------------------------------------------------------------- errors and files
class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2."""


def one_line(error: BaseException) -> str:
    """The first 200 characters of a library's message, or the error's type where it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path that replaces `path` at the end, whole, or not at all. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:  # for the case of a power cut; some file systems have no such call
            with open(temporary, "rb+") as file, contextlib.suppress(OSError):
                os.fsync(file.fileno())
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs. UserError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"can't write into {folder}: name another folder")
    fresh, works = folder / f".lock.{os.urandom(6).hex()}.tmp", False
    with contextlib.ExitStack() as held:
        held.callback(fresh.unlink, missing_ok=True)
        try:
            lock_file(fresh).close()  # without locks, as on some network drives, this fails, too
            fresh.unlink()
            works = True
            held.enter_context(contextlib.closing(lock_file(folder / ".lock")))
        except Exception as error:  # some Pythons lack sqlite3
            if works and "locked" in str(error):
                raise UserError(f"another process writes to {folder}: wait, or name another folder") from error
            show_line(f"no lock on {folder} ({one_line(error)}): let no other process write there")
        yield


def lock_file(path: Path) -> Any:
    """A connection that holds SQLite's lock on a file: the same on every system, gone with the process."""
    import sqlite3

    lock = sqlite3.connect(path, timeout=0)
    lock.execute("PRAGMA journal_mode = MEMORY")  # no second file
    lock.execute("BEGIN EXCLUSIVE")
    return lock


def on_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def show_line(line: str, unfinished: bool = False) -> None:
    """Print a line, in process 0 alone. The next one replaces an unfinished one on a terminal."""
    if on_terminal():
        line = "\r" + (line[: shutil.get_terminal_size().columns - 1] if unfinished else line) + "\x1b[K"
    if rank() == 0:
        print(line, end="" if unfinished and on_terminal() else "\n", flush=True)


class Progress:
    """The pace of a long job of `total` parts, and a line of it now and then."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit = total, unit
        self.start = self.shown = time.monotonic()

    def is_due(self) -> bool:
        """Whether to show a line: five times a second on a terminal, else twice a minute."""
        due = time.monotonic() - self.shown > (0.2 if on_terminal() else 30)
        if due:
            self.shown = time.monotonic()
        return due

    def time_left(self, done: int) -> str:
        return str(timedelta(seconds=round((time.monotonic() - self.start) / done * (self.total - done))))

    def update(self, done: int, text: str = "") -> None:
        """Tell how many parts are done, and more in `text`."""
        if done and self.is_due():
            show_line(f"{done:,} of {self.total:,} {self.unit}, {self.time_left(done)} left{text}", unfinished=True)


# --------------------------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for a mistake; `doc` is the program's docstring, which python -OO leaves out."""

    def __init__(self, program: str, doc: str | None, **options):
        super().__init__(program, description=(doc or "").partition("\n\n")[0], allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def absolute_path(text: str) -> str:
    return os.path.abspath(os.path.expanduser(text))


def number(kind: type, low: float, high: float = sys.float_info.max) -> Callable:
    """An argparse type: an int or a float from low to high."""
    noun = f"{'a whole number' if kind is int else 'a number'} of at least {low:g}"
    noun += f" and at most {high:g}" if high < sys.float_info.max else ""

    def convert(text: str):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}")

    return convert


def parse(parser: Parser, presets: dict, argv: list[str] | None) -> argparse.Namespace:
    """What was typed, over the checkpoint's options (if one is asked for), over the preset's."""
    if argv is None and "kernel_launcher" in sys.argv[0]:  # pasted into a notebook, which has its own
        argv = []
    argv = None if argv is None else [str(word) for word in argv]  # main(["--epochs", 5])
    args = parser.parse_args(argv)
    numbers = dict(presets[args.preset])
    of_folders = numbers.pop("folder", {})  # what differs for folders of images
    if args.dataset not in LABELLED:
        numbers |= of_folders
    script = parser.prog.removesuffix(".py")
    out_dir = args.out_dir or f"runs/{script}-{args.preset}-{Path(args.dataset).name}"
    parser.set_defaults(**numbers, script=script, out_dir=out_dir, checkpoint=None, arithmetic={})
    args = parser.parse_args(argv)
    wanted = [name for name in ("resume", "sample", "walk", "evaluate") if vars(args).get(name)]
    if len(wanted) > 1:
        parser.error(f"--{wanted[0]} and --{wanted[1]}: one at a time")
    if args.to is not None and wanted not in (["sample"], ["walk"]):
        parser.error("--to says where --sample or --walk writes: give one of them, too")
    if wanted == ["resume"] and not Path(out_dir, "checkpoint.pt").exists():
        show_line(f"{script}: no checkpoint in {out_dir}: a new run starts{nearby(out_dir)}")
        wanted, args.resume = [], False
    return over_checkpoint(parser, args, argv) if wanted else args


def over_checkpoint(parser: Parser, args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """What was typed over the options of the run in `args.out_dir`, which may be of another machine."""
    checkpoint = load_checkpoint(args.out_dir, args.script)
    stored = checkpoint["options"]
    if odd := sorted(set(stored) ^ set(run_options(args))):
        parser.error(f"the checkpoint is of another {args.script}.py (options {odd}): train anew")
    if args.resume and not checkpoint["optimizers"]:
        parser.error(f"{args.out_dir} was kept for drawing: it holds no optimizer, with which --resume could go on")
    data_dir = stored["data_dir"] if Path(stored["data_dir"]).is_dir() else args.data_dir
    parser.set_defaults(**stored | dict(device=args.device, data_dir=data_dir), checkpoint=checkpoint)
    args = parser.parse_args(argv)
    free = {"data_dir", "device", "precision"} | ({"epochs", "lr", "batch_size"} if args.resume else {"seed"})
    if args.resume and not {args.dataset, stored["dataset"]} & set(LABELLED):
        free.add("dataset")  # the images may have moved: Run tells whether they are the same
    for name, value in run_options(args).items():
        typed, own = f"--{name.replace('_', '-')} {value}", stored[name]
        if value != own and name not in free:
            parser.error(f"{typed} contradicts the checkpoint's {own}: leave it out, or train anew")
        if value != own and name in ("lr", "batch_size"):
            show_line(f"{args.script}: from here on {typed}, before {own}")
    return args


def nearby(out_dir: str | Path) -> str:
    """The runs beside a folder that holds none, for a message."""
    found = sorted(str(path.parent) for path in Path(out_dir).parent.glob("*/checkpoint.pt"))
    return f" ({', '.join(found[:5])} {'is' if len(found) == 1 else 'are'} there)" if found else ""


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint keeps."""
    return {name: value for name, value in vars(args).items() if name not in NOT_KEPT}


@contextlib.contextmanager
def reporting_errors(program: str) -> Iterator[None]:
    """End with a line, not a traceback: status 2 for a mistake, 130 for Ctrl-C and SIGTERM."""
    with contextlib.suppress(ValueError):  # outside the main thread Python allows no handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        if dist.is_initialized():
            dist.barrier()  # one that ends early would break the others' connections
        return
    except KeyboardInterrupt as interrupt:
        status, told = 130, str(interrupt) or "interrupted"
    except (UserError, OSError) as error:
        status, told = getattr(error, "status", 2), f"error: {error}"  # 3: the crawler's source failed
        if getattr(error, "filename", None):
            told = f"error: {error.filename}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()  # torch has no type for the processor's memory
        status, told = 2, "error: out of memory: a smaller --batch-size needs less"
        if not isinstance(error, MemoryError) and not ("memory" in text and "alloc" in text):
            if "cuda error" not in text:
                raise
            told = f"error: {one_line(error)}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if on_terminal():
        show_line("", unfinished=True)  # off the unfinished progress line
    program += f" (process {rank()})" if rank() else ""
    print(f"{program}: {' '.join(told.splitlines())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


# ----------------------------------------------------------------------------- device and processes
def processes() -> int:
    """How many processes torchrun started, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number under torchrun, else 0. Only process 0 prints and writes."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that `--device` names; UserError if it is absent. Joins torchrun's processes."""
    try:
        import torchvision  # noqa: F401  # fails here, before any work, if it does not fit torch

        best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    except Exception as error:
        raise UserError(f"{one_line(error)}: pip install -r requirements.txt mends it") from error
    kind = best if args.device == "auto" else args.device
    if kind not in ("cpu", best):
        built = " (this torch is built for the CPU alone)" if kind == "cuda" and not torch.version.cuda else ""
        raise UserError(f"--device {kind}: torch finds none here{built}; --device auto takes {best}")
    device = torch.device(kind)
    if kind == "cuda":
        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > cards:
            raise UserError(f"{here} processes, {cards} GPUs: take --nproc-per-node={cards}, or --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    try:
        torch.zeros(1, device=device).add(1).item()
    except RuntimeError as error:  # a card for which this torch has no kernels
        raise UserError(f"{kind} does not work with this torch ({one_line(error)}): take --device cpu") from error
    if processes() > 1 and not dist.is_initialized():
        backend, card = ("nccl", device) if kind == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(days=1), device_id=card)  # a folder takes time
    return device


def choose_autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """A context for matrix products and convolutions in `--precision`.

    Prints what rounding depends on, and keeps it as `args.arithmetic`, for the checkpoint.
    """
    native, precision = has_native_bf16(device), args.precision
    if precision == "auto":
        precision = "bf16" if native else "fp32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {processor_name()}"
    args.arithmetic = dict(torch=str(torch.__version__), device=name, precision=precision, processes=processes())
    if device.type == "cpu":
        args.arithmetic["threads"] = torch.get_num_threads()
    facts = ", ".join(f"{name} {fact}" for name, fact in args.arithmetic.items())
    show_line(f"{args.script}: {facts} (bf16 native here: {'yes' if native else 'no'})")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cpuinfo() -> str:
    """What Linux tells about the processor, else nothing."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def processor_name() -> str:
    """The processor's model, as far as the system tells it."""
    told = cpuinfo().partition("model name")[2].partition("\n")[0].strip("\t: ")
    return told or platform.processor() or platform.machine()


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied in hardware; others (a T4, an older CPU) emulate it slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = cpuinfo().split() if device.type == "cpu" else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def mix(seed: int, use: int | str) -> int:
    """32 bits of both, as many as the CPU's generator keeps of its seed."""
    return int(hashlib.sha256(f"{seed} {use}".encode()).hexdigest()[:8], 16)


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed all that is random from both."""
    torch.manual_seed(mix(seed, epoch))


# ---------------------------------------------------------------------------------- optimizer steps
def adam(parameters, lr: float, beta1: float = 0.9) -> torch.optim.Adam:
    """Adam in one kernel a step (fused), which a CUDA graph can capture."""
    parameters = list(parameters)
    kind = parameters[0].device.type
    warnings.filterwarnings("ignore", message=".*capturable=True.*")  # of steps outside of a graph
    return torch.optim.Adam(parameters, lr, (beta1, 0.999), fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")


def gradients(loss: Tensor, optimizer: torch.optim.Optimizer, retain: bool = False) -> tuple:
    """Gradients of `loss` for this optimizer's parameters alone: other networks cost nothing."""
    return torch.autograd.grad(loss, optimizer.param_groups[0]["params"], retain_graph=retain)


def apply_gradients(grads: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` down the gradients, averaged over all processes."""
    if dist.is_initialized():
        flat = torch.cat([gradient.reshape(-1) for gradient in grads])
        dist.all_reduce(flat)
        parts = flat.div_(processes()).split([gradient.numel() for gradient in grads])
        grads = [part.view(gradient.shape) for part, gradient in zip(parts, grads)]
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], grads):
        if gradient.stride() != parameter.stride():  # the fused kernel walks both in memory order
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    optimizer.step()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step down `loss`; moves no other network and leaves no gradient on one."""
    apply_gradients(gradients(loss, optimizer), optimizer)


def to_device(network: nn.Module, device: torch.device | str, autocast: torch.autocast | None = None) -> nn.Module:
    """The network on the device: for training in `autocast`, for sampling and measuring in float32.

    In channels-last, the faster memory layout, on the CPU and in bfloat16 on CUDA: in float32 it is slower there, and
    on Apple's GPUs batch norm's gradients are wrong in it. On several CUDA devices batch norm is over the whole batch.
    """
    device = torch.device(device)
    with autocast or contextlib.nullcontext():
        fast = device.type == "cpu" or (device.type == "cuda" and torch.is_autocast_enabled("cuda"))
    network = network.to(device, memory_format=torch.channels_last if fast else torch.contiguous_format)
    shared = device.type == "cuda" and dist.is_initialized() and autocast is not None
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if shared else network


def capture(step: Callable, device: torch.device) -> Callable:
    """`step` as one CUDA graph, unless CUDA_GRAPH=0 or several processes exchange gradients in it."""
    torch.backends.cudnn.benchmark = True  # the fastest algorithm for each shape, tried in the first steps
    graphed = device.type == "cuda" and processes() == 1 and os.environ.get("CUDA_GRAPH") != "0"
    return GraphedStep(step) if graphed else step


class GraphedStep:
    """A training step replayed as one CUDA graph; the next replay overwrites its results."""

    def __init__(self, step: Callable):
        self.step, self.calls, self.graph, self.stream = step, 0, None, torch.cuda.Stream()

    def __call__(self, *batch: Tensor) -> dict[str, Tensor]:
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
            except RuntimeError as error:
                cause = error.__context__ or error  # the end of the capture fails, too, in the cause's place
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from error
                raise UserError(f"a step can't be captured ({one_line(cause)}): set CUDA_GRAPH=0") from cause
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
        """A fingerprint: shape and a hash of up to 1,000 images, wherever they lie."""
        some = self.images[:: -(-len(self.images) // 1000)].cpu().contiguous()
        return f"{list(self.images.shape)} {hashlib.sha256(some.numpy().tobytes()).hexdigest()}"


def load_data(name: str, data_dir: str | Path, train: bool = True, size: int | None = None) -> Data:
    """mnist, fashion, digits 1x28x28 with labels; anime (in data_dir) or a folder 3 x size x size."""
    if name == "digits":
        return draw_digits(train)
    if rank() > 0:
        dist.barrier()  # until the first process is through: it downloads and builds caches
    folder = Path(data_dir)
    data = load_mnist(name, folder, train) if name in LABELLED else Data(load_folder(folder / name, size, folder), None)
    if rank() == 0 and dist.is_initialized():
        dist.barrier()
    return data


def load_mnist(name: str, data_dir: Path, train: bool) -> Data:
    """MNIST or Fashion-MNIST by torchvision, which downloads what is absent, with progress."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[name]
    try:
        found = kind(data_dir, train, download=True)
        if found.data.shape != (len(found.targets), 28, 28) or found.targets.max() > 9:
            raise ValueError("no 28x28 images of ten classes")
    except Exception as error:  # whatever a server's answer or a file's bytes lead to
        files = "train- and t10k-images-idx3-ubyte, train- and t10k-labels-idx1-ubyte"
        way_out = f"put its {files} into {data_dir / kind.__name__ / 'raw'} (--data-dir), or take --dataset digits"
        raise UserError(f"{kind.__name__} can't be read ({one_line(error)}): {way_out}") from error
    return Data(found.data[:, None], found.targets)


def draw_digits(train: bool = True) -> Data:
    """Digits in Pillow's font, turned, slanted and sized at random; always the same pictures."""
    count, seed = (10_000, "digits") if train else (2_000, "digits, test")
    chance, font, glyphs = random.Random(seed), ImageFont.load_default(size=64), {}
    for digit in range(10):
        for stroke in range(4):
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
    """The pictures under `folder` as uint8 (N, 3, size, size), mapped from a file made once in `data_dir`."""
    if not folder.is_dir():
        known = f"--dataset takes {', '.join(LABELLED)}, anime or a folder of pictures"
        raise UserError(f"there is no folder {folder}: {known}; unpack an archive first, download an address first")
    names = list_pictures(folder)
    stats = [(folder / name).stat() for name in names]
    state = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in zip(names, stats))
    place, state = (hashlib.sha256(os.fsencode(text)).hexdigest()[:12] for text in (folder.resolve(), state))
    cache = data_dir / f"{folder.name[:40]}-{place}-{state}-{size}.images"  # a name has 255 bytes at most
    if not cache.exists():
        for earlier in data_dir.glob(f"*-{place}-*-{size}.images"):  # of this folder's former files
            with contextlib.suppress(OSError):  # on Windows, while a training uses it
                earlier.unlink()
        try:
            build_cache(cache, folder, names, size)
        except UserError as error:
            raise UserError(f"{error}; --data-dir names a folder for the decoded pictures") from error
    count = cache.stat().st_size // (3 * size * size)
    show_line(f"{count:,} images in {folder}")
    pixels = torch.from_file(str(cache), size=count * 3 * size * size, dtype=torch.uint8).view(count, 3, size, size)
    low, high = (int(level) for level in pixels[:1000].aminmax())
    if high - low < 32:
        show_line(f"warning: the images hardly differ in brightness ({low} to {high} of 255): stretch it first")
    return pixels


def list_pictures(folder: Path) -> list[str]:
    """Relative paths, sorted, of files with a picture's ending, also of formats that are not read: they are told."""
    known = {*PICTURES, *Image.registered_extensions(), ".heic", ".heif", ".jxl"}
    names = sorted(glob.glob("**/*", root_dir=folder, recursive=True), reverse=True)
    found = {(folder / name).resolve(): name for name in names if Path(name).suffix.lower() in known}
    return sorted(name for path, name in found.items() if path.is_file())  # of links to one file the first


def build_cache(cache: Path, folder: Path, names: list[str], size: int) -> None:
    """Decode pictures into a file, which may exceed memory, and tell which were skipped, and why."""
    skipped, progress = [], Progress(len(names), "files")
    with replacing(cache) as temporary, open(temporary, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about odd files
        with contextlib.closing(in_threads(lambda name: decode_file(folder / name, size), names)) as decoded:
            for i, (name, pixels) in enumerate(zip(names, decoded), start=1):
                if isinstance(pixels, str):
                    skipped.append(f"{name} ({pixels})")
                else:
                    file.write(pixels)
                progress.update(i)
        if skipped:
            show_line(f"skipped {len(skipped):,} of {len(names):,} files, such as {', '.join(skipped[:3])}")
        if len(skipped) == len(names):
            raise UserError(f"{folder} holds no picture to use: files that end in {' '.join(PICTURES)} are read")


def in_threads(function: Callable, items: list) -> Iterator:
    """function(item) of every item, in order, by four threads: Pillow and torch work beside each other."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), 1000):  # results wait in memory for their turn
            yield from pool.map(function, items[start : start + 1000])


def decode_file(path: Path, size: int) -> bytes | str:
    """The pixels of a file, 3 x size x size, or why it has none."""
    try:
        image = ImageOps.fit(open_picture(path, size), (size, size), Image.Resampling.BICUBIC)
    except ValueError as error:
        return str(error)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    return b"".join(band.tobytes() for band in image.split())


def open_picture(file: Path | BinaryIO, size: int = 2**20) -> Image.Image:
    """A picture as RGB, upright, on white; a large JPEG at about twice `size`. ValueError if it is none."""
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # some carry long texts
    # No other formats: some start programs.
    formats = [kind for suffix, kind in Image.registered_extensions().items() if suffix in PICTURES]
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError("too large")
            image.draft(None, (2 * size, 2 * size))
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data do not damage the picture
                image = ImageOps.exif_transpose(image)
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise ValueError("float or 32-bit pixels, of unknown range")
            if image.mode.startswith("I"):  # 16 bits
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            if image.mode == "P" or image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise ValueError("in no format that is read") from error
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        raise ValueError(one_line(error)) from error


def batches(data: Data, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Data]:
    """An epoch's whole batches in random order, this process's share of each, on the device."""
    order = torch.randperm(len(data.images)).to(data.images.device)  # once: each copy is waited for
    if rank() > 0:  # seeded alike, all have drawn the same order; from here their noise must differ
        torch.manual_seed(torch.initial_seed() + rank())
    for batch in order.split(batch_size)[: len(order) // batch_size]:
        picked = batch.chunk(processes())[rank()]
        images = data.images.index_select(0, picked)
        if torch.device(device).type == "cuda" and not images.is_cuda:
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


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """Images (N, C, H, W), floats in [0, 1] or uint8, as one picture, at a whole multiple of their size that people
    can see: at least 480 pixels on the longer side."""
    from torchvision.utils import make_grid

    picture = to_picture(make_grid(images, nrow=columns)[: images.shape[1]])  # it makes three channels of one
    factor = math.ceil(480 / max(picture.size))
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def to_picture(image: Tensor | Image.Image) -> Image.Image:
    """A float (C, H, W) in [0, 1], or its uint8, as a Pillow image, grey for one channel."""
    from torchvision.transforms.functional import to_pil_image

    if isinstance(image, Image.Image):
        return image
    return to_pil_image(image if image.dtype == torch.uint8 else to_bytes(image))


def show_in_notebook(picture: Image.Image, **options) -> None:
    """Show a picture in line, in a notebook; `options` are those of IPython's display."""
    if "ipykernel" in sys.modules:
        from IPython.display import display

        display(picture, **options)


def write_picture(path: str | Path, image: Tensor | Image.Image) -> None:
    with replacing(path, sync=False) as temporary:  # no fsync: they can be drawn again
        to_picture(image).save(temporary, Image.registered_extensions()[Path(path).suffix.lower()])


def write_gif(path: str | Path, frames: list[Image.Image], rest: int = 2000) -> None:
    """An endless animation that rests on its last frame for `rest` milliseconds; few colours keep it small."""
    frames = [frame.reduce(2) if frame.width > 1000 else frame for frame in frames]
    frames = [frame.quantize(16 if frame.mode == "L" else 256) for frame in frames]
    milliseconds = [150] * (len(frames) - 1) + [rest]
    with replacing(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def write_log(path: str | Path, history: list[dict]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def label_panels(panels: list[tuple[str, Image.Image]], columns: int = 2) -> Image.Image:
    """Pictures side by side, each under its title, as in the reports' four-panel figure."""
    width, height = max(p.width for _, p in panels), max(p.height for _, p in panels)
    gap, columns = max(12, height // 18), min(columns, len(panels))
    longest = max(len(title) for title, _ in panels)
    font, rows = ImageFont.load_default(size=min(gap, 1.9 * width / longest)), math.ceil(len(panels) / columns)
    across, down = width + gap, height + 3 * gap
    figure = Image.new("RGB", (columns * across + gap, rows * down), "white")
    for i, (title, panel) in enumerate(panels):
        x, y = gap + i % columns * across, 2 * gap + i // columns * down
        ImageDraw.Draw(figure).text((x + width / 2, y - gap), title, "black", font, anchor="mm")
        figure.paste(panel, (x, y))
    return figure


def ticks(low: float, high: float) -> list[float]:
    """Up to seven round numbers (1, 2, 5 times a power of ten) from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot_losses(curves: dict[str, list[float]]) -> Image.Image:
    """Curves over the epochs, their names beside them; logarithmic if they span more than two decades."""
    image = Image.new("RGB", (1600, 920), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=28)
    left, top, right, bottom = 130, 50, 1490 - max(map(pen.textlength, curves)), 830
    least, most = min(map(min, curves.values())), max(map(max, curves.values()))
    is_log = least > 0 and most / least > 100
    scale = math.log10 if is_log else float
    margin = 0.05 * (scale(most) - scale(least)) or abs(least) or 1
    low, high, last = scale(least) - margin, scale(most) + margin, max(2, *map(len, curves.values()))

    def point(epoch: float, height: float) -> tuple[float, float]:
        across, up = (epoch - 1) / (last - 1), (height - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for epoch in sorted({round(tick) for tick in ticks(1, last)}):
        x, _ = point(epoch, low)
        pen.line((x, top, x, bottom), "#e6e6e6", 2)
        pen.text((x, bottom + 12), str(epoch), "black", anchor="ma")
    for height in ticks(low, high):
        _, y = point(1, height)
        pen.line((left, y, right, y), "#e6e6e6", 2)
        pen.text((left - 12, y), f"{10**height if is_log else height:.3g}", "black", anchor="rm")
    pen.rectangle((left, top, right, bottom), None, "black", 2)
    pen.text((left, 8), "logarithmic scale" if is_log else "linear scale", "black")
    pen.text((right, bottom + 48), "epoch", "black", anchor="ra")
    for i, (name, curve) in enumerate(curves.items()):
        points = [point(epoch, scale(value)) for epoch, value in enumerate(curve, start=1)]
        pen.line(points, COLOURS[i], 4)
        pen.circle(points[-1], 6, COLOURS[i])
        pen.rectangle((right + 30, top + 38 * i + 10, right + 70, top + 38 * i + 20), COLOURS[i])
        pen.text((right + 84, top + 38 * i), name, "black")
    return image.reduce(2)


# ----------------------------------------------------------------------------------- a run's folder
def load_checkpoint(out_dir: str | Path, script: str | None = None) -> dict:
    """A run's checkpoint; runs no code of it. UserError if absent, damaged or another script's."""
    path = Path(out_dir, "checkpoint.pt")
    if not path.is_file():
        way_out = f"train first, or name the run's --out-dir{nearby(out_dir)}"
        raise UserError(f"{path}: there is no checkpoint: {way_out}")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # its checksums, which torch does not look at
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # not damaged: its line names the file and the reason
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UserError(f"{path} can't be read ({type(error).__name__}): it is damaged or no checkpoint") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is no checkpoint of this version: train anew")
    if script not in (None, checkpoint["script"]):
        raise UserError(f"{path} was written by {checkpoint['script']}.py: use it with that script")
    return checkpoint


def restore(parts: dict, states: dict) -> None:
    """Give networks or optimizers their states by name; UserError when they don't fit."""
    try:
        for name, part in parts.items():
            state = states[name]
            if isinstance(part, torch.optim.Optimizer):  # what was asked for, not the checkpoint's
                group = part.param_groups[0]
                own = {key: group[key] for key in ("fused", "capturable", "lr")}
                state = state | dict(param_groups=[group | own for group in state["param_groups"]])
                for parameter, kept in zip(group["params"], state["state"].values(), strict=True):
                    for moment in ("exp_avg", "exp_avg_sq"):
                        if kept[moment].shape != parameter.shape:
                            raise ValueError("an optimizer's state of other shapes")
                        # The fused kernel walks weights and moments in memory order.
                        kept[moment] = torch.empty_like(parameter).copy_(kept[moment])
            part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint does not fit these networks ({one_line(error)}): train anew") from error


@contextlib.contextmanager
def record(args: argparse.Namespace, data: Data) -> Iterator["Run"]:
    """The record of a training, in its folder: locked, an earlier run moved aside, ready to be written."""
    run = Run(args, data)
    if rank() > 0:
        yield run
        return
    if args.checkpoint is None and (run.folder / "checkpoint.pt").exists():
        run.folder = run.folder.resolve()  # a link is used where it leads
        aside = move_aside(run.folder)
        run.tell(f"the run in {run.folder} is now {aside}; --resume would have gone on with it")
    with locked(run.folder):
        for leftover in (*run.folder.glob(TEMPORARY), *run.folder.glob(f"samples/{TEMPORARY}")):  # of a kill
            leftover.unlink(missing_ok=True)
        run.tell(f"{args.preset} on {args.dataset}, {len(data.images):,} images, {run.steps} steps an epoch")
        run.save_picture("real.png", grid(data.images[:64].cpu()))
        try:
            yield run
        except BaseException as stop:
            run.save_progress()
            if not isinstance(stop, KeyboardInterrupt):
                raise
            kept = f"--resume goes on from epoch {run.saved} of {run.folder}" if run.saved else "no epoch was kept"
            raise KeyboardInterrupt(f"interrupted: {kept}") from None


def move_aside(folder: Path) -> Path:
    """Rename a run's folder to the first free name. UserError if it holds other files, too."""
    number = 1
    with locked(folder):
        for path in folder.iterdir():
            of_runs = path.name in ("checkpoint.pt", "log.csv", "samples") or path.suffix in (".png", ".gif")
            if not of_runs and path.name[0] != ".":
                raise UserError(f"{folder} holds a run and {path.name}: --resume it, or name another --out-dir")
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return folder.rename(aside)


class Run:
    """What a training leaves: log, pictures, checkpoint, animation. Process 0 alone writes."""

    def __init__(self, args: argparse.Namespace, data: Data):
        self.args, self.folder, count = args, Path(args.out_dir), len(data.images)
        self.history = list(args.checkpoint["history"]) if args.checkpoint else []
        self.steps, self.data, self.losses = count // args.batch_size, data.digest(), []
        self.samples = torch.arange(2)  # of the last epoch; here two that differ
        self.first = self.saved = len(self.history)  # epochs done at the start; in the last checkpoint
        if self.saved > args.epochs:
            raise UserError(f"the run has {self.saved} epochs already, --epochs asks for {args.epochs}")
        if self.saved == args.epochs:
            self.tell(f"nothing to do: epoch {self.saved} is there; a larger --epochs goes further")
        if count < args.batch_size:
            raise UserError(f"--batch-size {args.batch_size} is larger than the data: {count:,} images")
        if args.batch_size % processes():
            raise UserError(f"--batch-size {args.batch_size} can't be shared evenly by {processes()} processes")
        if args.checkpoint and args.checkpoint.get("data", self.data) != self.data:
            if args.dataset != args.checkpoint["options"]["dataset"]:
                raise UserError(f"--dataset {args.dataset} holds other images than the run's")
            self.tell(f"{args.dataset} has changed since the checkpoint: {count:,} images now")
        self.parts = list(args.checkpoint.get("arithmetic", [])) if args.checkpoint else []
        now, was = args.arithmetic, self.parts[-1] if self.parts else args.arithmetic
        if changes := [f"{name} {was.get(name)} is now {now[name]}" for name in now if was.get(name) != now[name]]:
            self.tell(f"from here on rounded otherwise: {', '.join(changes)}")
        if changes or not self.parts:
            self.parts.append(now | dict(from_epoch=self.saved + 1))
        self.progress = Progress((args.epochs - self.saved) * self.steps, "steps")
        self.saved_at, self.started = -math.inf, time.perf_counter()

    def tell(self, message: str) -> None:
        show_line(f"{self.args.script}: {message}")

    def log(self, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses without waiting for the device. Names carry units: "loss [nats]"."""
        self.names = list(losses)
        self.losses.append(torch.stack([loss.detach() for loss in losses.values()]))
        if rank() == 0 and self.progress.is_due():
            self.show(dict(zip(self.names, self.losses[-1].tolist())), unfinished=True)

    def show(self, figures: dict[str, float], unfinished: bool = False) -> None:
        """The line of an epoch, at its end or before."""
        epoch, total = len(self.history) + 1, self.args.epochs
        left = self.progress.time_left((epoch - 1 - self.first) * self.steps + len(self.losses))
        rate = len(self.losses) * self.args.batch_size / (time.perf_counter() - self.started)
        shown = "  ".join(f"{name.partition(' [')[0]} {value:.4g}" for name, value in figures.items())
        show_line(f"epoch {epoch:>{len(str(total))}}/{total}  {left} left  {rate:,.0f} images/s  {shown}", unfinished)

    def end_epoch(self, figures: dict[str, float] | None = None) -> None:
        """Keep the epoch's mean losses and more `figures`. UserError if a loss is not finite."""
        epoch, losses = len(self.history) + 1, torch.stack(self.losses).float()
        if dist.is_initialized():  # so that all processes find a loss that is not finite in one
            dist.all_reduce(losses)
            losses /= processes()
        means = dict(zip(self.names, losses.cpu().double().mean(0).tolist())) | (figures or {})
        seconds = time.perf_counter() - self.started
        for name, value in means.items():
            if not math.isfinite(value):
                self.fail(f"{name} is {value:g} in epoch {epoch}")
        self.show({name: means[name] for name in means if name in self.names or name.startswith("test loss")})
        rate = round(len(losses) * self.args.batch_size / seconds, 1)
        self.history.append({"epoch": epoch, **means, "seconds": round(seconds, 3), "images per second": rate})
        self.losses = []

    def fail(self, fault: str) -> NoReturn:
        kept = f"the checkpoint of epoch {self.saved} is kept" if self.saved else "no checkpoint was written"
        raise UserError(f"{fault}: {kept}; a lower --lr may help")

    def save_samples(self, images: Tensor, columns: int = 8) -> None:
        """The epoch's picture of the fixed latents, (N, C, H, W) in [0, 1]; a notebook shows the latest."""
        epoch, self.samples = len(self.history), to_bytes(images)
        picture = grid(self.samples, columns)
        self.save_picture(f"samples/epoch-{epoch:04}.png", picture)
        show_in_notebook(picture, display_id=f"samples {id(self)}", update=epoch > self.first + 1)

    def save_picture(self, name: str, image, write: Callable = write_picture) -> None:
        """A by-product: float (C, H, W) in [0, 1], a Pillow image, or what `write` takes."""
        if rank() == 0:
            try:
                write(self.folder / name, image)
            except UserError as error:  # the checkpoint is what counts
                self.tell(f"warning: {error}")

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
                kept |= dict(epoch=epoch, history=self.history, data=self.data, arithmetic=self.parts)
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
        curves = {name: [row[name] for row in self.history] for name in names}
        self.save_picture("losses.png", plot_losses(curves))

    def save_progress(self) -> None:
        """The four-panel figure and the animation so far, without samples that were deleted or damaged."""
        moments, pictures = [max(1, round(part * len(self.history) / 28)) for part in range(29)], {}
        for epoch in moments:
            with contextlib.suppress(Exception), Image.open(self.folder / f"samples/epoch-{epoch:04}.png") as picture:
                pictures[epoch] = picture.copy()
        if quarters := sorted({*moments[7::7]} & pictures.keys()):
            self.save_picture("progress.png", label_panels([(f"Epoch {epoch}", pictures[epoch]) for epoch in quarters]))
            self.save_picture("progress.gif", list(pictures.values()), write_gif)

    def finish(self, *pictures: str) -> None:
        """The pictures of the whole run, and the last line: what to look at."""
        self.save_log()  # a kill may have left it behind the checkpoint
        self.save_progress()
        if (self.samples == self.samples[:1]).all():
            self.tell("warning: all samples are the same: README.md says what to do when something looks wrong")
        self.tell(f"done: look at {self.folder}/{', '.join(('progress.png', *pictures))}")


# ----------------------------------------------------------------------------------------- sampling
class Sampler(NamedTuple):
    """What a trained model offers to anyone who knows nothing about it."""

    latent_size: int
    decoder: Callable  # what `generate` calls
    parameters: int  # weights of all networks
    classes: int = 0  # 0 for a model without
    evaluate: Callable | None = None  # (uint8 (N, C, H, W), samples=500) -> bounds on log p(x) [nats] by name

    def generate(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W), float32 in [0, 1], of latents (N, latent_size), which are N(0, I) in training.

        Labels (N,) are the classes of a model that has some; without them they are 0, 1, 2 ... in turn.
        """
        if labels is None and self.classes:
            labels = torch.arange(len(latents), device=latents.device) % self.classes
        return self.decoder(latents, labels)


def count_parameters(networks: dict[str, nn.Module]) -> int:
    return sum(parameter.numel() for network in networks.values() for parameter in network.parameters())


def draw_latents(seed: int, latent_size: int) -> Iterator[Tensor]:
    """The latents of a seed's samples, 500 at a time, on the CPU: the same for any number of samples."""
    generator = torch.Generator().manual_seed(mix(seed, "latents"))
    while True:
        yield torch.randn(500, latent_size, generator=generator)


def first_latents(seed: int, latent_size: int, count: int = 64) -> Tensor:
    """The latents (count, latent_size) of a seed's first samples, at most 500: those that a run draws every epoch."""
    return next(draw_latents(seed, latent_size))[:count]


def draw(sampler: Sampler, count: int, seed: int, device, label: int | None = None) -> Iterator:
    """Samples in chunks: uint8 (n, C, H, W), on the CPU; their labels (n,), in turn but for `label`, or None."""
    for start, latents in zip(range(0, count, 500), draw_latents(seed, sampler.latent_size)):
        latents, labels = latents[: count - start].to(device), None
        if sampler.classes:
            labels = torch.arange(start, start + len(latents)) % sampler.classes
            labels = labels if label is None else torch.full_like(labels, label)
        yield to_bytes(sampler.generate(latents, None if labels is None else labels.to(device))), labels


def interpolate(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Latents (W, d) to (W, count, d) on the arc between them: a chord would leave the likely lengths (White 2016)."""
    along = torch.linspace(0, 1, count)[:, None]
    angle = nn.functional.cosine_similarity(start, end).clamp(-0.9999, 0.9999).acos()[:, None, None]
    start, end = start[:, None], end[:, None]
    return (((1 - along) * angle).sin() * start + (along * angle).sin() * end) / angle.sin()


def sample(args: argparse.Namespace, sampler: Sampler, device: torch.device) -> None:
    """--sample N --to PATH: a grid if its name ends as a picture's, else a folder with a PNG an image. Or --walk."""
    if args.walk is not None:
        walk(args, sampler, device)
        return
    target, count = Path(args.to or Path(args.out_dir, "sample.png")), args.sample
    as_grid = target.suffix.lower() in PICTURES
    if not as_grid and target.is_dir() and any(target.iterdir()):
        raise UserError(f"--to {target}: there are files in it: name a new folder")
    progress, written, tiles = Progress(count, "images"), 0, []
    for images, labels in draw(sampler, count, args.seed, device, getattr(args, "label", None)):
        if as_grid:
            tiles.append(images)
        else:  # 00000.png and on; labelled images in a sub-folder a class
            for i, image in enumerate(images):
                place = target if labels is None else target / str(int(labels[i]))
                write_picture(place / f"{written + i:05}.png", image)
        written += len(images)
        progress.update(written)
    if as_grid:
        picture = grid(torch.cat(tiles), sampler.classes or math.ceil(count**0.5))
        write_picture(target, picture)
        show_in_notebook(picture)
    show_line(f"{args.script}: {count:,} images in {target}; another --seed draws others")


def walk(args: argparse.Namespace, sampler: Sampler, device: torch.device) -> None:
    """--walk N: N steps from each sample to the next and from the last to the first, a row a pair; and as animation."""
    names = [args.to] if args.to else [Path(args.out_dir, "walk.png"), Path(args.out_dir, "walk.gif")]
    if Path(names[0]).suffix.lower() not in PICTURES:
        raise UserError(f"--to {args.to}: --walk draws NAME.png, or NAME.gif, which moves")
    corners, rows = first_latents(args.seed, sampler.latent_size, max(8, sampler.classes)), []
    for row, latents in enumerate(interpolate(corners, corners.roll(-1, 0), args.walk + 1).to(device)):
        label = row if getattr(args, "label", None) is None else args.label
        labels = torch.full((len(latents),), label, device=device) if sampler.classes else None
        rows.append(to_bytes(sampler.generate(latents, labels)))
    for name in names:
        if Path(name).suffix.lower() == ".gif":  # each row ends where the next begins
            frames = [grid(image[None]) for images in rows for image in images[:-1]]
            write_gif(name, frames, rest=150)
        else:
            picture = grid(torch.cat(rows), args.walk + 1)
            write_picture(name, picture)
            show_in_notebook(picture)
    show_line(f"{args.script}: {len(rows)} walks of {args.walk} steps in {' and '.join(map(str, names))}")
