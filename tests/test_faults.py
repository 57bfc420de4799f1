"""What public reports and hostile use have broken: owners, by-products, moved data, odd output, odd systems."""

import csv
import errno
import importlib
import io
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torchvision import datasets

import common
from tests.conftest import ROOT, TRAININGS, make_folder, write_idx
from tests.test_common import FakeTraining

# ---------------------------------------------------------------------------------------------- a folder's owner


@pytest.mark.parametrize("options", ["--epochs 1", "--resume --epochs 3"])
def test_a_run_holds_its_folder(options, trainings, tmp_path, refusal):
    run = Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = f"--data-dir {trainings.folder / 'tiny'} --batch-size 20 --out-dir {run} {options}"
    with common.locked(run):
        assert "another process writes to" in refusal("gan", *words.split())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    importlib.import_module("gan").main(words.split())  # and lets go of it


def test_a_lock_is_gone_with_its_process_and_no_condition_where_there_is_none(tmp_path, capsys):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, os, pathlib\n"
    program += "with common.locked(pathlib.Path('run')): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path)
    with common.locked(tmp_path / "run"):
        pass

    def refuse(*_, **__):
        raise sqlite3.OperationalError("disk I/O error")  # as on some network file systems

    def connect(*_, **__):
        return types.SimpleNamespace(execute=refuse, close=print)

    for sqlite in (types.SimpleNamespace(connect=connect), None):  # None: a Python without it
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "sqlite3", sqlite)
            with common.locked(tmp_path / "run"):
                pass
        assert "no lock on" in capsys.readouterr().out


