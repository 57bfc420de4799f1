"""common.py: data, batches, seeds, files, pictures, the run's folder, checkpoints that must be refused."""

import csv
import io
import math
import os
import pickle
import random
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from PIL import Image

import common
import gan
from tests.conftest import ROOT, write_idx


def test_digits_are_labelled_balanced_varied_and_always_the_same():
    started = time.process_time()
    draw = common.draw_digits.__wrapped__  # the tests' own cache would make the second call idle
    train, test = draw(), draw(train=False)
    assert time.process_time() - started < 5
    assert train.images.shape == (10_000, 1, 28, 28) and test.images.shape == (2_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [1000] * 10
    assert torch.equal(draw().images, train.images)
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
    with pytest.raises(common.UserError, match="train-images-idx3-ubyte.*delete"):
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


def test_processes_share_a_batch_and_its_noise(monkeypatch):
    data = common.Data(torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1), None)
    common.seed_everything(5)
    whole = [images for images, _ in common.batches(data, 4)], common.randn(4, 3, device="cpu")
    parts = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        common.seed_everything(5)
        parts.append(([images for images, _ in common.batches(data, 4)], common.randn(2, 3, device="cpu")))
    for i, batch in enumerate(whole[0]):
        assert torch.equal(batch, torch.cat([parts[0][0][i], parts[1][0][i]]))
    assert torch.equal(whole[1], torch.cat([parts[0][1], parts[1][1]]))


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


def fake_run(folder, epochs=3):
    args = gan.parse_args(["--out-dir", str(folder), "--epochs", str(epochs), "--batch-size", "4"])
    data = common.Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8).long())
    networks = {"generator": torch.nn.Linear(2, 2)}
    optimizers = {"generator": common.adam(networks["generator"].parameters(), 0.1)}
    return common.Run(args, common.Compute(torch.device("cpu"), "fp32"), data, networks, optimizers)


def test_what_a_kill_left_half_written_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / "run/samples").mkdir(parents=True)
    others = [tmp_path / "run/notes.tmp", tmp_path / "run/.hidden", tmp_path / "run/samples/epoch-0001.png"]
    for path in (*others, tmp_path / "run/.checkpoint.pt.7.tmp", tmp_path / "run/samples/.epoch-0002.png.7.tmp"):
        path.touch()
    fake_run(tmp_path / "run")
    left = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {*others, tmp_path / "run/real.png"}


def test_any_losses_round_trip_through_the_log(tmp_path):
    chance = random.Random(1)
    losses = [
        [chance.choice([chance.gauss(0, 1), 10 ** chance.uniform(-30, 30), 0.0]) for _ in range(2)] for _ in range(6)
    ]
    run = fake_run(tmp_path / "run")
    expected = []
    for _ in run.epochs():
        for _ in run.batches():
            pair = losses.pop()
            run.record({"a [nats]": torch.tensor(pair[0]), 'b, "quoted" [nats]': torch.tensor(pair[1])})
        expected.append(torch.stack(run.losses).double().mean(0).tolist())
    with open(tmp_path / "run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [[float(row["a [nats]"]), float(row['b, "quoted" [nats]'])] for row in rows] == expected
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, value):
    run = fake_run(tmp_path / "run")
    with pytest.raises(common.UserError, match="loss b is .* in epoch 2, step 2: the checkpoint of epoch 1 is kept"):
        for epoch in run.epochs():
            for step, _ in enumerate(run.batches()):
                run.record(
                    {"loss a": torch.tensor(1.0), "loss b": torch.tensor(value if (epoch, step) == (2, 1) else 1.0)}
                )
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = fake_run(tmp_path / "run")
    with pytest.raises(common.UserError, match="generator has weights that are not finite after epoch 2"):
        for epoch in run.epochs():
            for _ in run.batches():
                run.record({"loss": torch.tensor(1.0)})
            if epoch == 2:
                run.networks["generator"].weight.data[0, 0] = math.nan
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 1


def test_saving_takes_a_bounded_part_of_the_time(tmp_path, monkeypatch):
    """Epochs of no length are saved now and then, not each; at the end the log is complete."""
    run = fake_run(tmp_path / "run", epochs=300)
    saves, save = [], run.save
    monkeypatch.setattr(run, "save", lambda epoch: (saves.append(epoch), save(epoch)))
    for _ in run.epochs():
        for _ in run.batches():
            run.record({"loss": torch.tensor(1.0)})
    assert len(saves) < 30 and saves[0] == 1 and saves[-1] == 300
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 301


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def checkpoint_file(tmp_path, kind: str):
    """A run's folder with a checkpoint that must be refused."""
    folder = tmp_path / "run"
    folder.mkdir()
    good = dict(format=1, script="gan", options={}, epoch=1, networks={}, optimizers={}, history=[])
    buffer = io.BytesIO()
    if kind == "truncated":
        torch.save(good, buffer)
        (folder / "checkpoint.pt").write_bytes(buffer.getvalue()[:-100])
    elif kind == "empty":
        (folder / "checkpoint.pt").touch()
    elif kind == "text":
        (folder / "checkpoint.pt").write_text("hello")
    elif kind == "pickle":
        (folder / "checkpoint.pt").write_bytes(pickle.dumps(Malicious()))
    elif kind == "malicious":
        torch.save(good | {"options": Malicious()}, folder / "checkpoint.pt")
    elif kind == "folder":
        (folder / "checkpoint.pt").mkdir()
    elif kind == "list":
        torch.save([1, 2], folder / "checkpoint.pt")
    elif kind == "missing key":
        del good["history"]
        torch.save(good, folder / "checkpoint.pt")
    elif kind == "version":
        torch.save(good | {"format": 99}, folder / "checkpoint.pt")
    elif kind == "script":
        torch.save(good | {"script": "vae"}, folder / "checkpoint.pt")
    elif kind == "options":
        torch.save(good, folder / "checkpoint.pt")
    return folder


KINDS = [
    "truncated",
    "empty",
    "text",
    "pickle",
    "malicious",
    "folder",
    "list",
    "missing key",
    "version",
    "script",
    "options",
]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_checkpoints_are_refused_and_never_run(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_file(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    for option in (["--resume"], ["--sample", "4"]):
        with pytest.raises(SystemExit) as stop:
            gan.main(["--out-dir", str(folder), *option])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("gan.py: error: ") and line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


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
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(common, "has_native_bf16", lambda device, native=native: native)
        assert common.choose_compute(args).precision == expected
    assert common.choose_compute(Namespace(device="cpu", precision="fp32", script="gan")).precision == "fp32"
