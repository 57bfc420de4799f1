"""Folders of images: every mode and format, every kind of file that is no image, and the cache of the pixels."""

import errno
import itertools
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
from tests.conftest import ROOT, Script

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


def halves(left, right, mode="RGB", size=(32, 32)) -> Image.Image:
    """A picture of two colours, side by side."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def png_16_bits(colour_type: int, samples: tuple[int, ...], side: int = 16) -> bytes:
    """A PNG of one colour with 16 bits a sample, which Pillow reads but does not write for more than one channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * side
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row * side)) + chunk(b"IEND", b"")


def palette_with_hole() -> Image.Image:
    image = halves(RED, BLUE).quantize(2)
    image.info["transparency"] = image.getpixel((31, 0))  # the blue half
    return image


def turned() -> Image.Image:
    """Blue above red as stored; its EXIF tag says that the stored top is the right side."""
    image = halves(RED, BLUE).rotate(90)
    image.getexif()[0x0112] = 6
    return image


def frames() -> list[Image.Image]:
    return [halves(RED, BLUE), Image.new("RGB", (32, 32), WHITE)]


# name: (what is saved, its options, the colours of the left and the right half as they must be loaded)
MODES = {
    "grey.png": (halves(0, 128, "L"), {}, (0, 0, 0), GREY),
    "black-and-white.png": (halves(0, 255, "1"), {}, (0, 0, 0), WHITE),
    "palette.png": (halves(RED, BLUE).quantize(2), {}, RED, BLUE),
    "palette-with-hole.png": (palette_with_hole(), {}, RED, WHITE),
    "alpha.png": (halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA"), {}, RED, WHITE),
    "half-alpha.png": (halves((255, 0, 0, 255), (0, 0, 0, 127), "RGBA"), {}, RED, GREY),
    "grey-alpha.png": (halves((0, 255), (0, 0), "LA"), {}, (0, 0, 0), WHITE),
    "one-colour-transparent.png": (halves(RED, BLUE), dict(transparency=BLUE), RED, WHITE),
    "grey-16-bits.png": (halves(0, 0x8080, "I;16"), {}, (0, 0, 0), GREY),
    "rgb.jpg": (halves(RED, BLUE), dict(quality=95), RED, BLUE),
    "grey.jpeg": (halves(0, 128, "L"), {}, (0, 0, 0), GREY),
    "cmyk.jpg": (halves(RED, BLUE).convert("CMYK"), dict(quality=95), RED, BLUE),
    "large.jpg": (halves(RED, BLUE, size=(512, 512)), dict(quality=95), RED, BLUE),
    "progressive.jpg": (halves(RED, BLUE), dict(progressive=True, quality=95), RED, BLUE),
    "turned.jpg": (turned(), dict(quality=95, exif=turned().getexif()), RED, BLUE),
    "rgb.webp": (halves(RED, BLUE), dict(lossless=True), RED, BLUE),
    "alpha.webp": (halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA"), dict(lossless=True), RED, WHITE),
    "rgb.bmp": (halves(RED, BLUE), {}, RED, BLUE),
    "grey.bmp": (halves(0, 128, "L"), {}, (0, 0, 0), GREY),
    "rgb.tiff": (halves(RED, BLUE), {}, RED, BLUE),
    "first-frame.gif": (frames()[0], dict(save_all=True, append_images=frames()[1:]), RED, BLUE),
    "wide.png": (halves(RED, BLUE, size=(96, 16)), {}, RED, BLUE),
    "tall.png": (halves(RED, BLUE, size=(16, 96)), {}, RED, BLUE),
    "ribbon.png": (halves(RED, BLUE, size=(5000, 4)), {}, RED, BLUE),
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


@pytest.mark.parametrize(("colour_type", "samples"), [(0, (0x8080,)), (2, (0x8080,) * 3), (4, (0x8080, 0xFFFF))])
def test_16_bits_a_sample_keep_their_upper_half(folder, colour_type, samples):
    (folder / "deep.png").write_bytes(png_16_bits(colour_type, samples))
    assert (load(folder).int() - 128).abs().max() <= 1


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
    colours = {"a/b/deep.png": RED, "ünï cödé\nname.png": BLUE, "no-ending": WHITE, "really-a-bmp.jpg": GREY}
    for name, colour in colours.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), colour).save(path, "BMP" if "bmp" in name else "PNG")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked.png").symlink_to(folder / "a/b/deep.png")
    images = load(folder)
    assert len(images) == 5  # in the order of their relative paths, whatever the file system's is
    order = [RED, RED, WHITE, GREY, BLUE]
    assert [tuple(image[:, 0, 0].tolist()) for image in images] == order


def write_broken(folder: Path) -> int:
    """Every kind of file that is no usable image; returns how many."""
    good = folder.parent / "good.png"
    Image.effect_noise((64, 64), 90).save(good)
    noise = good.read_bytes()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes(noise[: len(noise) // 2])
    Image.effect_noise((64, 64), 90).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:600])
    (folder / "head.gif").write_bytes(b"GIF89a")
    bomb = bytearray(noise)
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "bomb.png").write_bytes(bomb)
    (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return 7


def test_broken_files_are_skipped_counted_and_named(folder, capsys):
    count = write_broken(folder)
    Image.new("RGB", (9, 9), RED).save(folder / "z.png")
    assert len(load(folder)) == 1
    shown = capsys.readouterr().out
    assert f"skipped {count} files: bomb.png (too large), cut.jpg (damaged" in shown and shown.count("\n") == 1
    assert len(load(folder)) == 1
    shown = capsys.readouterr().out  # the cache holds nothing but pixels: how many are missing, not which
    assert f"(cached); skipped {count} files\n" in shown and shown.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_name_that_is_no_text_is_shown_without_harm(folder, capsys):
    Image.new("RGB", (9, 9), RED).save(folder / "z.png")
    Path(os.fsdecode(bytes(folder) + b"/a\xff\nb.png")).write_bytes(b"")
    assert len(load(folder)) == 1
    assert "skipped 1 files: a??b.png (empty)\n" in capsys.readouterr().out


def test_an_image_with_damaged_exif_data_is_an_image(folder):
    halves(RED, BLUE).save(folder / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert len(load(folder)) == 1


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "broken", "mistyped"])
def test_a_folder_without_images_is_an_error_that_says_what_was_found(folder, kind):
    path, expected = folder, "no file"
    if kind == "missing":
        path, expected = folder / "nothing", "there is no folder"
    elif kind == "file":
        path, expected = folder / "file", "there is no folder"
        path.write_bytes(b"")
    elif kind == "broken":
        expected = f"{write_broken(folder)} files, none a usable image: bomb.png"
    elif kind == "mistyped":
        path, expected = Path("mnits"), "--dataset takes"
    with pytest.raises(common.UserError, match=expected):
        load(path)
    assert not [path for path in folder.parent.rglob("*") if path.suffix in (".images", ".tmp")]