def test_a_run_that_could_not_start_lets_go_of_its_folder(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").touch()
    FakeTraining(tmp_path / "own", 1).epoch()
    with pytest.raises(common.UserError, match="is not moved aside") as kept:  # and its frames, as in a notebook
        FakeTraining(tmp_path / "own")
    with common.locked(tmp_path / "own"):
        assert kept


def test_only_a_folder_that_a_run_made_is_moved_aside(trainings, tmp_path, monkeypatch, refusal):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("mine")
    trainings.train("gan-guo", tmp_path / "own", "--epochs", 1)
    words = f"--data-dir {trainings.folder / 'tiny'} --batch-size 20 --epochs 1".split()
    assert "is not moved aside" in refusal("gan", *words, "--out-dir", tmp_path / "own")
    monkeypatch.chdir(Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "here")))
    assert "is not moved aside" in refusal("gan", *words, "--out-dir", ".")
    (tmp_path / "other").mkdir()
    torch.save({"weights": 1}, tmp_path / "other/checkpoint.pt")
    assert "no checkpoint of" in refusal("gan", *words, "--out-dir", tmp_path / "other")
    trainings.train("gan-guo", tmp_path / "outer", "--epochs", 1)
    trainings.train("gan-guo", tmp_path / "outer/inner", "--epochs", 1)
    assert "is not moved aside" in refusal("gan", *words, "--out-dir", tmp_path / "outer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "other", "outer", "own"]


def test_a_run_keeps_out_of_the_images_that_it_learns_from(tmp_path, monkeypatch, refusal):
    make_folder(tmp_path / "a/pictures", 4)
    before = sorted(tmp_path.rglob("*"))
    for place, dataset, out_dir in (
        ("a/pictures", ".", None),
        ("a", "pictures", "pictures"),
        ("a", "pictures", "."),
        ("a", "pictures", "pictures/b"),
    ):
        monkeypatch.chdir(tmp_path / place)
        assert "overlap" in refusal("dcgan", "--dataset", dataset, *(["--out-dir", out_dir] if out_dir else []))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_learns_from_no_other_runs_pictures(trainings, tmp_path, refusal):
    pictures = make_folder(tmp_path / "pictures", 4)
    run = trainings.finished("dcgan-faces")
    shutil.copytree(run, pictures / "run")
    assert len(common.load_folder(pictures, 8, tmp_path)) == 4
    for to in ("grid.png", "drawn"):
        moved = ("--out-dir", run, "--sample", 4, "--dataset", pictures, "--to", pictures / to)
        assert "learns from" in refusal("dcgan", *moved)


@pytest.mark.parametrize("name", ["gan-guo", "cvaegan-guo"])
def test_samples_never_mix_with_other_files(name, trainings, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    script, run = name.split("-")[0], trainings.finished(name)

    def draw(count, *more):
        return ("--out-dir", run, "--data-dir", trainings.folder / "tiny", "--sample", count, "--to", "drawn", *more)

    for count, more in ((12, ()), (12, ()), (14, ())):  # the same again, or more of them, is no mixture
        trainings.main(name, *draw(count, *more)[:-1], tmp_path / "drawn")
        (tmp_path / "drawn/.00001.png.0123456789ab.tmp").touch()  # as a kill leaves it
    assert "drawn holds other files" in refusal(script, *draw(5))
    if name == "cvaegan-guo":
        assert "drawn holds other files" in refusal(script, *draw(14, "--label", 3))
    shutil.rmtree("drawn")
    for other in ("holiday.jpg", "notes", "00001.txt", "x/00001.png"):
        Path("drawn", other).parent.mkdir(parents=True)
        Path("drawn", other).touch()
        assert "drawn holds other files" in refusal(script, *draw(5)), other
        shutil.rmtree("drawn")


def test_a_file_of_somebody_else_is_not_cleared(tmp_path):
    (tmp_path / "run").mkdir()
    theirs = [tmp_path / "run" / name for name in (".report.odt.tmp", ".~lock.tmp", ".log.csv.99.tmp")]
    for path in theirs:
        path.touch()
    FakeTraining(tmp_path / "run")
    assert all(path.exists() for path in theirs)


# ---------------------------------------------------------------------------------------------------- by-products


def test_temporary_names_are_unique_and_a_busy_file_is_tried_again(tmp_path, monkeypatch):
    with common.replacing(tmp_path / "a") as one, common.replacing(tmp_path / "a") as other:
        assert one != other  # in one process, or in two of one number on two machines
        one.touch(), other.touch()
    tries, replace = [], os.replace

    def busy(*paths):
        tries.append(paths)
        if len(tries) < 4:
            raise PermissionError(errno.EACCES, "in use")
        replace(*paths)

    monkeypatch.setattr(common.os, "replace", busy)
    with common.replacing(tmp_path / "b") as path:
        path.write_text("x")
    assert len(tries) == 4 and (tmp_path / "b").read_text() == "x"


@pytest.mark.parametrize(("number", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.ENOSPC, True)])
def test_a_file_system_without_fsync_is_no_mistake(number, fatal, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(common.os, "fsync", fail)
    try:
        with common.replacing(tmp_path / "a") as path:
            path.write_text("x")
    except common.UserError:
        assert fatal and not (tmp_path / "a").exists()
    else:
        assert not fatal and (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("damage", ["text", "bomb"])
def test_samples_that_cannot_be_read_are_one_warning(damage, trainings, tmp_path, capsys):
    run = Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run"))
    picture = run / "samples/epoch-0001.png"
    pixels = bytearray(picture.read_bytes())
    pixels[16:24], pixels[29:33] = struct.pack(">II", 60_000, 60_000), b""
    pixels[29:29] = struct.pack(">I", zlib.crc32(pixels[12:29]))
    picture.write_bytes(b"damaged" if damage == "text" else pixels)
    trainings.main("gan-guo", "--out-dir", run, "--resume")
    assert capsys.readouterr().out.count("warning: ") == 1
    assert Image.open(run / "progress.gif").n_frames == 1


def test_a_run_whose_losses_had_other_names_goes_on(trainings, tmp_path):
    run = Path(shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run"))
    checkpoint = common.load_checkpoint(run)
    for row in checkpoint["history"]:
        del row["D(x)"]
    torch.save(checkpoint, run / "checkpoint.pt")
    trainings.main("gan-guo", "--out-dir", run, "--resume", "--epochs", 3)
    with open(run / "log.csv", newline="") as file:
        assert [row["D(x)"] != "" for row in csv.DictReader(file)] == [False, False, True]


# ----------------------------------------------------------------------------------------------------- moved data


def test_images_that_moved_are_the_same_and_others_get_a_line(tmp_path, monkeypatch, refusal, capfd, trainings):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "a/faces", 24)
    words = "--image-size 32 --batch-size 12 --out-dir run --data-dir data".split()
    trainings.main("dcgan-faces", "--dataset", tmp_path / "a/faces", *words[:-3], tmp_path / "run", "--epochs", 1)
    shutil.copytree("a/faces", "b/faces")
    shutil.rmtree("a")
    resume = ("--out-dir", tmp_path / "run", "--resume", "--epochs")
    trainings.main("dcgan-faces", *resume, 2, "--dataset", tmp_path / "b/faces")
    trainings.main("dcgan-faces", *resume[:2], "--sample", 3, "--dataset", tmp_path / "b/faces")
    assert common.load_checkpoint("run")["options"]["dataset"] == str(tmp_path / "b/faces")
    make_folder(tmp_path / "c/faces", 25)
    line = refusal("dcgan", *resume, 3, "--dataset", tmp_path / "c/faces", "--data-dir", tmp_path / "data")
    assert "holds other images than the run's" in line
    (tmp_path / "b/faces/000.png").unlink()
    capfd.readouterr()
    trainings.main("dcgan-faces", *resume, 3)
    assert "has changed since the checkpoint: 23 images now" in capfd.readouterr().out
    assert "contradicts" in refusal("dcgan", *resume, 4, "--dataset", "mnist")


# --------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_what_cannot_be_encoded_is_escaped(encoding, tmp_path, monkeypatch, trainings):
    folder = make_folder(tmp_path / "日本 Größe ·", 4)
    if sys.platform == "linux":
        folder = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))  # a name that is no text
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    words = "--image-size 32 --batch-size 4 --epochs 1 --data-dir".split()
    trainings.main("dcgan-faces", "--dataset", folder, *words, tmp_path, "--out-dir", tmp_path / "run")
    trainings.main("dcgan-faces", "--dataset", folder, "--out-dir", tmp_path / "run", "--sample", 4)
    output.flush()
    text = output.buffer.getvalue().decode(encoding)
    assert "done, pictures in" in text and "4 images in" in text and ("\\u" in text or encoding == "cp932")


def test_a_dumb_terminal_gets_no_codes_and_none_at_all_is_fine(tmp_path, monkeypatch, trainings):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for term, codes in (("dumb", False), ("xterm", True)):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(sys, "stdout", Terminal())
        trainings.train("gan-guo", tmp_path / term)
        assert ("\x1b" in sys.stdout.getvalue()) == codes
    monkeypatch.setattr(sys, "stdout", None)
    trainings.train("gan-guo", tmp_path / "none")
    assert common.load_checkpoint(tmp_path / "none")["epoch"] == 2


def test_at_80_columns_the_time_left_is_seen(monkeypatch, tmp_path, capsys):
    run = FakeTraining(tmp_path / "run").run
    run.losses = [torch.zeros(8)]
    run.show({f"a loss of a long name {i} [nats]": 1.0 for i in range(8)})
    assert " left" in capsys.readouterr().out.splitlines()[-1][:79]


def test_a_time_beyond_all_bounds_is_still_a_line():
    assert common.clock(1e300).endswith("days, 17:46:40") and common.clock(5) == "0:00:05"


def test_progress_waits_until_it_knows(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    progress = common.Progress(1000, "files")
    now[0] = 60  # until the first of all
    progress.update(1)
    assert capsys.readouterr().out == ""
    now[0] = 71
    progress.update(111)
    assert "111 of 1,000 files, 10.0 a second, 0:01:29 left" in capsys.readouterr().out


@pytest.mark.full
def test_a_reader_that_goes_away_ends_it_with_a_line(tmp_path):
    command = f"{sys.executable} {ROOT / 'gan.py'} --dataset digits --batch-size 5000 --epochs 3 | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (
        done.stdout.startswith("gan: device") and done.stderr == "gan.py: error: the output was closed: Broken pipe\n"
    )


# ------------------------------------------------------------------------------------------------------- pictures


def test_metadata_never_condemn_pixels(tmp_path):
    picture, folder = Image.new("RGB", (9, 9), (200, 30, 40)), tmp_path / "pictures"
    folder.mkdir()
    for kind in ("zTXt", "iTXt"):
        texts = PngImagePlugin.PngInfo()
        (texts.add_text if kind == "zTXt" else texts.add_itxt)("a", "b" * 3_000_000, zip=True)
        picture.save(folder / f"{kind}.png", pnginfo=texts)
    picture.save(folder / "profile.png", icc_profile=b"\0" * 3_000_000)
    damaged = (folder / "zTXt.png").read_bytes()
    at = damaged.index(b"zTXt")
    (folder / "damaged.png").write_bytes(damaged[: at + 20] + b"\xff" + damaged[at + 21 :])
    images = common.load_folder(folder, 8, tmp_path)
    assert len(images) == 4 and (images.float().mean((0, 2, 3)) - torch.tensor([200.0, 30, 40])).abs().max() < 1


def test_alpha_of_zeros_is_no_alpha_and_profiles_are_applied(tmp_path):
    unseen = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    assert common.to_rgb(unseen).getpixel((4, 4)) == (10, 200, 30)
    half = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    half.paste((10, 200, 30, 255), (0, 0, 4, 8))
    assert common.to_rgb(half).getpixel((7, 4)) == (255, 255, 255)
    grey = Image.new("RGB", (8, 8), (120, 130, 140))
    red_for_green = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (slice(red_for_green.index(tag) + 4, red_for_green.index(tag) + 12) for tag in (b"rXYZ", b"gXYZ"))
    red_for_green[red], red_for_green[green] = red_for_green[green], red_for_green[red]
    profile = bytes(red_for_green).replace("sRGB".encode("utf-16-be"), "wild".encode("utf-16-be"))
    colour = Image.new("RGBA", (8, 8), (10, 200, 30, 255))
    for picture in (colour, colour.convert("RGB"), colour.convert("RGB").quantize(2)):
        picture.save(tmp_path / "wild.png", icc_profile=profile)
        assert common.open_picture(tmp_path / "wild.png").getpixel((4, 4)) == (200, 10, 30)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    grey.save(tmp_path / "a.png", icc_profile=lab.tobytes())
    assert common.open_picture(tmp_path / "a.png").getpixel((4, 4)) == (120, 130, 140)


def test_a_large_damaged_png_is_told_at_once():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + b"\0\0\0\0"

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 13) + chunk(b"IDAT", b"\0" * 999) * 30_000
    started = time.process_time()
    with pytest.raises(ValueError):
        common.open_picture(png)
    assert time.process_time() - started < 1


