"""The scripts as a user meets them: options, mistakes, progress, copies."""

import ast
import http.client
import importlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import zlib
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

import common
import vae
from tests.conftest import ROOT, SCRIPTS
from tests.test_common import checkpoint_file

# ----------------------------------------------------------------------------------------------------------- options

SHARED = "preset dataset data-dir out-dir epochs batch-size lr seed device precision resume sample to".split()
OF_PRESETS = ("epochs", "batch_size", "lr", "seed")  # what differs from preset to preset


def parser_of(script: str) -> ArgumentParser:
    """The parser that a script builds, caught before it parses."""

    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(common, "parse", catch)
        importlib.import_module(script).parse_args([])
    return caught.value.args[0]


def options_of(script: str) -> dict:
    return {action.dest: action for action in parser_of(script)._actions if action.dest != "help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_are_shared_explained_and_read(script):
    options = options_of(script)
    names = [action.option_strings for action in options.values()]
    assert names[: len(SHARED)] == [[f"--{name}"] for name in SHARED]
    helps = [action.help for action in options.values()]
    assert all(helps) and len(set(helps)) == len(helps)
    code = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    for name in options:
        assert re.search(rf"""\bargs\.{name}\b|getattr\(args, "{name}\"""", code), f"nobody reads --{name}"


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_shared_options_are_those_of_every_script(script):
    """Help, kind and default agree but for the numbers of the presets, which the next test compares with PRESETS."""
    ours, theirs = options_of("gan"), options_of(script)
    for name in (name.replace("-", "_") for name in SHARED):
        for part in ("metavar", "default", "nargs", "choices", "help"):
            one, other = getattr(ours[name], part), getattr(theirs[name], part)
            if part == "help" and name in OF_PRESETS:
                one, other = (text.rpartition(" (")[0] for text in (one, other))
            if (name, part) not in (
                ("preset", "choices"),
                ("dataset", "choices"),
                ("dataset", "help"),
                ("dataset", "metavar"),
            ):
                assert one == other, (name, part)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_numbers_in_the_help_are_the_presets(script):
    """(guo 200, banerjee 100): every preset's, DCGAN's for folders, or one default for all; and they are used."""
    module, options = importlib.import_module(script), options_of(script)
    presets = {name: dict(preset) for name, preset in module.PRESETS.items()}
    assert presets.keys() == set(options["preset"].choices)
    for preset in list(presets.values()):
        if folder := preset.pop("folder", None):
            presets["folders"] = folder
    for name, action in options.items():
        shown = re.search(r"\(([^()]*)\)$", action.help)
        expected = {preset: numbers[name] for preset, numbers in presets.items() if name in numbers}
        if not expected:  # no preset sets it: what is shown is the parser's own
            assert action.default in (None, False) or str(action.default) == shown[1]
            continue
        parts = dict(part.rpartition(" ")[::2] for part in shown[1].partition(":")[0].split(", "))
        parts = {preset: type(next(iter(expected.values())))(number) for preset, number in parts.items()}
        default = parts.pop("", 28 if name == "image_size" else None)  # "(0, folders 999)", "(1)"
        assert dict.fromkeys(presets, default) | parts == dict.fromkeys(presets, default) | expected, name
    for preset in module.PRESETS:
        args = module.parse_args(["--preset", preset, "--out-dir", "x"])
        assert {name: getattr(args, name) for name in presets[preset]} == presets[preset]


@pytest.mark.parametrize("script", SCRIPTS)
def test_preset_numbers_are_all_read(script):
    code = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    for preset in importlib.import_module(script).PRESETS.values():
        for name in {**preset, **preset.get("folder", {})}:
            assert name == "folder" or f"args.{name}" in code, f"nobody reads {name}"


def test_what_was_typed_goes_over_the_checkpoint_over_the_preset(trainings, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trainings.finished("vae-banerjee-linear"), "run")
    assert vae.parse_args(["--preset", "banerjee-linear", "--epochs", "7"]).epochs == 7
    run = ["--out-dir", "run"]
    args = vae.parse_args([*run, "--resume"])  # nothing but the folder is named: the rest is the run's
    assert (args.preset, args.latent_size, args.batch_size, args.epochs) == ("banerjee-linear", 16, 20, 2)
    free = ["--epochs", "9", "--data-dir", "there", "--device", "cpu", "--precision", "fp32"]
    args = vae.parse_args([*run, "--resume", *free])
    assert (args.epochs, args.data_dir, args.device, args.precision) == (9, str(tmp_path / "there"), "cpu", "fp32")
    assert vae.parse_args([*run, "--sample", "4", "--seed", "5"]).seed == 5
    for options, words in (
        ("--resume --preset guo", "--preset guo contradicts the checkpoint's banerjee-linear"),
        ("--resume --lr 0.1", "--lr 0.1 contradicts the checkpoint's 0.0001: leave it out, or train anew"),
        ("--resume --batch-size 64", "--batch-size 64 contradicts the checkpoint's 20"),  # the preset's own number
        ("--resume --seed 5", "--seed 5 contradicts"),
        ("--resume --beta 2", "--beta 2.0 contradicts the checkpoint's 1.0"),
        ("--resume --epochs 1", "2 epochs already"),
        ("--sample 4 --preset guo", "--preset guo contradicts"),
        ("--sample 4 --to x.jpg", "x.jpg"),
        ("--sample 4 --to run/log.csv", "log.csv"),
        ("--sample 4 --to run/samples", "other files, such as epoch-0001.png"),
        ("--sample 10001 --to x.png", "10,000"),
    ):
        before = snapshot(tmp_path)
        data = ["--data-dir", trainings.folder / "tiny"]
        assert words in refusal("vae", *run, *data, *options.split())
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- mistakes


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def put_file():
    Path("file").write_text("in the way")


def put_broken_images():
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("broken/b.jpg").touch()


def put_bomb():
    """A PNG of a few bytes that claims a hundred thousand pixels a side."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    Path("bombs").mkdir()
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    Path("bombs/bomb.png").write_bytes(png)


EVERY = {  # options for each script: what the line must say, and what has to be there first
    "--epochs 0": ("--epochs: must be a whole number of at least 1", None),
    "--epochs 1.5": ("--epochs", None),
    "--epochs many": ("--epochs", None),
    "--batch-size 0": ("--batch-size", None),
    "--batch-size -3": ("--batch-size", None),
    "--batch-size 10001 --dataset digits": ("--batch-size 10001 is larger than the data: 10,000 images", None),
    "--lr 0": ("--lr: must be a number above 0", None),
    "--lr nan": ("--lr", None),
    "--lr inf": ("--lr", None),
    "--lr -0.1": ("--lr", None),
    "--seed -1": ("--seed", None),
    "--seed 9223372036854775808": ("--seed", None),
    "--dataset cats": ("cats", None),
    "--epochs 99999999999999999999": ("--epochs", None),
    "--preset nobody": ("--preset", None),
    "--device tpu": ("--device", None),
    "--precision fp64": ("--precision", None),
    "--sample 0": ("--sample", None),
    "--sample 3": ("there is no checkpoint: train first", None),
    "--resume": ("there is no checkpoint: train first", None),
    "--resume --sample 3": ("give one of them", None),
    "--to grid.png": ("give --sample N too", None),
    "--no-such-option": ("--no-such-option", None),
    "--epoch 3": ("--epoch", None),
    "extra": ("extra", None),
    "--dataset digits --out-dir file": ("file", put_file),
    "--dataset digits --out-dir file/below": ("file", put_file),
    "--dataset digits --out-dir /proc/nowhere": ("/proc/nowhere", None),
    "--dataset mnist --data-dir file": ("file", put_file),
    "--resume --out-dir run": ("damaged", lambda: checkpoint_file(Path.cwd(), "truncated")),
    "--sample 3 --out-dir run": ("damaged", lambda: checkpoint_file(Path.cwd(), "malicious")),
}
if not torch.cuda.is_available():
    EVERY["--device cuda --dataset digits"] = ("--device cuda: this machine has", None)
OWN = [
    ("gan", "--dataset anime", "--dataset", None),
    ("vae", "--dataset anime", "--dataset", None),
    ("vae", "--beta -1", "--beta", None),
    ("vae", "--beta nan", "--beta", None),
    ("vae", "--evaluate", "train first", None),
    ("vae", "--evaluate --resume --out-dir run", "--evaluate measures", lambda: checkpoint_file(Path.cwd(), "vae")),
    ("dcgan", "--image-size 64", "--image-size is for folders of images: mnist is 28x28", None),
    ("dcgan", "--image-size 33 --dataset anime", "--image-size: invalid choice: 33", None),
    ("dcgan", "--ema 1", "--ema: must be a number", None),
    ("dcgan", "--ema nan", "--ema: must be a number", None),
    ("dcgan", "--augment everything", "--augment: invalid choice", None),
    ("dcgan", "--preset banerjee --dataset anime", "--preset banerjee is a network for 28x28 images", None),
    ("dcgan", "--dataset anime", "data/anime (", None),
    ("dcgan", "--dataset ./nobody", "nobody (--dataset takes a name or a folder", None),
    ("dcgan", "--dataset ./file", "file", put_file),
    ("dcgan", "--dataset ./empty", "empty holds no file", lambda: Path("empty").mkdir()),
    ("dcgan", "--dataset ./broken", "2 files, none a usable image: a.png (no image), b.jpg", put_broken_images),
    ("dcgan", "--dataset ./bombs", "bomb.png (too large)", put_bomb),
    ("cvaegan", "--dataset anime", "--dataset", None),
    ("cvaegan", "--label 3", "give --sample N too", None),
    ("cvaegan", "--sample 3 --label 10", "at most 9", None),
    ("cvaegan", "--label -1", "--label", None),
    ("cvaegan", "--weights nobody", "--weights: invalid choice", None),
    ("cvaegan", "--batch-size 1", "batch norm needs two images", None),
]
CASES = [(script, options, *rest) for script in SCRIPTS for options, rest in EVERY.items()] + OWN


@pytest.mark.parametrize(("script", "options", "words", "prepare"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_a_mistake_gets_one_line_and_changes_nothing(script, options, words, prepare, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare()
    before = snapshot(tmp_path)
    assert words in refusal(script, *options.split())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (http.client.IncompleteRead(b"", 5), "IncompleteRead"),
    ],
)
def test_no_network_and_no_mnist_names_the_cause_and_the_way_out(error, cause, tmp_path, monkeypatch, refusal):
    from torchvision.datasets import mnist

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)
    monkeypatch.chdir(tmp_path)
    line = refusal("gan")
    for word in (cause, "t10k-labels-idx1-ubyte", str(tmp_path / "data/MNIST/raw"), "--dataset digits"):
        assert word in line
    assert not list(tmp_path.rglob("*ubyte*"))


# ---------------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_line_an_epoch_or_one_rewritten_line(trainings, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    trainings.train("gan-guo", "run")
    printed = capfd.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("epoch")]
    pattern = r"epoch {}/2  \d:\d\d:\d\d left  [\d,]+ images/s  "
    pattern += r"discriminator loss [\d.]+  generator loss [\d.]+  D\(x\) [\d.]+  D\(G\(z\)\) [\d.]+"
    assert len(lines) == 2 and all(re.fullmatch(pattern.format(i + 1), line) for i, line in enumerate(lines)), lines
    assert "\r" not in printed.out and printed.err == ""
    assert printed.out.splitlines()[-1].endswith("run/progress.png")

    now, terminal = 0.0, Terminal()

    def tick():
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(time, "perf_counter", tick)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", terminal)
    trainings.train("gan-guo", "other")
    monkeypatch.undo()
    unfinished = [line for line in re.split(r"\r|\n", terminal.getvalue()) if line.startswith("epoch 1/2")]
    assert len(unfinished) == 3 and "\repoch 1/2" in terminal.getvalue()  # two steps, and the end
    assert all(len(line.removesuffix("\x1b[K")) == 39 for line in unfinished[:-1])  # never wraps
    assert re.fullmatch(pattern.format(1) + r"\x1b\[K", unfinished[-1])


# -------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("script", [*SCRIPTS, "crawl_anime", "compare"])
def test_inline_metadata_equals_requirements(script):
    """`uv run` reads the comment block of PEP 723; pip reads requirements.txt."""
    code = (ROOT / f"{script}.py").read_text()
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+)^# ///$", code)
    text = "".join(line[2:] + "\n" for line in block.group(1).splitlines())
    assert re.search(r'requires-python = "(.+)"', text).group(1) == ">=3.10"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.strip()]
    assert ast.literal_eval(re.search(r"dependencies = (\[.*\])", text).group(1)) == required


@pytest.mark.full
def test_a_copy_with_common_runs_from_any_folder(tmp_path):
    copy, elsewhere = tmp_path / "a copy é", tmp_path / "elsewhere"
    copy.mkdir()
    elsewhere.mkdir()
    for name in ("gan.py", "common.py"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, str(copy / "gan.py"), "--dataset", "digits", "--epochs", "1", "--batch-size", "1000"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs/gan-guo-digits/progress.png").exists()
