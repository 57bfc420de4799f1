"""The scripts as a user meets them: options, one-line errors, interrupts, progress, copies, notebooks."""

import argparse
import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import common
from tests.conftest import ROOT, write_idx

SCRIPTS = [name for name in ("gan", "dcgan", "vae", "cvaegan") if (ROOT / f"{name}.py").exists()]
SHARED = "preset dataset data-dir out-dir epochs batch-size lr seed device precision resume sample to".split()


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a script builds, caught before it parses."""

    class Caught(Exception):
        pass

    def catch(parser, *_, **__):
        raise Caught(parser)

    monkeypatch.setattr(common, "parse", catch)
    with pytest.raises(Caught) as caught:
        importlib.import_module(script).parse_args([])
    return caught.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_are_shared_explained_and_read(script, monkeypatch):
    actions = [action for action in parser_of(script, monkeypatch)._actions if action.dest != "help"]
    names = [action.option_strings[0].removeprefix("--") for action in actions]
    assert names[: len(SHARED)] == SHARED
    assert len(set(names)) == len(names)
    helps = [action.help for action in actions]
    assert all(helps) and len(set(helps)) == len(helps)
    code = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    for action in actions:
        name = action.dest
        reads = rf"""\bargs\.{name}\b|getattr\(args, "{name}"|given\["{name}"\]|"{name}" in given"""
        assert re.search(reads, code), f"nobody reads --{action.dest}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_preset_numbers_are_all_read(script):
    code = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    for preset in importlib.import_module(script).PRESETS.values():
        for name in {**preset, **preset.get("folder", {})}:
            assert name == "folder" or f"args.{name}" in code, f"nobody reads {name}"


MISTAKES = {
    "--dataset cats": "cats",
    "--epochs 0": "--epochs: must be a whole number of at least 1",
    "--epochs 1.5": "--epochs",
    "--batch-size 0": "--batch-size",
    "--batch-size 10001 --dataset digits": "--batch-size 10001 is larger than the data: 10,000 images",
    "--lr -1": "--lr: must be a number above 0",
    "--lr nan": "--lr",
    "--lr inf": "--lr",
    "--lr 0": "--lr",
    "--seed -1": "--seed",
    "--seed 9223372036854775808": "--seed",
    "--preset karras": "--preset",
    "--device tpu": "--device",
    "--precision int8": "--precision",
    "--sample 0": "--sample",
    "--sample 4": "there is no checkpoint: train first",
    "--resume": "there is no checkpoint",
    "--resume --sample 4": "give one of them",
    "--to grid.png": "give --sample N too",
    "--frobnicate": "--frobnicate",
    "--epoch 3": "--epoch",
    "extra": "extra",
    "--out-dir a-file --dataset digits": "a-file",
    "--data-dir a-file": "a-file",
}
if not __import__("torch").cuda.is_available():
    MISTAKES["--device cuda --dataset digits"] = "--device cuda: this machine has"


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("in the way")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("gan").main(options.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("gan.py: error: ") and error.count("\n") == 1 and MISTAKES[options] in error
    assert sorted(tmp_path.rglob("*")) == before


def test_no_network_and_no_mnist_names_the_way_out(tmp_path, monkeypatch, capsys):
    from torchvision import datasets

    def refuse(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("gan").main([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    for word in ("t10k-labels-idx1-ubyte", str(tmp_path / "data/MNIST/raw"), "--dataset digits"):
        assert word in error
    assert not list(tmp_path.rglob("*ubyte*"))


def test_options_that_contradict_the_checkpoint_are_refused(tmp_path, capsys):
    gan = importlib.import_module("gan")
    base = ["--out-dir", str(tmp_path / "run")]
    gan.main([*base, "--dataset", "digits", "--epochs", "2", "--batch-size", "1000"])
    for options, words in (
        (["--resume", "--preset", "banerjee"], "--preset banerjee contradicts the checkpoint's guo"),
        (["--resume", "--lr", "0.1"], "--lr 0.1 contradicts"),
        (["--resume", "--seed", "5"], "--seed 5 contradicts"),
        (["--resume", "--epochs", "1"], "2 epochs already"),
        (["--sample", "4", "--preset", "banerjee"], "--preset banerjee contradicts"),
        (["--sample", "4", "--to", str(tmp_path / "x.jpg")], "x.jpg"),
        (["--sample", "4", "--to", str(tmp_path / "run/log.csv")], "log.csv"),
        (["--sample", "10001", "--to", "x.png"], "10,000"),
    ):
        with pytest.raises(SystemExit) as stop:
            gan.main([*base, *options])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and words in error, error


def test_progress_is_a_line_an_epoch_or_one_rewritten_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "tiny", 300)
    options = ["--data-dir", "tiny", "--batch-size", "50", "--epochs", "2", "--out-dir", "run"]
    importlib.import_module("gan").main(options)
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("epoch")]
    pattern = r"epoch {}/2  discriminator loss [\d.]+  generator loss [\d.]+  [\d,]+ images/s  \d:\d\d left"
    assert len(lines) == 2 and all(re.fullmatch(pattern.format(i + 1), line) for i, line in enumerate(lines))
    assert "\r" not in printed.out and printed.err == ""
    assert printed.out.splitlines()[-1].endswith(str(Path("run/progress.png")))

    import pty

    master, slave = pty.openpty()
    command = [sys.executable, str(ROOT / "gan.py"), *options]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        output += part
    assert process.wait() == 0
    assert b"\repoch 1/2" in output


@pytest.mark.parametrize("script", [*SCRIPTS, *(n for n in ("crawl_anime", "compare") if (ROOT / f"{n}.py").exists())])
def test_inline_metadata_equals_requirements(script):
    """`uv run` reads the comment block of PEP 723; pip reads requirements.txt."""
    code = (ROOT / f"{script}.py").read_text()
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+)^# ///$", code)
    text = "".join(line[2:] + "\n" for line in block.group(1).splitlines())
    assert re.search(r'requires-python = "(.+)"', text).group(1) == ">=3.10"
    required = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()
    ]
    assert ast.literal_eval(re.search(r"dependencies = (\[.*\])", text).group(1)) == required


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


def test_pasted_into_a_notebook_it_trains_and_shows_its_grids(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.copy(ROOT / "common.py", tmp_path)
    code = (ROOT / "gan.py").read_text()
    small = code.replace("epochs=200, batch_size=100", "epochs=2, batch_size=1000")
    assert small != code
    small = small.replace("    main()\n", '    main(["--dataset", "digits"])\n')
    cells = [
        "import sys; sys.argv",
        small,
        'main(["--dataset", "digits", "--sample", "9"])',
        "from pathlib import Path; args = parse_args(); (args.dataset, args.epochs)",
        "%run gan.py --dataset digits --epochs 1 --out-dir other",
    ]
    (tmp_path / "gan.py").write_text(code)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert "-f" in outputs[0][0].data["text/plain"] or ".json" in outputs[0][0].data["text/plain"]
    for index in (1, 2, 4):
        assert any("image/png" in output.get("data", {}) for output in outputs[index]), outputs[index]
    assert outputs[3][-1].data["text/plain"] == "('mnist', 2)"
    assert (tmp_path / "runs/gan-guo-digits/progress.gif").exists()
    assert (tmp_path / "other/samples/epoch-0001.png").exists()
