"""common.py: options, data, batches, seeds, files, pictures, a run's record, checkpoints that must be refused."""

import csv
import io
import math
import os
import pickle
import random
import re
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from PIL import Image

import common
import gan
import vae
from tests.conftest import ROOT, write_idx


def test_digits_are_labelled_balanced_varied_and_always_the_same():
    train, test = common.draw_digits(), common.draw_digits(train=False)
    started = time.process_time()
    again = common.draw_digits.__wrapped__()  # past the tests' own cache
    assert time.process_time() - started < 5
    assert train.images.shape == (10_000, 1, 28, 28) and test.images.shape == (2_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [1000] * 10
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)
    assert len({bytes(image.flatten().tolist()) for image in train.images[:1000]}) == 1000
    border = torch.cat([train.images[..., 0, :], train.images[..., -1, :]]).float().mean()
    assert border < 2  # digits stay inside their pictures


def test_idx_files_are_read_as_they_are(tmp_path):
    data = common.load_data("mnist", write_idx(tmp_path, 40))
    expected = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(40))
    assert torch.equal(data.images, expected[:, None])
    assert data.labels.tolist() == [i % 10 for i in range(40)] and data.labels.dtype == torch.int64


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "folder", "swapped"])
def test_damaged_idx_files_are_named(tmp_path, damage):
    folder = write_idx(tmp_path, 40)
    file = folder / "MNIST/raw/train-images-idx3-ubyte"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "foreign":
        file.write_bytes(b"\x89PNG\r\n" + file.read_bytes())
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes((file.parent / "t10k-images-idx3-ubyte").read_bytes())
    with pytest.raises((common.UserError, OSError), match="train-images-idx3-ubyte"):
        common.load_data("mnist", folder)


def test_an_epoch_shows_every_image_once_and_drops_what_fills_no_batch():
    images = torch.arange(103, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = common.Data(images, torch.arange(103))
    common.seed_everything(0, 1)
    batches = list(common.batches(data, 20))
    assert [len(images) for images, _ in batches] == [20] * 5
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen.unique()) == 100
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in batches)
    common.seed_everything(0, 2)
    assert not torch.equal(torch.cat([labels for _, labels in common.batches(data, 20)]), seen)
    assert len(list(common.batches(data, 103))) == 1


def test_seed_and_epoch_both_count():
    def drawn(*pair):
        common.seed_everything(*pair)
        return torch.rand(4).tolist()

    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0), (0, 2**33)]
    assert len({tuple(drawn(*pair)) for pair in pairs}) == len(pairs)
    assert drawn(3, 4) == drawn(3, 4)


def test_ranges():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert common.to_unit(pixels)[[0, 255]].tolist() == [0, 1]
    assert common.to_symmetric(pixels)[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(common.to_bytes(common.to_unit(pixels)), pixels)
    assert torch.equal(common.to_bytes(common.symmetric_to_unit(common.to_symmetric(pixels))), pixels)


def test_descend_fits_gradients_to_parameters_laid_out_otherwise():
    """The fused optimizer walks memory: a channels-last weight must not meet a contiguous gradient."""
    weight = torch.randn(8, 3, 4, 4)
    images = torch.randn(2, 3, 9, 9)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = torch.nn.Parameter(weight.clone(memory_format=memory_format))
        optimizer = common.adam([parameter], 0.1)
        for _ in range(3):
            common.descend(torch.nn.functional.conv2d(images, parameter).pow(2).mean(), optimizer)
        results.append(parameter.detach().contiguous())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("message", ["one", " one\ntwo", ""])
def test_errors_of_libraries_become_one_line_even_without_a_message(message):
    class Network:
        def load_state_dict(self, state):
            raise AttributeError(message)

    with pytest.raises(common.UserError, match=r"networks \((one|AttributeError)\): train anew$"):
        common.restore({"generator": Network()}, {"generator": {}})


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "folder/file.txt"
    with common.replacing(path) as temporary:
        temporary.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(RuntimeError), common.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(common.UserError, match="No space left"), common.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(common.UserError, match="file.txt"), common.replacing(path / "below") as temporary:
        pass


def test_grid_and_pictures(tmp_path):
    assert common.grid(torch.zeros(20, 1, 28, 28), columns=8).shape == (1, 3 * 30 + 2, 8 * 30 + 2)
    assert common.grid(torch.zeros(5, 3, 64, 64), columns=4).shape == (3, 2 * 66 + 2, 4 * 66 + 2)
    colour = torch.rand(3, 5, 7)
    common.write_picture(tmp_path / "a.png", colour)
    back = torch.frombuffer(bytearray(Image.open(tmp_path / "a.png").tobytes()), dtype=torch.uint8).view(5, 7, 3)
    assert torch.equal(back.permute(2, 0, 1), common.to_bytes(colour))


@pytest.mark.parametrize(
    "curves",
    [
        {"one": [0.5]},
        {"flat": [1.0, 1.0, 1.0], "negative": [-3.0, -2.0, -5.0]},
        {"decades": [1000.0, 10.0, 0.01]},
        {"huge": [1e30, 1e-30]},
        {"zeros": [0.0, 0.0]},
        {"flat and huge": [1e20, 1e20]},
        {"many": [random.Random(0).gauss(0, 1) for _ in range(2000)]},
    ],
)
def test_any_losses_can_be_plotted(curves):
    figure = common.plot_lines(curves, "epoch", "loss")
    assert figure.size == (800, 500)
    assert figure.getcolors(100_000) is None or len(figure.getcolors(100_000)) > 5


def test_ticks_are_round_and_few():
    for low, high in [(0, 1), (1, 200), (-3.2, 7.7), (99.1, 160.0), (0, 1e-7), (1, 2)]:
        found = common.ticks(low, high)
        assert 2 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9) + 1e-9


