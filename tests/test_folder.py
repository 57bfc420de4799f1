"""Folders of images: every mode and format, files that are no pictures, and the cache of the pixels."""

import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

import common
from tests.conftest import Script

RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    return path


def load(folder: Path, size: int = 8) -> torch.Tensor:
    return common.load_folder(folder, size, folder.parent / "data")


def caches(folder: Path) -> list[Path]:
    return sorted((folder.parent / "data").glob("*.images"))


def paint(folder: Path, count: int) -> None:
    for i in range(count):
        Image.new("RGB", (9, 9), (i % 256, i // 256, 7)).save(folder / f"{i:05}.bmp")


# ------------------------------------------------------------------------------------------------------ pictures
def halves(left, right, mode="RGB", size=(32, 32)) -> Image.Image:
    """A picture of two colours, side by side."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def turned() -> Image.Image:
    """Blue above red as stored; its EXIF tag says that the stored top is the right side."""
    image = halves(RED, BLUE).rotate(90)
    image.getexif()[0x0112] = 6
    return image


PALETTE = halves(RED, BLUE).quantize(2)
# name: (what is saved, its options, the colours of the left and the right half as they must be loaded)
MODES = {
    "grey.png": (halves(0, 128, "L"), {}, (0, 0, 0), GREY),
    "black-and-white.png": (halves(0, 255, "1"), {}, (0, 0, 0), WHITE),
    "palette.png": (PALETTE, {}, RED, BLUE),
    "palette-with-hole.png": (PALETTE, dict(transparency=PALETTE.getpixel((31, 0))), RED, WHITE),
    "alpha.png": (halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA"), {}, RED, WHITE),
    "half-alpha.png": (halves((255, 0, 0, 255), (0, 0, 0, 127), "RGBA"), {}, RED, GREY),
    "grey-alpha.png": (halves((0, 255), (0, 0), "LA"), {}, (0, 0, 0), WHITE),
    "one-colour-transparent.png": (halves(RED, BLUE), dict(transparency=BLUE), RED, WHITE),
    "grey-16-bits.png": (halves(0, 0x8080, "I;16"), {}, (0, 0, 0), GREY),
    "rgb.jpg": (halves(RED, BLUE), dict(quality=95), RED, BLUE),
    "cmyk.jpg": (halves(RED, BLUE).convert("CMYK"), dict(quality=95), RED, BLUE),
    "large.jpg": (halves(RED, BLUE, size=(512, 512)), dict(quality=95), RED, BLUE),
    "turned.jpg": (turned(), dict(quality=95, exif=turned().getexif()), RED, BLUE),
    "rgb.webp": (halves(RED, BLUE), dict(lossless=True), RED, BLUE),
    "alpha.webp": (halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA"), dict(lossless=True), RED, WHITE),
    "rgb.tiff": (halves(RED, BLUE), {}, RED, BLUE),
    "first-frame.gif": (halves(RED, BLUE), dict(save_all=True, append_images=[halves(WHITE, GREY)]), RED, BLUE),
    "wide.png": (halves(RED, BLUE, size=(96, 16)), {}, RED, BLUE),
    "tall.png": (halves(RED, BLUE, size=(16, 96)), {}, RED, BLUE),
    "tiny.bmp": (halves(RED, RED, size=(1, 1)), {}, RED, RED),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_colours_that_a_person_sees(folder, name):
    image, options, left, right = MODES[name]
    image.save(folder / name, **options)
    images = load(folder)
    assert images.shape == (1, 3, 8, 8) and images.dtype == torch.uint8
    for column, colour in ((0, left), (7, right)):
        expected = torch.tensor(colour).view(3, 1).expand(3, 8)
        torch.testing.assert_close(images[0, :, :, column].int(), expected.int(), atol=9, rtol=0)


def test_an_image_of_the_asked_size_is_kept_to_the_bit_and_others_as_pillow_resizes_them(folder):
    noise = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    Image.fromarray(noise[0].numpy()).save(folder / "a.png")
    wide = Image.fromarray(torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8).numpy())
    wide.save(folder / "b.png")
    images = load(folder)
    assert torch.equal(images[0], noise[0].permute(2, 0, 1))
    expected = wide.resize((8, 8), Image.Resampling.BICUBIC, box=(8, 0, 32, 24))
    assert images[1].permute(1, 2, 0).contiguous().numpy().tobytes() == expected.tobytes()


def test_nested_folders_odd_names_and_wrong_endings(folder):
    colours = {"a/b/deep.PNG": RED, "really-a-bmp.jpg": GREY, "ünï cödé\nname.jpeg": BLUE}
    for name, colour in colours.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), colour).save(path, "BMP" if "bmp" in name else "PNG")
    (folder / "linked.png").symlink_to(folder / "a/b/deep.PNG")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    for name in (".hidden.png", "notes.txt", "no-ending"):
        Image.new("RGB", (9, 9), WHITE).save(folder / name, "PNG")
    order = [RED, GREY, BLUE]  # of their relative paths, whatever the file system's is; once each, in spite of links
    assert [tuple(image[:, 0, 0].tolist()) for image in load(folder)] == order


def test_long_texts_and_damaged_exif_data_do_not_hide_a_picture(folder):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "masterpiece, " * 400_000, zip=True)  # 5 MB, of which Pillow reads one by itself
    halves(RED, BLUE).save(folder / "text.png", pnginfo=text)
    halves(RED, BLUE).save(folder / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert len(load(folder)) == 2


def write_broken(folder: Path) -> None:
    """Seven files that are no pictures."""
    picture = Image.effect_noise((64, 64), 90)
    for name in ("cut.png", "cut.jpg", "bomb.bmp"):
        picture.save(folder / name)
    for name in ("cut.png", "cut.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:600])
    bomb = bytearray((folder / "bomb.bmp").read_bytes())
    bomb[18:26] = 2 * (60_000).to_bytes(4, "little")  # width and height
    (folder / "bomb.bmp").write_bytes(bomb)
    (folder / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "text.png").write_text("not a picture")
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    odd = b"\x83\xff.png" if sys.platform == "linux" else b"odd.png"  # no text, as of old archives; others refuse it
    (folder / os.fsdecode(odd)).touch()


def test_broken_and_foreign_files_are_skipped_counted_and_named(folder, capsys):
    write_broken(folder)
    Image.new("RGB", (9, 9), RED).save(folder / "z.png")
    assert len(load(folder)) == 1
    shown = capsys.readouterr().out
    assert "skipped 7 of 8 files" in shown and "a.heic (in no format that is read), bomb.bmp (Image size" in shown
    assert len(load(folder)) == 1


def test_pixels_of_unknown_range_are_skipped_and_a_dim_folder_is_told(folder, capsys):
    Image.new("F", (9, 9), 0.5).save(folder / "float.tiff")
    Image.new("I", (9, 9), 4000).save(folder / "signed.tiff")
    for i in range(3):
        Image.new("I;16", (9, 9), 1300 * i).save(folder / f"{i}.png")  # 12 bits of 16
    assert load(folder).aminmax().max == 10
    shown = capsys.readouterr().out
    assert "skipped 2 of 5 files, such as float.tiff (float or 32-bit pixels, of unknown range)" in shown
    assert "warning: the images hardly differ in brightness (0 to 10 of 255)" in shown


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "text", "broken"])
def test_a_folder_without_pictures_is_an_error_that_says_what_is_read(folder, kind, refusal):
    path, words = folder, f"{folder} holds no picture to use: files that end in .jpg .jpeg .jfif .png .webp .bmp"
    if kind in ("missing", "file"):
        path, words = folder / "nothing", f"there is no folder {folder / 'nothing'}: --dataset takes mnist"
    if kind == "broken":
        write_broken(folder)
    elif kind in ("file", "text"):
        (folder / {"file": "nothing", "text": "notes.txt"}[kind]).touch()
    options = ["--data-dir", folder.parent / "data", "--out-dir", folder.parent / "run"]
    assert words in refusal("dcgan", "--dataset", path, *options)
    assert not list(folder.parent.glob("data/*")) and not list(folder.parent.glob("data/.*"))


def test_a_file_that_cannot_be_read_now_is_named_and_makes_no_cache(folder, monkeypatch):
    paint(folder, 3)
    real = Image.open

    def refuse(path, **options):
        if Path(path).name == "00001.bmp":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(common.UserError, match="can't read .*/pictures/00001.bmp: Permission denied"):
            load(folder)
    assert not list(folder.parent.glob("data/*")) and not list(folder.parent.glob("data/.*"))
    assert len(load(folder)) == 3


# ----------------------------------------------------------------------------------------------------- the cache
def test_the_cache_is_used_until_a_file_changes_and_then_replaced(folder):
    changes = [
        lambda: paint(folder, 4),
        lambda: (folder / "00000.bmp").unlink(),
        lambda: (folder / "00001.bmp").rename(folder / "00009.bmp"),
        lambda: Image.new("RGB", (9, 9), WHITE).save(folder / "00002.bmp"),  # as long as before, but newer
    ]
    paint(folder, 3)
    for count, change in zip((4, 3, 3, 3), changes):
        before = load(folder)
        (old,) = caches(folder)
        kept, used = before.clone(), old.stat().st_mtime_ns
        load(folder)
        assert old.stat().st_mtime_ns == used
        change()
        images = load(folder)
        assert len(images) == count and not old.exists() and len(caches(folder)) == 1
        assert torch.equal(before, kept)  # a training goes on with the images that it began with
    assert images[0].min() == 255
    assert load(folder, 16).max() == 255 and len(caches(folder)) == 2  # another size has a cache of its own


def test_the_cache_is_one_flat_file_of_pixels_that_is_mapped_into_memory(folder):
    paint(folder, 100)
    (folder / "broken.png").touch()
    load(folder, 256)
    (cache,) = caches(folder)
    before = own_memory()
    images = load(folder, 256)
    assert images.shape == (100, 3, 256, 256) and images.sum() > 0
    assert own_memory() - before < images.nbytes / 8
    assert cache.read_bytes() == images.numpy().tobytes()
    assert re.fullmatch(r"pictures-.*-256\.images", cache.name)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # nothing else, there or elsewhere
    assert {path.name for path in folder.parent.iterdir()} == {"pictures", "data"}


def own_memory() -> int:
    """Bytes of this process that are no file's, which the system could drop at any time; 0 where none tells."""
    status = Path("/proc/self/status")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024 if status.exists() else 0


def test_two_folders_of_equal_names_sizes_and_dates_are_not_taken_for_each_other(folder):
    apples, plums = folder / "apples" / "x", folder / "plums" / "x"
    for place, colour in ((apples, RED), (plums, BLUE)):
        place.mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (64, 64), colour).save(place / f"{i}.bmp")
            os.utime(place / f"{i}.bmp", (1, 1))
    data = folder.parent / "data"
    for _ in range(2):  # decoded, and from the cache
        for place, colour in ((apples, RED), (plums, BLUE)):
            assert (common.load_folder(place, 8, data) == torch.tensor(colour).view(3, 1, 1)).all()
    assert len(caches(folder)) == 2
    moved = apples.rename(folder / "moved")
    assert torch.equal(common.load_folder(moved, 8, data), common.load_folder(folder / "plums/../moved", 8, data))
    assert len(caches(folder)) == 3  # a moved folder is decoded again, once


def test_many_files_are_decoded_in_their_order(folder):
    paint(folder, 1030)
    assert load(folder, 1)[:, :2, 0, 0].int().tolist() == [[i % 256, i // 256] for i in range(1030)]


@pytest.mark.full
def test_an_interrupt_while_a_folder_is_decoded_is_one_line_and_leaves_no_half_file(folder):
    for i in range(500):
        Image.effect_noise((300, 300), 90).save(folder / f"{i:03}.png")
    run = Script("dcgan", "--dataset", folder, "--data-dir", folder.parent / "data", cwd=folder.parent)
    while not any(path.stat().st_size for path in folder.parent.glob("data/.*.tmp")):
        assert run.process.is_alive(), run.err
        time.sleep(0.01)
    run.interrupt(signal.SIGINT)
    assert run.finish() == 130 and run.err.count("\n") == 1 and "interrupted" in run.err, run.err
    assert not list(folder.parent.glob("data/*")) and not list(folder.parent.glob("data/.*"))
