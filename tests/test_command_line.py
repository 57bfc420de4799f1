"""The scripts as a user meets them: options, mistakes, progress, copies."""

import ast
import importlib
import re
import shutil
import sys
import time
import urllib.error
from argparse import Action
from pathlib import Path

import pytest
import torch

import common
import vae
from tests.conftest import ROOT, SCRIPTS

SHARED = "preset dataset data-dir out-dir epochs batch-size lr seed device precision resume sample walk to".split()
OF_PRESETS = ("epochs", "batch_size", "lr", "seed")  # what differs from preset to preset


# ----------------------------------------------------------------------------------------------------------- options
def options_of(script: str) -> dict[str, Action]:
    """The options that a script's parser has, caught before it parses."""
    found = {}

    def catch(parser, *_):
        found.update({action.dest: action for action in parser._actions if action.dest != "help"})
        raise common.UserError("caught")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(common.UserError):
        patch.setattr(common, "parse", catch)
        importlib.import_module(script).parse_args([])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_are_explained_and_read_and_the_shared_ones_are_equal(script):
    options, shared = options_of(script), options_of("gan")
    names = [action.option_strings for action in options.values()]
    assert names[: len(SHARED)] == [[f"--{name}"] for name in SHARED]
    helps = [action.help for action in options.values()]
    assert all(helps) and len(set(helps)) == len(helps)
    code = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    for name in options:
        assert re.search(rf"""\bargs\.{name}\b|getattr\(args, "{name}\"""", code), f"nobody reads --{name}"
    own = [("preset", "choices")]
    if script == "dcgan":  # which takes folders, too
        own += [("dataset", part) for part in ("choices", "help", "metavar")]
    for name, action in shared.items():
        for part in ("metavar", "default", "nargs", "choices", "help"):
            ours, theirs = getattr(options[name], part), getattr(action, part)
            if part == "help" and name in OF_PRESETS:  # their numbers are compared with PRESETS below
                ours, theirs = (text.rpartition(" (")[0] for text in (ours, theirs))
            assert ours == theirs or (name, part) in own, (name, part)


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


def test_what_was_typed_goes_over_the_checkpoint_over_the_preset(trainings, tmp_path, monkeypatch, refusal, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trainings.finished("vae-banerjee-linear"), "run")
    run = ["--out-dir", "run"]
    args = vae.parse_args([*run, "--resume"])  # nothing but the folder is named: the rest is the run's
    assert (args.preset, args.latent_size, args.batch_size, args.epochs) == ("banerjee-linear", 16, 20, 2)
    free = ["--epochs", "9", "--data-dir", "there", "--device", "cpu", "--precision", "fp32"]
    args = vae.parse_args([*run, "--resume", *free, "--lr", "0.1", "--batch-size", "64"])
    assert (args.epochs, args.data_dir, args.device, args.precision) == (9, str(tmp_path / "there"), "cpu", "fp32")
    assert (args.lr, args.batch_size) == (0.1, 64)
    assert "vae: from here on --lr 0.1, before 0.0001\n" in capfd.readouterr().out
    assert vae.parse_args([*run, "--sample", "4", "--seed", "5"]).seed == 5
    before = snapshot(tmp_path)
    for options, words in (
        ("--sample 4 --lr 0.1", "--lr 0.1 contradicts the checkpoint's 0.0001: leave it out, or train anew"),
        ("--sample 4 --batch-size 128", "--batch-size 128 contradicts the checkpoint's 20"),  # the preset's own number
        ("--sample 4 --epochs 9", "--epochs 9 contradicts"),
        ("--sample 4 --dataset digits", "--dataset digits contradicts"),
        ("--resume --seed 5", "--seed 5 contradicts"),
        ("--resume --epochs 1", "2 epochs already"),
        ("--evaluate --resume", "one at a time"),
        ("--walk 4 --to walk", "--walk draws NAME.png, or NAME.gif"),
        ("--sample 4 --preset guo", "--preset guo contradicts the checkpoint's banerjee-linear"),
        ("--sample 4 --to run/log.csv", "log.csv"),
        ("--sample 4 --to run/samples", "there are files in it"),
    ):
        data = ["--data-dir", trainings.folder / "tiny"]
        assert words in refusal("vae", *run, *data, *options.split())
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- mistakes
def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


