"""common.py: data, batches, seeds, files, pictures, a run's record, checkpoints that must be refused."""

import csv
import errno
import io
import math
import os
import random
import re
import time
from argparse import Namespace

import pytest
import torch
from PIL import Image, ImageColor

import common
import gan
import vae
from tests.conftest import CPU, write_idx


def test_digits_are_labelled_balanced_varied_and_always_the_same():
    train, test = common.draw_digits(), common.draw_digits(train=False)
    again = common.draw_digits.__wrapped__()  # past the tests' own cache
    assert train.images.shape == (10_000, 1, 28, 28) and test.images.shape == (2_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.labels.bincount().tolist() == [1000] * 10
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)
    assert len({bytes(image.flatten().tolist()) for image in train.images[:1000]}) == 1000
    border = torch.cat([train.images[..., 0, :], train.images[..., -1, :]]).float().mean()
    assert border < 2  # digits stay inside their pictures


def test_idx_files_are_read_as_they_are(tmp_path):
    data = common.load_data("mnist", write_idx(tmp_path, 40))
    expected = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(40))
    assert torch.equal(data.images, expected[:, None])
    assert data.labels.tolist() == [i % 10 for i in range(40)] and data.labels.dtype == torch.int64


@pytest.mark.parametrize("damage", ["truncated", "empty", "swapped"])
def test_a_damaged_idx_file_is_told_with_its_folder(damage, tmp_path):
    raw = write_idx(tmp_path, 40) / "MNIST/raw"
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    damaged = {"truncated": whole[:-5], "empty": b"", "swapped": (raw / "t10k-images-idx3-ubyte").read_bytes()}
    (raw / "train-images-idx3-ubyte").write_bytes(damaged[damage])
    with pytest.raises(common.UserError, match=f"MNIST can't be read .*{raw}"):
        common.load_data("mnist", tmp_path)


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


def test_precision_follows_the_processor(monkeypatch):
    args = Namespace(device="cpu", precision="auto", script="gan")
    assert common.choose_device(args) == CPU
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(common, "has_native_bf16", lambda device, native=native: native)
        for precision, type_ in (("auto", expected), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
            args.precision = precision
            with common.choose_autocast(args, CPU):
                assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == type_


def test_descend_fits_gradients_to_parameters_laid_out_otherwise():
    """The fused optimizer walks memory: a channels-last weight must not meet a contiguous gradient."""
    weight, images = torch.randn(8, 3, 4, 4), torch.randn(2, 3, 9, 9)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = torch.nn.Parameter(weight.clone(memory_format=memory_format))
        optimizer = common.adam([parameter], 0.1)
        for _ in range(3):
            common.descend(torch.nn.functional.conv2d(images, parameter).pow(2).mean(), optimizer)
        results.append(parameter.detach().contiguous())
    torch.testing.assert_close(*results)


def test_errors_of_libraries_become_one_short_line_even_without_a_message():
    assert common.one_line(ValueError(" one\n two")) == "one two"
    assert common.one_line(AttributeError()) == "AttributeError"
    assert len(common.one_line(ValueError("long " * 999))) < 210


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "folder/file.txt"
    with common.replacing(path) as one, common.replacing(path) as other:
        assert one != other
        one.write_text("first"), other.write_text("replaced at once")
    with pytest.raises(RuntimeError), common.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(common.UserError, match="No space left"), common.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(common.UserError, match="file.txt"), common.replacing(path / "below") as temporary:
        pass


def test_a_file_that_another_program_holds_is_tried_again(tmp_path, monkeypatch):
    tries, replace = [], os.replace

    def busy(*paths):  # as on Windows
        tries.append(paths)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "in use")
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy)
    with common.replacing(tmp_path / "b") as path:
        path.write_text("x")
    assert len(tries) == 3 and (tmp_path / "b").read_text() == "x"


def pixels(picture: Image.Image) -> torch.Tensor:
    """uint8 (C, H, W)."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, -1).permute(2, 0, 1)


def test_grid_and_pictures(tmp_path):
    for count, columns, side, factor in ((20, 8, 28, 2), (5, 4, 64, 2), (64, 8, 64, 1), (64, 8, 128, 1)):
        wide, high = factor * (columns * (side + 2) + 2), factor * (-(-count // columns) * (side + 2) + 2)
        assert common.grid(torch.zeros(count, 3, side, side), columns).size == (wide, high)
    one = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(pixels(common.grid(one)), one[0].repeat_interleave(18, 1).repeat_interleave(18, 2))
    colour = torch.rand(3, 5, 7)
    common.write_picture(tmp_path / "a.png", colour)
    assert torch.equal(pixels(Image.open(tmp_path / "a.png")), common.to_bytes(colour))


def test_any_losses_can_be_plotted():
    many = [random.Random(0).gauss(0, 1) for _ in range(2000)]
    for curves in ([[0.5]], [[1.0] * 3, [-3.0, -2.0, -5.0]], [[1e30, 1e-30], [1e20, 1e20]], [[0.0, 0.0]], [many]):
        figure = common.plot_losses({f"loss {i}": curve for i, curve in enumerate(curves)})
        seen = {colour for _, colour in figure.getcolors(100_000)}
        assert {ImageColor.getrgb(colour) for colour in common.COLOURS[: len(curves)]} <= seen


def test_ticks_are_round_and_few():
    for low, high in [(0, 1), (1, 200), (-3.2, 7.7), (99.1, 160.0), (0, 1e-7), (1, 2)]:
        found = common.ticks(low, high)
        assert 2 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9) + 1e-9


class FakeTraining:
    """A run's record, of eight black images and a network that nobody trains. It takes no lock."""

    def __init__(self, folder, epochs: int = 3, batch_size: int = 4):
        words = f"--epochs {epochs} --batch-size {batch_size} --out-dir".split()
        data = common.Data(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), torch.zeros(8).long())
        self.run = common.Run(gan.parse_args([*words, str(folder)]), data)
        self.networks = {"generator": torch.nn.Linear(2, 2)}
        self.optimizers = {"generator": common.adam(self.networks["generator"].parameters(), 0.1)}

    def epoch(self, *losses: dict[str, float], **figures) -> None:
        """An epoch of a step for each of the losses."""
        for step in losses or [{"loss": 1.0}] * 2:
            self.run.log({name: torch.tensor(loss) for name, loss in step.items()})
        self.run.end_epoch(figures)
        self.run.save_samples(torch.rand(4, 1, 28, 28))
        self.run.save(self.networks, self.optimizers)