def test_what_is_beside_the_pictures_is_not_broken_and_a_known_format_is_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures", 2)
    (folder / "000.png").rename(folder / "000.jfif")
    (folder / "001.png").rename(folder / "no-ending")
    Image.new("RGB", (9, 9)).save(folder / "scan.tif")
    for name in ("metadata.csv", "000.txt", "Thumbs.db"):
        (folder / name).write_text("beside")
    (folder / "figure.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "itself").symlink_to("itself")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "more/linked.png")
    (folder / "by-link").symlink_to(tmp_path / "more")
    (tmp_path / "more/back").symlink_to(folder)
    assert len(common.load_folder(folder, 8, tmp_path)) == 4
    assert "skipped 1 files: figure.eps (EPS is not read)\n" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- odd systems, odd words


def test_libraries_that_do_not_fit_are_told_before_any_work(monkeypatch, refusal, tmp_path):
    monkeypatch.chdir(tmp_path)
    for target, name, error in (
        (common.ImageFont, "load_default", ImportError("The _imagingft C module is not installed")),
        (common.importlib, "import_module", RuntimeError("operator torchvision::nms does not exist")),
    ):

        def fail(*_, error=error, **__):
            raise error

        gan = importlib.import_module("gan")
        with monkeypatch.context() as patch, pytest.raises(common.UserError) as told:
            patch.setattr(target, name, fail)
            gan.train(gan.parse_args(["--dataset", "digits"]))
        assert str(error) in str(told.value) and "requirements.txt" in str(told.value)
    monkeypatch.delattr(torch, "accelerator")
    line = refusal("gan", "--dataset", "digits")
    assert "accelerator" in line and "requirements.txt" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize("script", ["gan", "dcgan", "vae", "cvaegan", "compare", "crawl_anime"])
def test_a_script_alone_says_that_it_needs_common(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    done = subprocess.run([sys.executable, f"{script}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "common.py beside it" in done.stderr


@pytest.mark.full
def test_neither_a_home_nor_a_known_user_is_needed(tmp_path):
    if not hasattr(os, "getuid") or os.getuid() != 0:
        pytest.skip("needs root to become somebody unknown")
    make_folder(tmp_path / "faces", 8)
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "tests", "assets", "runs", "data"))
    tmp_path.chmod(0o777)
    for folder in (*tmp_path.parents,):
        folder.chmod(folder.stat().st_mode | 0o005) if "pytest" in folder.name else None
    words = "dcgan.py --dataset faces --image-size 32 --batch-size 8 --epochs 1".split()
    command = [sys.executable, str(tmp_path / "copy" / words[0]), *words[1:]]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, user=54321, group=54321, capture_output=True, text=True, timeout=120
        )
    except PermissionError:
        pytest.skip("nobody else may run this Python")
    if "Permission denied" in done.stderr and "site-packages" in done.stderr:
        pytest.skip("nobody else may read these packages")
    assert done.returncode == 0, done.stderr


def test_mnist_in_folders_of_its_files_names_is_found(tmp_path):
    raw = write_idx(tmp_path, 20) / "MNIST/raw"
    expected = common.load_data("mnist", tmp_path).images
    for file in list(raw.iterdir()):
        file.rename(raw / "moved")
        file.mkdir()
        (raw / "moved").rename(file / file.name)
    assert torch.equal(common.load_data("mnist", tmp_path).images, expected)


WORDS = {
    "--epochs " + "9" * 401: "--epochs",
    "--out-dir " + "a" * 300 + " --dataset digits": "File name too long",
    "--dataset faces": "folders of images are for dcgan.py",
}


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[:14])
def test_odd_words_get_one_line(words, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    assert WORDS[words] in refusal("vae", *words.split())
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for script in ("gan", "dcgan", "vae", "cvaegan"):
        args = importlib.import_module(script).parse_args(["--out-dir=~/runs/x", "--data-dir=~/data"])
        assert (args.out_dir, args.data_dir) == (f"{tmp_path}/runs/x", f"{tmp_path}/data")


def test_a_file_name_is_no_folder_of_samples(trainings, tmp_path, refusal):
    for name in ("grid.pdf", "grid.jpg", "grid.tiff"):
        line = refusal("gan", "--out-dir", trainings.finished("gan-guo"), "--sample", 3, "--to", tmp_path / name)
        assert "a grid is a PNG" in line
    assert list(tmp_path.iterdir()) == []


def test_a_rank_without_its_fellows_is_none(monkeypatch, refusal):
    monkeypatch.setenv("RANK", "0")
    assert (common.rank(), common.processes()) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert "can't join 2 processes" in refusal("gan", "--dataset", "digits")


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        wait = socket.setdefaulttimeout
        monkeypatch.setattr(common.socket, "setdefaulttimeout", lambda seconds: wait(seconds and seconds / 600))
        with pytest.raises(common.UserError, match="can't be downloaded .*timed out"):
            common.load_data("mnist", tmp_path)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), MemoryError()])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(error, trainings, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(datasets.mnist, "read_image_file", fail)
    for read in (
        lambda: common.load_checkpoint(trainings.finished("gan-guo")),
        lambda: common.load_data("mnist", trainings.folder / "tiny"),
    ):
        with pytest.raises(type(error)):
            read()


def test_a_float_idx_file_is_damaged(tmp_path):
    folder = write_idx(tmp_path, 20)
    file = folder / "MNIST/raw/train-images-idx3-ubyte"
    data = file.read_bytes()
    file.write_bytes(data[:2] + b"\x0d" + data[3:16] + data[16:] * 4)
    with pytest.raises(common.UserError, match="are damaged"):
        common.load_data("mnist", folder)


def test_a_test_loss_that_is_not_finite_gets_its_line(trainings, tmp_path, monkeypatch, refusal):
    vae = importlib.import_module("vae")
    monkeypatch.setattr(vae, "measure", lambda *_: {"test loss [nats]": float("nan")})
    words = TRAININGS["vae-guo"].replace("tiny", str(trainings.folder / "tiny")).split()
    line = refusal("vae", *words, "--epochs", 2, "--out-dir", tmp_path / "run")
    assert "test loss [nats] is nan after epoch 1: no checkpoint was written" in line


def test_an_interrupt_while_a_checkpoint_is_read_is_one_line(trainings, monkeypatch, capfd):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    run = trainings.finished("gan-guo")
    monkeypatch.setattr(common.torch, "load", interrupt)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("gan").main(["--out-dir", str(run), "--resume"])
    error = capfd.readouterr().err
    assert stop.value.code == 130 and error.count("\n") == 1 and "--resume" in error


@pytest.mark.soak  # on a loaded machine the second comes while the first unwinds
def test_a_second_interrupt_changes_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "gan.py"), *"--dataset digits --epochs 999".split()]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("epoch") for line in run.stdout)
    run.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and error.count("\n") == 1, error


def test_a_busy_machine_is_told(monkeypatch, capsys):
    args = types.SimpleNamespace(device="cpu", precision="fp32", script="gan")
    monkeypatch.setattr(common.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(common.os, "cpu_count", lambda: 2)
    for load, told in ((0.1, False), (1.0, True), (None, False)):  # None: the system does not tell

        def average(load=load):
            if load is None:
                raise OSError("Load averages are unobtainable")
            return load, 0, 0

        monkeypatch.setattr(common.os, "getloadavg", average)
        common.choose_autocast(args, torch.device("cpu"))
        assert ("is busy" in capsys.readouterr().out) == told


def test_an_epoch_that_takes_far_longer_says_so_once(tmp_path, capsys):
    run = FakeTraining(tmp_path / "run", 5).run
    for seconds in (0.0, 0.0, 9.0, 9.0):
        run.started = common.time.perf_counter() - seconds
        run.log({"loss": torch.tensor(1.0)})
        run.end_epoch()
    assert capsys.readouterr().out.count("2.5 times the fastest") == 1
