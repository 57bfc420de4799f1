"""Data and device helpers for the four scripts, and the files that a run leaves behind. Nothing here knows a model.

In reading order: errors and files, the command line, device and processes, optimizer steps, data, pictures, a run's
folder, sampling. Images are uint8 (N, C, H, W) in memory; a training step makes floats of them.
"""

import argparse
import contextlib
import csv
import errno
import fnmatch
import functools
import hashlib
import io
import itertools
import math
import os
import random
import shutil
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

LABELLED = ("mnist", "fashion", "digits")  # data sets of 28x28 grey images in ten classes
MOMENTARY = ("script", "out_dir", "resume", "sample", "to", "label", "evaluate", "checkpoint")  # not a run's options
CHECKPOINT_FORMAT = 1
SAVE_SECONDS = 10  # between two checkpoints, when epochs are shorter

# ------------------------------------------------------------------------------------------------- errors and files


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2."""

    status = 2


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` at the end, at once, or on an error not at all.

    `sync` waits for the disk: a power cut leaves no half file either. UserError if the disk is full or read-only.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def clock(seconds: float) -> str:
    """Seconds as 0:00:05."""
    return str(timedelta(seconds=round(seconds)))


def show_line(line: str, end: str = "\n") -> None:
    """Print a line, in the first process alone; on a terminal it replaces an unfinished one, which never wraps."""
    if sys.stdout.isatty():
        line = "\r" + (line if end else line[: shutil.get_terminal_size().columns - 1]) + "\x1b[K"
    if rank() == 0:
        print(line, end=end, flush=True)


class Progress:
    """Work done, its rate and the time left: on a terminal a line that is rewritten, else a line every ten seconds."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit = total, unit
        self.start = self.shown = time.monotonic()

    def update(self, done: int, text: str = "") -> None:
        now, on_terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.shown > (0.2 if on_terminal else 10):
            self.shown, rate = now, done / (now - self.start)
            left = clock((self.total - done) / rate) if rate else "?"
            line = f"{done:,} of {self.total:,} {self.unit}, {rate:,.1f} a second, {left} left"
            show_line(f"{line} {text}", end="" if on_terminal else "\n")


# ------------------------------------------------------------------------------------------------- the command line


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
    if sys.stdout.isatty():
        show_line("", end="")  # off the unfinished progress line
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite int or float in [low, high], or in (low, high] if `above`."""
    noun = f"a{' whole' if kind is int else ''} number {'above' if above else 'of at least'} {low:g}"
    noun += f" and at most {high:g}" if high < math.inf else ""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}")
        return value

    return convert


def parse(parser: argparse.ArgumentParser, presets: dict, argv: list[str] | None) -> argparse.Namespace:
    """Options: what was typed over the checkpoint's (if one is asked for) over the preset's over the defaults.

    A preset may hold a dict `folder` of other numbers for folders of images. Adds `script` and `checkpoint` (or None).
    """
    args = parser.parse_args(argv)
    numbers = dict(presets[args.preset])
    folder_numbers = numbers.pop("folder", {})
    if args.dataset not in LABELLED:
        numbers |= folder_numbers
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

    try:
        checkpoint = load_checkpoint(out_dir, script)
    except UserError as error:
        parser.error(str(error))
    stored, own = checkpoint["options"], run_options(args)
    if {k: type(v) for k, v in stored.items()} != {k: type(v) for k, v in own.items()}:
        odd = sorted(set(stored) ^ set(own)) or "of other types"
        parser.error(f"the checkpoint was written by another version of the script (options {odd}): train anew")
    parser.set_defaults(**stored, checkpoint=checkpoint)
    args = parser.parse_args(argv)
    free = {"epochs", "data_dir", "device", "precision"} | (set() if args.resume else {"seed"})
    for name, value in run_options(args).items():
        if value != stored[name] and name not in free:
            option = f"--{name.replace('_', '-')} {value}"
            parser.error(f"{option} contradicts the checkpoint's {stored[name]}: leave it out, or train anew")
    return args


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint keeps."""
    return {name: value for name, value in vars(args).items() if name not in MOMENTARY}


@contextlib.contextmanager
def reporting_errors(program: str) -> Iterator[None]:
    """End with one line instead of a traceback: status 2 for what the user can mend, 130 for Ctrl-C and SIGTERM."""
    program += f" (process {rank()})" if rank() else ""
    with contextlib.suppress(ValueError):  # outside the main thread Python allows no handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early takes its connections with it
    except KeyboardInterrupt as interrupt:
        leave(130, program, str(interrupt) or "interrupted: a training goes on from its last checkpoint with --resume")
    except (UserError, OSError) as error:
        leave(getattr(error, "status", 2), program, f"error: {error}")
    except (MemoryError, RuntimeError) as error:  # torch has no type for all its ways to run out of memory
        told = str(error).lower()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or ("alloc" in told and "memory" in told):
            leave(2, program, "error: out of memory: a smaller --batch-size needs less")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------- device and processes