def test_the_log_has_the_mean_losses_of_every_epoch(tmp_path):
    training, name, losses = FakeTraining(tmp_path / "run"), 'a, "quoted" [nats]', [1e-30, -1e30, 0.1]
    for loss in losses:
        training.epoch({name: loss, "b": 0.0}, {name: 3 * loss, "b": 0.0}, more=1.5)
    with open(tmp_path / "run/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", name, "b", "more", "seconds", "images per second"]
    assert [float(row[name]) for row in rows] == pytest.approx([2 * loss for loss in losses], abs=0, rel=1e-6)
    assert [(row["epoch"], row["b"], row["more"]) for row in rows] == [(str(i), "0.0", "1.5") for i in (1, 2, 3)]
    assert float(rows[0]["images per second"]) > 0


@pytest.mark.parametrize("culprit", ["loss b", "test loss", "weights"])
def test_what_is_not_finite_ends_the_run_and_keeps_the_checkpoint(culprit, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SAVE_SECONDS", -1)  # save after every epoch
    training = FakeTraining(tmp_path / "run")
    training.epoch()
    bad = {name: math.nan if name == culprit else 1.0 for name in ("loss b", "test loss")}
    if culprit == "weights":
        training.networks["generator"].weight.data[0, 0] = math.inf
    with pytest.raises(common.UserError, match=f"{culprit} .* epoch 2: the checkpoint of epoch 1 is kept"):
        training.epoch({"loss a": 1.0, "loss b": 1.0}, {"loss a": 1.0, "loss b": bad.pop("loss b")}, **bad)
    assert common.load_checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_by_product_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    names = {"log.csv", "losses.png", "progress.png", "progress.gif"}
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
    training = FakeTraining(tmp_path / "run", epochs=1)
    training.epoch()
    training.run.save_progress()
    training.run.finish()
    assert set(re.findall(r"gan: warning: can't write .*/(\S+): ", capsys.readouterr().out)) == names
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


def test_a_batch_that_is_too_large_or_uneven_is_refused(tmp_path, monkeypatch):
    with pytest.raises(common.UserError, match="--batch-size 9 is larger than the data: 8 images"):
        FakeTraining(tmp_path / "run", batch_size=9)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(common.UserError, match="--batch-size 7 can't be shared evenly by 3 processes"):
        FakeTraining(tmp_path / "run", batch_size=7)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_a_checkpoint_tells_what_made_it_and_a_resume_what_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = "--dataset digits --batch-size 5000 --device cpu --epochs".split()
    gan.main([*run, "1", "--precision", "fp32"])
    gan.main([*run, "2", "--precision", "fp32", "--resume"])
    assert "from here on" not in capsys.readouterr().out
    gan.main([*run, "3", "--precision", "bf16", "--resume"])
    assert "gan: from here on rounded otherwise: precision fp32 is now bf16\n" in capsys.readouterr().out
    first, second = common.load_checkpoint("runs/gan-guo-digits")["arithmetic"]
    assert (first["precision"], first["from_epoch"]) == ("fp32", 1)
    assert second == first | dict(precision="bf16", from_epoch=3)
    assert first["torch"] == torch.__version__ and first["threads"] == 1 and first["device"].startswith("cpu, ")


def checkpoint_file(tmp_path, kind: str):
    """A run's folder with a checkpoint that must be refused."""
    folder, buffer = tmp_path / "run", io.BytesIO()
    good = dict(format=1, script="gan", options={}, epoch=1, networks={}, optimizers={}, history=[])
    options = common.run_options(gan.parse_args(["--dataset", "digits"]))
    torch.save(good, buffer)
    contents = {
        "truncated": buffer.getvalue()[:-100],
        "malicious": good | {"options": Malicious()},
        "version": good | {"format": 99},
        "vae": good | {"script": "vae", "options": common.run_options(vae.parse_args([]))},
        "options": good,
        "networks": good | {"options": options, "optimizers": {"generator": {}}},
        "kept": good | {"options": options},
    }
    folder.mkdir()
    if isinstance(contents[kind], bytes):
        (folder / "checkpoint.pt").write_bytes(contents[kind])
    else:
        torch.save(contents[kind], folder / "checkpoint.pt")
    return folder


REFUSED = {
    "truncated": "is damaged",
    "malicious": "is damaged",
    "version": "no checkpoint of this version",
    "vae": "was written by vae.py",
    "options": "is of another gan.py (options ['batch_size', 'data_dir'",
    "networks": "does not fit th",
    "kept": ("was kept for drawing", "does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_checkpoints_are_refused_and_never_run(kind, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_file(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    for i, option in enumerate((["--resume"], ["--sample", "4"])):
        words = REFUSED[kind] if isinstance(REFUSED[kind], str) else REFUSED[kind][i]
        assert words in refusal("gan", "--dataset", "digits", "--out-dir", folder, *option)
    assert sorted(tmp_path.rglob("*")) == before