def paint(folder: Path, count: int) -> None:
    for i in range(count):
        Image.new("RGB", (9, 9), (i % 256, i // 256, 7)).save(folder / f"{i:05}.bmp")


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The files that were decoded since the list was cleared."""
    paths, decode = [], common.decode_file
    monkeypatch.setattr(common, "decode_file", lambda path, size: paths.append(path) or decode(path, size))
    return paths


def test_the_cache_is_used_until_a_file_changes_and_then_replaced(folder, decoded):
    def decodes() -> int:
        decoded.clear()
        load(folder)
        return len(decoded)

    paint(folder, 3)
    assert decodes() == 3 and decodes() == 0
    paint(folder, 4)
    assert decodes() == 4 and decodes() == 0 and len(caches(folder)) == 1  # the earlier one is gone
    (folder / "00000.bmp").unlink()
    assert decodes() == 3
    (folder / "00001.bmp").rename(folder / "00009.bmp")
    assert decodes() == 3
    Image.new("RGB", (9, 9), WHITE).save(folder / "00002.bmp")  # as long as before, but newer
    assert decodes() == 3 and load(folder)[0].min() == 255
    assert load(folder, 16).shape[-1] == 16 and decodes() == 0  # another size has a cache of its own
    assert len(caches(folder)) == 2
    for old, seconds in ((".pictures.images.1.tmp", 3700), (".pictures.images.2.tmp", 3500)):  # of killed builders
        path = folder.parent / "data" / old
        path.touch()
        os.utime(path, (time.time() - seconds,) * 2)
    for cache in caches(folder):
        cache.unlink()
    assert decodes() == 3  # what is younger than an hour may be a living builder's
    assert [path.name for path in (folder.parent / "data").glob(".*")] == [".pictures.images.2.tmp"]


def test_the_cache_is_one_flat_file_of_pixels_whose_name_says_of_what(folder):
    paint(folder, 3)
    (folder / "broken.png").write_bytes(b"")
    images = load(folder, 16)
    (cache,) = caches(folder)
    assert re.fullmatch(r"pictures-[0-9a-f]{8}-[0-9a-f]{16}-16\.images", cache.name)
    assert cache.read_bytes() == images.numpy().tobytes() and cache.stat().st_size == 3 * 3 * 16 * 16
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # nothing else, there or elsewhere
    assert {path.name for path in folder.parent.iterdir()} == {"pictures", "data"}


def test_folders_of_one_name_keep_their_caches_and_a_moved_one_finds_its_own(folder, decoded, monkeypatch):
    twin = folder.parent / "elsewhere" / folder.name
    twin.mkdir(parents=True)
    paint(folder, 2)
    paint(twin, 3)
    data = folder.parent / "data"
    for _ in range(2):
        assert [len(common.load_folder(path, 8, data)) for path in (folder, twin)] == [2, 3]
    paint(twin, 4)
    assert len(common.load_folder(twin, 8, data)) == 4 and len(load(folder)) == 2
    assert len(caches(folder)) == 2 and len(decoded) == 2 + 3 + 4
    decoded.clear()
    moved = folder.rename(folder.with_name("moved"))
    assert len(load(moved)) == 2
    monkeypatch.chdir(moved.parent)
    for path in (Path("moved"), Path("elsewhere/../moved"), moved):  # one place, whatever it is called
        assert len(common.load_folder(path, 8, data)) == 2
    assert not decoded and len(caches(folder)) == 2
    # Pictures in the data folder itself: the caches beside them are none of them.
    shutil.copy(moved / "00000.bmp", data)
    assert len(common.load_folder(data, 8, data)) == len(common.load_folder(data, 8, data)) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_file_that_cannot_be_read_now_is_named_and_makes_no_cache(folder, error, words, monkeypatch):
    paint(folder, 3)
    real = Image.open

    def refuse(path, *args, **options):
        if Path(path.name).name == "00001.bmp":
            raise error
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(common.UserError, match=f"can't read .*/pictures/00001.bmp: {words}"):
            load(folder)
    assert not caches(folder) and not list(folder.parent.rglob(".*.tmp"))
    assert len(load(folder)) == 3


def test_building_and_reading_need_no_memory(folder, monkeypatch):
    """Of a cache of 60 MB hardly any is the process's own: the system may write it out and drop it at any time."""

    def own() -> int:
        status = Path("/proc/self/status")
        if not status.exists():
            pytest.skip("needs /proc")
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024

    used, size = [], 256
    for i in range(320):
        (folder / f"{i:03}.png").touch()
    monkeypatch.setattr(
        common, "map_in_workers", lambda function, items, workers: itertools.chain(*map(function, [items]))
    )
    monkeypatch.setattr(
        common, "decode_files", lambda names, folder, size: map(common.decode_file, names, [size] * 400)
    )
    monkeypatch.setattr(common, "decode_file", lambda path, size: used.append(own()) or bytearray(3 * size * size))
    images = load(folder, size)
    assert images.nbytes == 320 * 3 * size * size and int(images.sum()) == 0
    assert max(*used, own()) - used[0] < images.nbytes / 8


def test_the_images_stay_when_the_cache_is_made_anew(folder):
    paint(folder, 2)
    images = load(folder)
    before = images.clone()
    paint(folder, 3)
    load(folder)
    assert torch.equal(images, before)
    images.zero_()  # a private map: the file keeps its pixels
    assert torch.equal(load(folder)[:2], before)


def test_where_the_data_folder_is_read_only_a_line_says_so(folder, monkeypatch):
    paint(folder, 2)
    data = folder.parent / "data"
    data.write_bytes(b"")  # root may write anywhere but into a file
    with pytest.raises(common.UserError, match=f"can't write {data}/pictures-"):
        load(folder)


# -------------------------------------------------------------------------------------------------- many files


def shade(i: int) -> int:
    return i % 256 + i // 256 + 7


@pytest.mark.full
def test_many_files_are_decoded_by_several_processes_in_their_order(folder):
    paint(folder, 600)
    assert load(folder, 8)[:, :, 0, 0].sum(1).tolist() == [shade(i) for i in range(600)]


def end(_) -> list:
    os._exit(1)


@pytest.mark.full
def test_a_lost_decoding_process_is_told():
    with pytest.raises(common.UserError, match="lost a process that decodes"):
        list(common.map_in_workers(end, ["a", "b"], 1))


@pytest.mark.full
def test_a_program_without_a_guard_is_told_and_does_not_hang(tmp_path):
    """Each process that decodes runs such a program again, from its start, and Python ends it there."""
    script = tmp_path / "unguarded.py"
    call = "list(common.map_in_workers(sorted, [str(i) * 99 for i in range(999)], 2))"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common\n" + call)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and 'without `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import common
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    print(int(common.load_folder(folder, 8, folder.parent / "data").long().sum()), flush=True)
"""


def builder(folder: Path) -> subprocess.Popen:
    script = folder.parent / "build.py"
    script.write_text(BUILD)
    command = [sys.executable, str(script), str(ROOT), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.full
def test_two_builders_at_once_and_one_that_is_killed(folder):
    paint(folder, 300)  # enough to be decoded in another process
    expected, data = 64 * sum(map(shade, range(300))), folder.parent / "data"
    killed = builder(folder)
    while not list(data.glob(".*.tmp")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)  # ends when its decoding processes, which hold the pipe too, have ended
    assert not caches(folder)
    other = builder(folder)
    while len(list(data.glob(".*.tmp"))) < 2:
        assert other.poll() is None
        time.sleep(0.01)
    assert int(load(folder).long().sum()) == expected
    output = other.communicate(timeout=60)[0]
    assert output.split("\n")[-2:] == [str(expected), ""], output
    assert int(load(folder).long().sum()) == expected
    assert len(list(data.glob(".*.tmp"))) == 1  # the killed one's, until it is an hour old


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="asks for a group of processes")
def test_processes_that_decode_end_with_one_that_was_killed_while_they_start(folder):
    paint(folder, 600)
    command = [sys.executable, ROOT / "dcgan.py", "--dataset", folder, "--data-dir", folder.parent / "data"]
    run = subprocess.Popen(command, cwd=folder.parent, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(folder.parent.glob("data/.*.tmp")):
        time.sleep(0.01)
    time.sleep(0.3)
    run.kill()
    run.wait()
    with pytest.raises(ProcessLookupError):  # as soon as none of its group is left
        for _ in range(600):
            os.killpg(run.pid, 0)
            time.sleep(0.1)


@pytest.mark.full
def test_an_interrupt_while_processes_decode_is_one_line_and_leaves_no_half_file(folder):
    paint(folder, 2000)
    options = ["--dataset", folder, "--image-size", 32, "--data-dir", folder.parent / "data"]
    for seconds in (0, 0.5, 1, 3, 5):  # while they start, and while they decode
        run = Script("dcgan", *options, cwd=folder.parent)
        while not list(folder.parent.glob("data/.*.tmp")):
            assert run.process.is_alive(), run.err
            time.sleep(0.01)
        run.process.join(seconds)
        run.interrupt(signal.SIGINT) if seconds < 5 else run.process.terminate()
        assert run.finish() == 130 and run.err.count("\n") == 1 and "interrupted" in run.err, run.err
        assert not list(folder.parent.glob("data/.*"))
        for cache in caches(folder):  # the signal came later
            assert cache.stat().st_size == 2000 * 3 * 32 * 32
            cache.unlink()


@pytest.mark.full
def test_real_faces(real_data, folder):
    sources = sorted((real_data / "anime").iterdir())[:40] if (real_data / "anime").is_dir() else []
    if not sources:
        pytest.skip("no faces under DATA_DIR")
    for source in sources:
        (folder / source.name).write_bytes(source.read_bytes())
    images = load(folder, 64)
    assert images.shape == (40, 3, 64, 64)
    with Image.open(sources[7]) as image:
        expected = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    if image.width == image.height:
        assert images[7].permute(1, 2, 0).contiguous().numpy().tobytes() == expected.tobytes()