def rank() -> int:
    """This process's number under torchrun, else 0. Only process 0 prints and writes."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many processes torchrun started, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that `--device` names, or the best there is; joins torchrun's processes. UserError if it is absent."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = args.device
    if kind == "auto":
        kind = accelerator.type if accelerator else "cpu"
    if kind != "cpu" and (accelerator is None or accelerator.type != kind):
        here = accelerator or "no accelerator"
        raise UserError(f"--device {kind}: this machine has {here}; --device auto takes what there is")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if processes() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def choose_autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """A context in which matrix products and convolutions run in `--precision`. Prints it and the device."""
    native = has_native_bf16(device)
    precision, why = "bf16" if native else "fp32", f"native here: {'yes' if native else 'no'}"
    if args.precision != "auto":
        precision, why = args.precision, "as asked"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name += f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name += f", {processes()} processes" if processes() > 1 else ""
    show_line(f"{args.script}: device {name}; precision {precision} (bf16 {why})")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; others (a T4, an older CPU) emulate it slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text().split()
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed all that is random from (seed, epoch): an epoch depends on nothing that came before but the weights."""
    # The CPU's generator keeps 32 bits of its seed: mix, so that no two epochs of two seeds agree.
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4], "big"))


def randn(count: int, *shape: int, device: torch.device | str) -> Tensor:
    """This process's rows (count, *shape) of the Gaussian noise that one process would draw for the whole batch."""
    noise = torch.randn(count * processes(), *shape, device=device)
    return noise[rank() * count : (rank() + 1) * count]


# -------------------------------------------------------------------------------------------------- optimizer steps