class FakeTraining:
    """A run's record, of eight black images and a network that nobody trains."""

    def __init__(self, folder, epochs: int = 3, **changes):
        args = gan.parse_args(["--out-dir", str(folder), "--epochs", str(epochs), "--batch-size", "4"])
        vars(args).update(changes)
        self.run = common.Run(args, common.Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8).long()))
        self.networks = {"generator": torch.nn.Linear(2, 2)}
        self.optimizers = {"generator": common.adam(self.networks["generator"].parameters(), 0.1)}

    def epoch(self, *losses: dict[str, float], **figures) -> None:
        """An epoch of a step for each of the losses."""
        for step in losses or [{"loss": 1.0}] * 2:
            self.run.log({name: torch.tensor(loss) for name, loss in step.items()})
        self.run.end_epoch(figures)
        self.run.save_samples(torch.rand(4, 1, 28, 28))
        self.run.save(self.networks, self.optimizers)


def test_what_a_kill_left_half_written_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / "run/samples").mkdir(parents=True)
    others = [tmp_path / "run/notes.tmp", tmp_path / "run/.hidden", tmp_path / "run/samples/epoch-0001.png"]
    code = "0123456789ab"
    for path in (*others, *(tmp_path / "run" / f"{name}.{code}.tmp" for name in (".log.csv", "samples/.epoch-2.png"))):
        path.touch()
    FakeTraining(tmp_path / "run")
    left = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {*others, tmp_path / "run/real.png", tmp_path / "run/.lock"}


def test_any_losses_round_trip_through_the_log(tmp_path):
    chance = random.Random(1)
    training, expected = FakeTraining(tmp_path / "run"), []
    for _ in range(3):
        losses = [[chance.choice([chance.gauss(0, 1), 10 ** chance.uniform(-30, 30), 0.0]) for _ in "ab"] for _ in "12"]
        training.epoch(*({"a [nats]": a, 'b, "quoted" [nats]': b} for a, b in losses), more=1.5)
        expected.append([*torch.tensor(losses).double().mean(0).tolist(), 1.5])
    with open(tmp_path / "run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[float(row[name]) for name in ("a [nats]", 'b, "quoted" [nats]', "more")] for row in rows] == expected
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert list(rows[0])[-2:] == ["seconds", "images per second"] and float(rows[0]["images per second"]) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, value):
    training = FakeTraining(tmp_path / "run")
    training.epoch()
    with pytest.raises(common.UserError, match="loss b is .* in epoch 2, step 2: the checkpoint of epoch 1 is kept"):
        training.epoch({"loss a": 1.0, "loss b": 1.0}, {"loss a": 1.0, "loss b": value})
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 1


@pytest.mark.parametrize("names", [{"log.csv"}, {"real.png", "losses.png", "progress.png", "progress.gif"}])
def test_a_log_or_picture_that_cannot_be_written_is_one_warning(names, tmp_path, capsys):
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
    training = FakeTraining(tmp_path / "run", epochs=3)
    for _ in range(3):
        training.epoch()
    training.run.finish()
    warned = re.findall(r"warning: can't write .*/(\S+): ", capsys.readouterr().out)
    assert sorted(warned) == sorted(names)
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 3


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)
    training = FakeTraining(tmp_path / "run")
    training.epoch()
    training.networks["generator"].weight.data[0, 0] = math.nan
    with pytest.raises(common.UserError, match="generator has weights that are not finite after epoch 2"):
        training.epoch()
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_run_is_saved_at_first_then_every_ten_seconds_and_at_its_end(tmp_path, monkeypatch):
    now, saved = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    training = FakeTraining(tmp_path / "run", epochs=10)
    for epoch in range(1, 11):
        now += 3
        training.epoch()
        saved.append(common.load_checkpoint(tmp_path / "run")["epoch"])
        log = (tmp_path / "run/log.csv").read_text().splitlines()
        assert len(log) == saved[-1] + 1 and log[-1].endswith(",3.0,2.7")  # seconds, images per second
        assert (tmp_path / f"run/samples/epoch-{epoch:04}.png").exists()  # which are drawn after every epoch
    assert saved == [1, 1, 1, 1, 5, 5, 5, 5, 9, 10]