MISTAKES = {  # what the line must say; `file` and run/checkpoint.pt are files of no use
    "gan --epochs 0": "--epochs: must be a whole number of at least 1",
    "gan --batch-size 10001 --dataset digits": "--batch-size 10001 is larger than the data: 10,000 images",
    "gan --lr 0": "--lr: must be a number",
    "gan --lr nan": "--lr",
    "gan --seed -1": "--seed",
    "gan --dataset anime": "--dataset",
    "gan --sample 3": "there is no checkpoint: train first",
    "gan --sample 3 --out-dir elsewhere": "name the run's --out-dir (run is there)",
    "gan --resume --out-dir run": "damaged",
    "gan --to grid.png": "--to says where --sample or --walk writes",
    "gan --dataset digits --out-dir file/below": "file",
    "gan --dataset mnist --data-dir file": "file",
    "vae --beta -1": "--beta",
    "vae --evaluate": "train first",
    "dcgan --image-size 64": "--image-size is for folders of images: mnist is 28x28",
    "dcgan --image-size 33 --dataset anime": "--image-size: invalid choice: 33",
    "dcgan --ema 1": "--ema: must be a number",
    "dcgan --augment everything": "--augment: invalid choice",
    "dcgan --preset banerjee --dataset anime": "--preset banerjee is a network for 28x28 images",
    "dcgan --dataset anime": "data/anime",
    "dcgan --dataset MNIST": "--dataset takes mnist, fashion, digits, anime or a folder of pictures",
    "dcgan --dataset https://example.org/faces.zip": "unpack an archive first",
    "dcgan --dataset file": "unpack an archive first",
    "dcgan --dataset digits --init run": "damaged",
    "cvaegan --label 3": "--label says which class --sample or --walk draws",
    "cvaegan --sample 3 --label 10": "at most 9",
    "cvaegan --weights nobody": "--weights: invalid choice",
    "cvaegan --batch-size 1": "batch norm needs two images",
}
if not torch.cuda.is_available():
    MISTAKES["gan --device cuda --dataset digits"] = "--device cuda: torch finds none here"


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_gets_one_line_and_changes_nothing(command, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for name in ("file", "run/checkpoint.pt"):
        Path(name).write_text("in the way")
    before = snapshot(tmp_path)
    assert MISTAKES[command] in refusal(*command.split())
    assert snapshot(tmp_path) == before


def test_no_network_and_no_mnist_names_the_cause_and_the_way_out(tmp_path, monkeypatch, refusal):
    from torchvision.datasets import mnist

    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)
    monkeypatch.chdir(tmp_path)
    line = refusal("gan")
    for word in ("Name or service not known", "labels-idx1-ubyte", str(tmp_path / "data/MNIST/raw"), "digits"):
        assert word in line
    assert not list(tmp_path.rglob("*ubyte*"))


# ---------------------------------------------------------------------------------------------------------- progress
def epoch_lines(text: str) -> list[str]:
    return [line for line in re.split(r"\r|\n", text) if line.startswith("epoch 1/2")]


def test_progress_is_a_line_an_epoch_and_twice_a_minute_or_one_rewritten_line(trainings, tmp_path, monkeypatch, capfd):
    whole = r"epoch 1/2  \d:\d\d:\d\d left  [\d,]+ images/s  "
    whole += r"discriminator loss [\d.]+  generator loss [\d.]+  D\(x\) [\d.]+  D\(G\(z\)\) [\d.]+"
    trainings.train("gan-guo", tmp_path / "quick")
    printed = capfd.readouterr()
    (line,) = epoch_lines(printed.out)
    assert re.fullmatch(whole, line) and "\r" not in printed.out and printed.err == ""
    assert printed.out.splitlines()[-1].endswith("quick/progress.png")

    seconds = iter(range(0, 10**9, 31))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    trainings.train("gan-guo", tmp_path / "slow")
    lines = epoch_lines(capfd.readouterr().out)
    assert len(lines) == 3 and all(re.fullmatch(whole, line) for line in lines)  # two steps, and the end

    for name, value in (("TERM", "xterm"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    trainings.train("gan-guo", tmp_path / "terminal")
    shown = capfd.readouterr().out
    *unfinished, last = epoch_lines(shown)
    assert len(unfinished) == 2 and "\repoch 1/2" in shown and re.fullmatch(whole + r"\x1b\[K", last)
    assert all(len(line.removesuffix("\x1b[K")) == 39 for line in unfinished)  # never wraps


# ------------------------------------------------------------------------------------------------------------ copies
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