def adam(parameters, lr: float, beta1: float = 0.9) -> torch.optim.Adam:
    """Adam in one kernel a step (fused), which a CUDA graph can capture."""
    parameters = list(parameters)
    kind = parameters[0].device.type
    return torch.optim.Adam(parameters, lr, (beta1, 0.999), fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")


def gradients(loss: Tensor, optimizer: torch.optim.Optimizer, retain: bool = False) -> tuple[Tensor, ...]:
    """Gradients of `loss` for this optimizer's parameters alone: other networks are constants and cost nothing."""
    return torch.autograd.grad(loss, optimizer.param_groups[0]["params"], retain_graph=retain)


def apply_gradients(gradients: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` down the gradients, averaged over all processes."""
    if dist.is_initialized():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= processes()
        parts = flat.split([gradient.numel() for gradient in gradients])
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
    shared = processes() > 1 and torch.cuda.is_available()
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if shared else network


def capture(step: Callable, device: torch.device) -> Callable:
    """`step` as one CUDA graph, where that can be."""
    if device.type == "cuda" and processes() > 1:
        show_line("no CUDA graph: several processes exchange gradients within a step")
    return GraphedStep(step) if device.type == "cuda" and processes() == 1 else step


class GraphedStep:
    """A training step captured as one CUDA graph and replayed: a step costs one launch instead of hundreds."""

    def __init__(self, step: Callable):
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= 3:  # real steps, on a stream of their own as capture requires, make the optimizers' state
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses = self.step(images, labels)
            torch.cuda.current_stream().wait_stream(stream)
            return losses
        if self.calls == 4:
            self.images, self.labels = images.clone(), labels.clone() if labels is not None else None
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.losses = self.step(self.images, self.labels)
                self.graph = graph
            except RuntimeError as error:
                print(f"no CUDA graph ({str(error).splitlines()[0]}): steps run one kernel at a time")
        if self.graph is None:
            return self.step(images, labels)
        self.images.copy_(images)
        if labels is not None:
            self.labels.copy_(labels)
        self.graph.replay()
        return self.losses


# ------------------------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor | None  # int64 (N,), or None for a folder of images

    def to(self, device: torch.device) -> "Data":
        """The same on the device, if the images fit into half of its free memory."""
        if device.type != "cuda" or self.images.nbytes >= torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return Data(self.images.to(device), None if self.labels is None else self.labels.to(device))


def load_data(name: str, data_dir: str | Path, train: bool = True, size: int | None = None) -> Data:
    """The images of a data set: mnist, fashion, digits 1x28x28 with labels; anime, folders 3 x size x size without.

    Raises UserError when the data is absent and can't be fetched, is damaged, or holds no image.
    """
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
    images_file, labels_file = (raw / f"{'train' if train else 't10k'}-{part}" for part in parts)
    if not (images_file.exists() and labels_file.exists()):
        show_line(f"downloading {kind.__name__} to {raw}")
        try:
            kind(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            cause = str(error).strip().splitlines()[-1]
            names = ", ".join(f"{split}-{part}" for split in ("train", "t10k") for part in parts)
            way_out = f"put {names} into {raw}, or try --dataset digits, which needs none"
            raise UserError(f"{kind.__name__} can't be downloaded ({cause}): {way_out}") from error
    try:
        images = datasets.mnist.read_image_file(str(images_file))
        labels = datasets.mnist.read_label_file(str(labels_file))
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or not len(labels) or labels.max() > 9:
            raise ValueError
    except (AssertionError, ValueError, RuntimeError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{images_file} or its labels are damaged: delete both, and they are fetched again") from error
    return Data(images[:, None], labels.long())


def draw_digits(train: bool = True) -> Data:
    """Ten thousand (train) or two thousand (test) digits in Pillow's own font, turned, slanted and sized at random.

    Always the same pictures, made in a few seconds: for trying things out without a download.
    """
    count, chance = (10_000, random.Random("digits")) if train else (2_000, random.Random("digits, test"))
    font = ImageFont.load_default(size=64)
    glyphs = {}
    for digit in range(10):
        for stroke in range(4):
            glyphs[digit, stroke] = glyph = Image.new("L", (96, 96))
            ImageDraw.Draw(glyph).text((48, 48), str(digit), 255, font, anchor="mm", stroke_width=stroke)
    labels = [i % 10 for i in range(count)]
    chance.shuffle(labels)
    pictures = bytearray()
    for label in labels:
        angle, slant = chance.gauss(0, 0.12), chance.gauss(0, 0.15)
        across, down = chance.uniform(1.05, 1.6), chance.uniform(1.1, 1.4)  # glyph pixels a pixel of the 56x56 picture
        cos, sin = math.cos(angle), math.sin(angle)
        a, b = across * (cos + slant * sin), across * (slant * cos - sin)
        d, e = down * sin, down * cos
        x, y = 28 + chance.uniform(-3, 3), 28 + chance.uniform(-3, 3)
        matrix = (a, b, 48 - a * x - b * y, d, e, 48 - d * x - e * y)
        glyph = glyphs[label, chance.randrange(4)]
        picture = glyph.transform((56, 56), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).reduce(2)
        pictures += picture.tobytes()
    return Data(torch.frombuffer(pictures, dtype=torch.uint8).view(count, 1, 28, 28), torch.tensor(labels))


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # some of Pillow's other readers start programs


def load_folder(folder: Path, size: int, data_dir: Path) -> Tensor:
    """The images under `folder`, flat or nested, as uint8 (N, 3, size, size), mapped from a cache file made once.

    The cache lies in `data_dir` as FOLDER-PLACE-DIGEST-SIZE.images: a folder whose files changed has another digest,
    and its earlier cache is removed. Files that are no usable image are skipped and named. Raises UserError when none
    is left, and when a file can't be read for another reason.
    """
    if not folder.is_dir():
        hint = "python crawl_anime.py fills it" if folder.name == "anime" else "--dataset takes a name or a folder"
        raise UserError(f"there is no folder {folder} ({hint})")
    names, digest = list_files(folder)
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    cache = data_dir / f"{folder.name}-{place}-{digest}-{size}.images"
    found = next(data_dir.glob(f"*-{digest}-{size}.images"), None)  # perhaps made when the folder had another place
    if found:
        cache, count = found, found.stat().st_size // (3 * size * size)
        told = f" (cached); skipped {len(names) - count:,} files" if count < len(names) else " (cached)"
    else:
        count, told = build_cache(cache, folder, names, size)
        for earlier in data_dir.glob(f"*-{place}-{'?' * len(digest)}-{size}.images"):
            if earlier != cache:
                earlier.unlink(missing_ok=True)
    show_line(f"{count:,} images in {folder}{told}")
    pixels = torch.from_file(str(cache), size=count * 3 * size * size, dtype=torch.uint8)
    return pixels.view(count, 3, size, size)


def list_files(folder: Path) -> tuple[list[str], str]:
    """Relative paths of all files but hidden ones, sorted, and a digest that changes when one of them does."""

    def fail(error: OSError):
        raise UserError(f"can't read {error.filename}: {error.strerror}") from error

    files = []
    for directory, folders, names in os.walk(folder, onerror=fail):
        folders[:] = fnmatch.filter(folders, "[!.]*")  # those that are walked
        for path in (os.path.join(directory, name) for name in fnmatch.filter(names, "[!.]*")):
            with contextlib.suppress(FileNotFoundError):  # removed a moment ago, or a link to nothing
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode) and not path.endswith(".images"):
                    files.append((os.path.relpath(path, folder), status.st_size, status.st_mtime_ns))
    files.sort()
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode("\0".join(map(str, file)) + "\0"))
    return [path for path, _, _ in files], digest.hexdigest()[:16]


def build_cache(cache: Path, folder: Path, names: list[str], size: int) -> tuple[int, str]:
    """Decode files into a mapped file, which may be larger than memory. Returns the images' number and who is none."""
    for leftover in cache.parent.glob(".*.images.*.tmp"):  # of builders that were killed
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    count, skipped, length, progress = 0, [], 3 * size * size, Progress(len(names), "files")
    decode = functools.partial(decode_files, folder=folder, size=size)
    with replacing(cache) as temporary:
        with open(temporary, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is told here; on a mapped page it would be a signal
                os.posix_fallocate(file.fileno(), 0, max(1, len(names)) * length)
        pixels = torch.from_file(str(temporary), shared=True, size=len(names) * length, dtype=torch.uint8)
        for name, picture in zip(names, map_in_workers(decode, names, len(names) // 256)):
            if isinstance(picture, OSError):
                raise UserError(f"can't read {folder / name}: {picture.strerror}")
            if isinstance(picture, str):
                skipped.append(f"{name} ({picture})")
            else:
                pixels[count * length : (count + 1) * length] = torch.frombuffer(picture, dtype=torch.uint8)
                count += 1
            progress.update(count + len(skipped))
        first = "".join(c if c.isprintable() else "?" for c in ", ".join(skipped[:3]))
        if not count:
            what = f"{len(names):,} files, none of them a usable image: {first}" if names else "no file"
            raise UserError(f"{folder} holds {what}; {', '.join(IMAGE_FORMATS)} are read")
        del pixels
        os.truncate(temporary, count * length)
    more = ", ..." if len(skipped) > 3 else ""
    return count, f"; skipped {len(skipped):,} files: {first}{more}" if skipped else ""


def map_in_workers(function: Callable, items: list, workers: int) -> Iterator:
    """function(part) for parts of the list, in up to 8 processes (0: in this one): one by one all their results."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, cores, 8)  # each holds a copy of the libraries: about 0.2 GB
    spawn = "spawn" if workers else None  # forking a process that has threads can hang
    loader = DataLoader(items, 16, collate_fn=function, num_workers=workers, multiprocessing_context=spawn)
    try:
        for results in loader:
            yield from results
    except RuntimeError as error:
        raise UserError(f"lost a process that decodes images, perhaps for want of memory ({error})") from error


def decode_files(names: list[str], folder: Path, size: int) -> list[bytearray | str | OSError]:
    """Of each file 3 x size x size pixels, or why it is no image, or why it can't be read now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # before the pixels are read
        return [decode_file(folder / name, size) for name in names]


def decode_file(path: Path, size: int) -> bytearray | str | OSError:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
            image.load()
            image = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)  # its middle
        return bytearray().join(band.tobytes() for band in image.split())
    except Image.UnidentifiedImageError:
        return "no image" if path.stat().st_size else "empty"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return "too large"
    except MemoryError:
        return OSError(errno.ENOMEM, "out of memory")
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        return error if isinstance(error, OSError) and error.errno else f"damaged: {error}"[:80]


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: upright, 16 bits as 8, transparency over white."""
    with contextlib.suppress(Exception):  # damaged EXIF data do not damage the picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def batches(data: Data, batch_size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor | None]]:
    """This process's share of every batch of one epoch, in random order, on the device: uint8 (B, C, H, W), int64 (B,).

    The last images that fill no batch are left out, so that every step has one shape; the next epoch permutes anew.
    """
    share = batch_size // processes()
    order = torch.randperm(len(data.images)).to(data.images.device)  # once: a copy a step would wait for the device
    for start in range(0, len(order) - batch_size + 1, batch_size):
        picked = order[start + rank() * share : start + (rank() + 1) * share]
        labels = data.labels.index_select(0, picked).to(device) if data.labels is not None else None
        yield data.images.index_select(0, picked).to(device, non_blocking=True), labels


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1]."""
    return images.float().div_(255)


def to_symmetric(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1], the range of tanh."""
    return images.float().div_(127.5).sub_(1)


def symmetric_to_unit(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to float32 in [0, 1]."""
    return images.float().add(1).div_(2)


# --------------------------------------------------------------------------------------------------------- pictures


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] to the nearest uint8, on the CPU."""
    return images.detach().float().mul(255).add_(0.5).clamp_(0, 255).to("cpu", torch.uint8)


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """Images (N, C, H, W) as one picture (C, rows * (H + 2) + 2, columns * (W + 2) + 2)."""
    from torchvision.utils import make_grid

    channels = images.shape[1]
    return make_grid(images, nrow=columns)[:channels]  # it makes three channels of one


def to_picture(image: Tensor | Image.Image) -> Image.Image:
    """A float (C, H, W) in [0, 1] as a Pillow image, grey for one channel."""
    from torchvision.transforms.functional import to_pil_image

    return image if isinstance(image, Image.Image) else to_pil_image(to_bytes(image))


def show_in_notebook(picture: Image.Image, **options) -> None:
    """Show a picture in line, in a notebook; `options` are those of IPython's display."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        from IPython.display import display

        display(picture, **options)


def write_picture(path: str | Path, image: Tensor | Image.Image) -> None:
    with replacing(path, sync=False) as temporary:  # thousands are written, and any can be drawn again
        to_picture(image).save(temporary, format="PNG")


def write_gif(path: str | Path, frames: list[Image.Image]) -> None:
    """An endless animation that rests on its last frame; few colours keep it small."""
    frames = [frame.quantize(16 if frame.mode == "L" else 64) for frame in frames]
    milliseconds = [150] * (len(frames) - 1) + [2000]
    with replacing(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def label_panels(panels: list[tuple[str, Image.Image]], columns: int = 2) -> Image.Image:
    """Pictures side by side, each under its title: the reports' four-panel figure."""
    width, height = max(p.width for _, p in panels), max(p.height for _, p in panels)
    font, columns = ImageFont.load_default(size=max(12, height // 18)), min(columns, len(panels))
    title, gap = font.size * 2, font.size
    rows = -(-len(panels) // columns)
    figure = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + title + gap)), "white")
    for i, (text, panel) in enumerate(panels):
        x, y = gap + i % columns * (width + gap), title + i // columns * (height + title + gap)
        ImageDraw.Draw(figure).text((x + width / 2, y - title / 2), text, "black", font, anchor="mm")
        figure.paste(panel, (x, y))
    return figure


COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Up to seven round numbers (1, 2 or 5 times a power of ten) from low to high, at least `least` apart."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    step = max(step, least)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Plot:
    """A figure with axes, ticks and a legend; draw at `point(x, y)` on `draw`. Halved at the end for smooth lines."""

    left, right, top, bottom = 150, 1560, 40, 890  # of the axes in 1600x1000 pixels

    def __init__(self, x_range, y_range, x_label: str, y_label: str, legend: dict[str, str], log_y: bool = False):
        self.image, self.font = Image.new("RGB", (1600, 1000), "white"), ImageFont.load_default(size=28)
        self.draw, self.legend = ImageDraw.Draw(self.image), legend
        self.scale = math.log10 if log_y else float
        (self.x0, self.x1), (self.y0, self.y1) = x_range, map(self.scale, y_range)
        for x in ticks(self.x0, self.x1, least=1 if x_label == "epoch" else 0):
            column = self.point(x, y_range[0])[0]
            self.draw.line((column, self.top, column, self.bottom), "#e6e6e6", 2)
            self.draw.text((column, self.bottom + 12), f"{x:g}", "black", self.font, anchor="ma")
        for tick in ticks(self.y0, self.y1, least=1 if log_y else 0):
            y = 10.0**tick if log_y else tick
            row = self.point(self.x0, y)[1]
            self.draw.line((self.left, row, self.right, row), "#e6e6e6", 2)
            self.draw.text((self.left - 12, row), f"{y:g}", "black", self.font, anchor="rm")
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), outline="black", width=2)
        self.draw.text(((self.left + self.right) / 2, 984), x_label, "black", self.font, anchor="md")
        side = Image.new("L", (self.bottom - self.top, 40))
        ImageDraw.Draw(side).text((side.width / 2, 20), y_label, 255, self.font, anchor="mm")
        self.image.paste("black", (8, self.top), side.rotate(90, expand=True))

    def point(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.x0) / (self.x1 - self.x0), (self.scale(y) - self.y0) / (self.y1 - self.y0)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def finish(self) -> Image.Image:
        """The figure (800x500) with its legend on top."""
        left = self.right - 90 - max(self.draw.textlength(name, self.font) for name in self.legend)
        bottom = self.top + 20 + 38 * len(self.legend)
        self.draw.rectangle((left, self.top + 10, self.right - 10, bottom), "white", "#bbbbbb", 2)
        for y, (name, colour) in zip(range(self.top + 34, bottom, 38), self.legend.items()):
            self.draw.rectangle((left + 12, y - 5, left + 52, y + 5), colour)
            self.draw.text((left + 64, y), name, "black", self.font, anchor="lm")
        return self.image.reduce(2)


def plot_lines(curves: dict[str, list[float]], x_label: str, y_label: str) -> Image.Image:
    """Curves over 1, 2, 3... as a figure; the y axis is logarithmic when positive values span two decades."""
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    log_y = low > 0 and high / low > 100
    margin = 0.05 * (high - low) or 0.5
    y_range = (low / 1.3, high * 1.3) if log_y else (low - margin, high + margin)
    colours = dict(zip(curves, COLOURS))
    plot = Plot((1, max(2, *map(len, curves.values()))), y_range, x_label, y_label, colours, log_y)
    for name, curve in curves.items():
        points = [plot.point(i + 1, value) for i, value in enumerate(curve)]
        plot.draw.line(points, colours[name], 4)
        if len(points) == 1:
            x, y = points[0]
            plot.draw.ellipse((x - 6, y - 6, x + 6, y + 6), colours[name])
    return plot.finish()


# --------------------------------------------------------------------------------------------------- a run's folder


def load_checkpoint(out_dir: str | Path, script: str | None = None) -> dict:
    """The checkpoint of a run's folder; runs no code from it. UserError when absent, damaged or of another script."""
    path = Path(out_dir, "checkpoint.pt")
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint: train first, or name the run's folder with --out-dir")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a foreign file's bytes: one line is enough
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        why = type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint of ours, and was not loaded ({why})") from error
    parts = dict(format=int, script=str, options=dict, epoch=int, networks=dict, optimizers=dict, history=list)
    types = {name: type(part) for name, part in checkpoint.items()} if isinstance(checkpoint, dict) else {}
    if types != parts or checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is no checkpoint of this version: train anew")
    if script is not None and checkpoint["script"] != script:
        raise UserError(f"{path} was written by {checkpoint['script']}.py: sample and resume it with that script")
    return checkpoint


def restore(parts: dict, states: dict) -> None:
    """Give networks or optimizers their states by name; UserError when they don't fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"the checkpoint does not fit this version's networks ({line}): train anew") from error


class Run:
    """The record that a training leaves in its folder: log, curves, pictures, checkpoint, animation; progress line."""

    def __init__(self, args: argparse.Namespace, data: Data):
        self.args, self.folder, count = args, Path(args.out_dir), len(data.images)
        self.history = list(args.checkpoint["history"]) if args.checkpoint else []
        self.steps, self.losses, self.displayed = count // args.batch_size, [], False
        self.saved, self.saved_at = len(self.history), -math.inf  # the last epoch that was saved, and when
        if self.saved > args.epochs:
            raise UserError(f"the run has {self.saved} epochs already, --epochs asks for {args.epochs}")
        if count < args.batch_size:
            way_out = f"give --batch-size {count // processes() * processes()} or less"
            raise UserError(f"--batch-size {args.batch_size} is larger than the data: {count:,} images: {way_out}")
        if args.batch_size % processes():
            raise UserError(f"--batch-size {args.batch_size} can't be shared evenly by {processes()} processes")
        if rank() == 0:
            self.open_folder(data.images)
        self.started = self.shown = time.perf_counter()

    def open_folder(self, images: Tensor) -> None:
        """Move a run that is in the way aside, clear what a kill left behind, and draw the real images."""
        args, folder = self.args, self.folder
        if args.checkpoint is None and (folder / "checkpoint.pt").exists():
            names = (f"{folder.name}-{i}" for i in itertools.count(1))  # a new run never overwrites another
            aside = next(path for path in map(folder.with_name, names) if not path.exists())
            folder.rename(aside)
            show_line(f"{args.script}: the run that was in {folder} is now {aside}; --resume would have continued it")
        for leftover in (*folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")):
            leftover.unlink(missing_ok=True)
        size = f"{len(images):,} images, {self.steps} steps an epoch"
        show_line(f"{args.script}: {args.preset} on {args.dataset}, {size}")
        write_picture(folder / "real.png", grid(to_unit(images[:64].cpu())))

    def log(self, losses: dict[str, Tensor]) -> None:
        """Keep a step's losses, without waiting for the device. Names carry units: "generator loss [nats]"."""
        self.names = list(losses)
        self.losses.append(torch.stack([loss.detach() for loss in losses.values()]))
        now = time.perf_counter()
        if now - self.shown > 0.5 and sys.stdout.isatty() and rank() == 0:
            self.shown = now
            self.show(dict(zip(self.names, self.losses[-1].tolist())), end="")

    def show(self, figures: dict[str, float], end: str = "\n") -> None:
        """The progress line, within an epoch or at its end."""
        epoch, total, done = len(self.history) + 1, self.args.epochs, len(self.losses)
        seconds = time.perf_counter() - self.started
        whole = seconds * self.steps / done  # this epoch's seconds
        per_epoch = self.history[-1]["seconds"] if self.history else whole
        left = clock(per_epoch * (total - epoch) + whole - seconds)
        shown = "  ".join(f"{name.partition(' [')[0]} {value:.4g}" for name, value in figures.items())
        rate = f"{done * self.args.batch_size / seconds:,.0f} images/s"
        show_line(f"epoch {epoch:>{len(str(total))}}/{total}  {shown}  {rate}  {left} left", end)

    def end_epoch(self, figures: dict[str, float] | None = None) -> None:
        """Keep the epoch's mean losses and more `figures`, such as test losses. UserError if a loss is not finite."""
        figures, epoch = figures or {}, len(self.history) + 1
        losses = torch.stack(self.losses).float()
        if dist.is_initialized():  # where one process has a loss that is not finite, all of them find it and end
            dist.all_reduce(losses)
            losses /= processes()
        losses = losses.cpu().double()
        for step, column in (~losses.isfinite()).nonzero().tolist():
            self.fail(f"{self.names[column]} is {losses[step, column]:g} in epoch {epoch}, step {step + 1}")
        means = dict(zip(self.names, losses.mean(0).tolist()))
        seconds = time.perf_counter() - self.started
        rate = len(losses) * self.args.batch_size / seconds
        self.show(means | {name: value for name, value in figures.items() if name.startswith("test loss")})
        times = {"seconds": round(seconds, 3), "images per second": round(rate, 1)}
        self.history.append({"epoch": epoch, **means, **figures, **times})
        self.losses = []

    def fail(self, fault: str) -> NoReturn:
        kept = f"the checkpoint of epoch {self.saved} is kept" if self.saved else "no checkpoint was written"
        raise UserError(f"{fault}: {kept}; a lower --lr may help")

    def save_samples(self, images: Tensor) -> None:
        """The epoch's picture of the fixed latents, (N, C, H, W) in [0, 1]; in a notebook it is shown in line."""
        picture = to_picture(grid(images))
        self.save_picture(f"samples/epoch-{len(self.history):04}.png", picture)
        show_in_notebook(picture, display_id=f"samples {id(self)}", update=self.displayed)
        self.displayed = True

    def save_picture(self, name: str, image: Tensor | Image.Image) -> None:
        """A picture of the model's own in the run's folder: float (C, H, W) in [0, 1] or a Pillow image."""
        if rank() == 0:
            write_picture(self.folder / name, image)

    def save(self, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> None:
        """Write log, curves and checkpoint, unless that was done in the last ten seconds and another epoch follows.

        The checkpoint comes last: it is what a resumed run believes. It holds tensors, numbers and strings alone, so
        that it loads without running code. UserError, and nothing is written, if a weight is not finite.
        """
        epoch = len(self.history)
        if epoch == self.args.epochs or time.perf_counter() - self.saved_at > SAVE_SECONDS:
            for name, network in networks.items():
                if not torch.stack([tensor.isfinite().all() for tensor in network.state_dict().values()]).all():
                    self.fail(f"the {name} has weights that are not finite after epoch {epoch}")
            if rank() == 0:
                self.write(networks, optimizers)
            self.saved, self.saved_at = epoch, time.perf_counter()
        self.started = time.perf_counter()

    def write(self, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> None:
        with replacing(self.folder / "log.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.history[-1]))
            writer.writeheader()
            writer.writerows(self.history)
        _, *names, _, _ = self.history[-1]  # without the epoch and the times
        curves = {name: [row[name] for row in self.history] for name in names}
        write_picture(self.folder / "losses.png", plot_lines(curves, "epoch", "loss"))
        checkpoint = dict(
            format=CHECKPOINT_FORMAT,
            script=self.args.script,
            options=run_options(self.args),
            epoch=len(self.history),
            networks={name: network.state_dict() for name, network in networks.items()},
            optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            history=self.history,
        )
        buffer = io.BytesIO()  # torch.save into memory first: its own file errors hide the reason
        torch.save(checkpoint, buffer)
        with replacing(self.folder / "checkpoint.pt") as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def finish(self) -> None:
        """The figure at a quarter, half, three quarters and all of the epochs, the animation, and the last line."""
        if rank() > 0:
            return
        total = self.args.epochs
        quarters = {max(1, round(total * part / 4)) for part in (1, 2, 3, 4)}
        moments = {1 + round(i * (total - 1) / 39) for i in range(40)}
        paths = {epoch: self.folder / f"samples/epoch-{epoch:04}.png" for epoch in sorted(quarters | moments)}
        pictures = {epoch: Image.open(path) for epoch, path in paths.items() if path.exists()}
        panels = [(f"Epoch {epoch}", picture) for epoch, picture in pictures.items() if epoch in quarters]
        frames = [picture for epoch, picture in pictures.items() if epoch in moments]
        if panels and frames:
            write_picture(self.folder / "progress.png", label_panels(panels))
            write_gif(self.folder / "progress.gif", frames)
        show_line(f"{self.args.script}: done, pictures in {self.folder}: look at {self.folder / 'progress.png'}")


# --------------------------------------------------------------------------------------------------------- sampling


class Sampler(NamedTuple):
    """What a trained model offers to anyone who knows nothing about it."""

    latent_size: int
    generate: Callable  # (latents (N, latent_size), labels (N,) or None) -> images float32 (N, C, H, W) in [0, 1]
    parameters: int  # weights of all networks
    classes: int = 0  # labels that `generate` takes; 0 for an unconditional model
    # (images uint8 (N, C, H, W), samples=500) -> bounds on the likelihood by name, in nats; None where there is none
    evaluate: Callable | None = None


def draw(sampler: Sampler, count: int, seed: int, device, label: int | None = None) -> Iterator:
    """`count` samples in chunks: uint8 (n, C, H, W) on the CPU and their labels (n,) or None. Classes come in turn."""
    generator = torch.Generator().manual_seed(seed)
    for numbers in torch.arange(count).split(500):
        latents = torch.randn(500, sampler.latent_size, generator=generator)[: len(numbers)].to(device)
        labels = None
        if sampler.classes:
            labels = numbers % sampler.classes if label is None else torch.full_like(numbers, label)
        images = sampler.generate(latents, labels.to(device) if labels is not None else None)
        yield to_bytes(images), labels


def sample(args: argparse.Namespace, sampler: Sampler, device: torch.device) -> None:
    """--sample N --to PATH: a grid for a name that ends in .png, else a folder with one PNG an image."""
    target = Path(args.to or Path(args.out_dir, "sample.png"))
    if target.suffix.lower() in (".jpg", ".jpeg", ".gif", ".webp", ".bmp"):
        raise UserError(f"--to {target}: a grid is written as PNG: give a name that ends in .png, or a folder")
    as_grid = target.suffix.lower() == ".png"
    if as_grid and args.sample > 10_000:
        raise UserError("a grid shows at most 10,000 images: --to FOLDER writes any number")
    if target.is_dir() if as_grid else target.exists() and not target.is_dir():  # told before any work is done
        raise UserError(f"--to {target}: there is a {'folder' if as_grid else 'file'} of that name")
    chunks = draw(sampler, args.sample, args.seed, device, getattr(args, "label", None))
    if as_grid:
        images = torch.cat([images for images, _ in chunks])
        picture = to_picture(grid(to_unit(images), columns=min(math.ceil(math.sqrt(args.sample)), 100)))
        write_picture(target, picture)
        show_in_notebook(picture)
    else:
        write_folder(target, chunks, args.sample)
    show_line(f"{args.script}: {args.sample:,} images in {target}")


def write_folder(folder: Path, chunks: Iterator, count: int) -> None:
    """One PNG an image, 00000.png and on; labelled images in a sub-folder a class."""
    written, progress, digits = 0, Progress(count, "images"), max(5, len(str(count - 1)))
    others = {path.name for path in folder.rglob("*.png")} - {f"{i:0{digits}}.png" for i in range(count)}
    if others:
        raise UserError(f"--to {folder} holds other images, such as {min(others)}: they would mix with the samples")
    for images, labels in chunks:
        for i, image in enumerate(images):
            place = folder if labels is None else folder / str(int(labels[i]))
            write_picture(place / f"{written:0{digits}}.png", to_unit(image))
            written += 1
        progress.update(written)