@pytest.mark.parametrize(("count", "size"), [(1, 8), (2, 8), (3, 6)])
def test_a_batch_that_is_too_large_or_uneven_is_refused_with_the_size_to_give(count, size, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("WORLD_SIZE", str(count))):
        monkeypatch.setenv(name, value)
    with pytest.raises(common.UserError, match=f"larger than the data: 8 images: give --batch-size {size} or less"):
        FakeTraining(tmp_path / "run", batch_size=9 * count)
    if count > 1:
        with pytest.raises(common.UserError, match=f"--batch-size 7 can't be shared evenly by {count} processes"):
            FakeTraining(tmp_path / "run", batch_size=7)
    assert not (tmp_path / "run").exists()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def checkpoint_file(tmp_path, kind: str):
    """A run's folder with a checkpoint that must be refused."""
    folder, buffer = tmp_path / "run", io.BytesIO()
    file = folder / "checkpoint.pt"
    good = dict(format=1, script="gan", options={}, epoch=1, networks={}, optimizers={}, history=[])
    options = common.run_options(gan.parse_args(["--dataset", "digits"]))
    torch.save(good, buffer)
    contents = {
        "truncated": buffer.getvalue()[:-100],
        "empty": b"",
        "text": b"hello",
        "pickle": pickle.dumps(Malicious()),
        "malicious": good | {"options": Malicious()},
        "list": [1, 2],
        "missing key": {key: value for key, value in good.items() if key != "history"},
        "version": good | {"format": 99},
        "script": good | {"script": "vae"},
        "vae": good | {"script": "vae", "options": common.run_options(vae.parse_args([]))},
        "options": good,
        "types": good | {"options": options | {"epochs": "1"}},
        "networks": good | {"options": options},
    }
    folder.mkdir()
    if kind == "folder":
        file.mkdir()
    elif isinstance(contents[kind], bytes):
        file.write_bytes(contents[kind])
    else:
        torch.save(contents[kind], file)
    return folder


REFUSED = {
    "truncated": "is damaged",
    "empty": "is damaged",
    "text": "is damaged",
    "pickle": "is damaged",
    "malicious": "is damaged",
    "folder": "there is no checkpoint",
    "list": "no checkpoint of this version",
    "missing key": "no checkpoint of this version",
    "version": "no checkpoint of this version",
    "script": "was written by vae.py",
    "options": "is of another gan.py (options ['batch_size', 'data_dir'",
    "types": "is of another gan.py (options of other types)",
    "networks": "does not fit this version's networks",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_checkpoints_are_refused_and_never_run(kind, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_file(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    for option in (["--resume"], ["--sample", "4"]):
        assert REFUSED[kind] in refusal("gan", "--dataset", "digits", "--out-dir", folder, *option)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.full
def test_importing_changes_nothing(tmp_path):
    """No file, no output, no seed, no thread count, no signal handler."""
    program = (
        "import random, signal, torch; before = (torch.initial_seed(), random.getstate(), torch.get_num_threads(), "
        "signal.getsignal(signal.SIGINT)); import common, gan; assert before == (torch.initial_seed(), "
        "random.getstate(), torch.get_num_threads(), signal.getsignal(signal.SIGINT))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_mnist_is_held_once_in_memory(real_data, tmp_path):
    """A short run's peak over what importing torch and torchvision takes: at most 300 MB."""
    program = (
        "import resource, sys, torch, torchvision; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; "
        "before = peak(); import gan; gan.main(sys.argv[1:]); print(peak() - before)"
    )
    options = ["--data-dir", real_data, "--epochs", 1, "--batch-size", 1000, "--out-dir", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, options)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 300


def test_precision_follows_the_processor(monkeypatch):
    args = Namespace(device="cpu", precision="auto", script="gan")
    assert common.choose_device(args) == torch.device("cpu")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(common, "has_native_bf16", lambda device, native=native: native)
        for precision, type_ in (("auto", expected), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
            args.precision = precision
            with common.choose_autocast(args, torch.device("cpu")):
                assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == type_
