"""The face detector against brute force on a made-up cascade, and on real pictures under DATA_DIR; where it is cut."""

import random

import pytest
import torch
from PIL import Image

import common
import crawl_anime
from tests.fake_booru import draw, encode
from tests.test_crawl import crops, rows, run

WINDOW = 8


@pytest.fixture
def cascade(tmp_path):
    """Three stages of random stumps over random features of an 8x8 window: the file, and its numbers."""
    chance = random.Random(5)
    features = [
        (chance.randrange(3), chance.randrange(3), chance.randint(1, 2), chance.randint(1, 2)) for _ in range(9)
    ]
    stages = []
    for count, threshold in ((2, -0.4), (3, -0.5), (4, 0.0)):
        stumps = []
        for _ in range(count):
            words = [chance.getrandbits(32) - 2**31 for _ in range(8)]
            stumps.append((chance.randrange(9), words, chance.uniform(-1, 0), chance.uniform(0, 1)))
        stages.append((threshold, stumps))
    xml = "".join(
        f"<_><stageThreshold>{threshold}</stageThreshold><weakClassifiers>"
        + "".join(
            f"<_><internalNodes>0 -1 {feature} {' '.join(map(str, words))}</internalNodes>"
            f"<leafValues>{left!r} {right!r}</leafValues></_>"
            for feature, words, left, right in stumps
        )
        + "</weakClassifiers></_>"
        for threshold, stumps in stages
    )
    rectangles = "".join(f"<_><rect>{x} {y} {w} {h}</rect></_>" for x, y, w, h in features)
    path = tmp_path / "cascade.xml"
    path.write_text(
        f"<opencv_storage><cascade><height>{WINDOW}</height><width>{WINDOW}</width>"
        f"<stages>{xml}</stages><features>{rectangles}</features></cascade></opencv_storage>"
    )
    return str(path), features, stages


def passes(level, top, left, features, stages) -> bool:
    """One window, cell by cell."""
    for threshold, stumps in stages:
        total = 0.0
        for number, words, low, high in stumps:
            x, y, w, h = features[number]
            cells = []
            for top_cell in (top + y, top + y + h, top + y + 2 * h):
                for left_cell in (left + x, left + x + w, left + x + 2 * w):
                    cells.append(sum(sum(row[left_cell : left_cell + w]) for row in level[top_cell : top_cell + h]))
            ring = [cells[i] for i in (0, 1, 2, 5, 8, 7, 6, 3)]
            pattern = int("".join("1" if cell >= cells[4] else "0" for cell in ring), 2)
            total += low if (words[pattern // 32] >> (pattern % 32)) & 1 else high
        if total < threshold - 1e-5:
            return False
    return True


def test_windows_equal_brute_force(cascade):
    path, features, stages = cascade
    chance = random.Random(3)
    grey = torch.tensor([[chance.randrange(256) for _ in range(31)] for _ in range(26)], dtype=torch.int32)
    found = list(map(tuple, crawl_anime.find_windows(grey, crawl_anime.read_cascade(path), 8).tolist()))
    expected, scale, looked_at = [], 1.0, 0
    while round(WINDOW * scale) <= 26:
        level = crawl_anime.shrink(grey, round(26 / scale), round(31 / scale)).tolist()
        step = 2 if scale < 2 else 1
        for top in range(0, len(level) - WINDOW + 1, step):
            for left in range(0, len(level[0]) - WINDOW + 1, step):
                looked_at += 1
                if passes(level, top, left, features, stages):
                    expected.append((round(left * scale), round(top * scale), round(WINDOW * scale)))
        scale *= 1.1
    assert sorted(found) == sorted(expected)
    assert 0.02 * looked_at < len(found) < 0.9 * looked_at


def test_small_images_have_no_faces(cascade):
    for image in (Image.new("RGB", (1, 1)), Image.new("RGB", (7, 30)), Image.new("RGB", (8, 8), "red")):
        assert crawl_anime.find_faces(image, crawl_anime.read_cascade(cascade[0]), 8, 5) == []


@pytest.mark.parametrize("source, target", [(10, 7), (10, 10), (24, 23), (3, 1)])
def test_shrinking_is_bilinear_in_integers(source, target):
    chance = random.Random(source)
    row = [chance.randrange(256) for _ in range(source)]
    expected = []
    for i in range(target):
        place = min(max((i + 0.5) * source / target - 0.5, 0), source - 1)
        low, weight = int(place), round((place - int(place)) * 256)
        high = min(low + 1, source - 1)
        expected.append((256 * (row[low] * (256 - weight) + row[high] * weight) + 32768) >> 16)
    assert crawl_anime.shrink(torch.tensor([row] * 2, dtype=torch.int32), 2, target).tolist() == [expected] * 2
    across = crawl_anime.shrink(torch.tensor([[value] for value in row], dtype=torch.int32), target, 1)
    assert across.flatten().tolist() == expected


def test_equalizing():
    grey = torch.tensor([[10, 10, 20], [20, 20, 90]], dtype=torch.int32)  # 2 of the first, then 3, then 1
    assert crawl_anime.equalize(grey).tolist() == [[0, 0, 191], [191, 191, 255]]
    assert crawl_anime.equalize(torch.full((2, 2), 7, dtype=torch.int32)).tolist() == [[7, 7], [7, 7]]


def test_merging():
    def merged(windows: list, neighbours: int = 5) -> list:
        return crawl_anime.merge(torch.tensor(windows, dtype=torch.int32).view(-1, 3), neighbours)

    face = [(10, 10, 20), (11, 10, 20), (10, 11, 20), (11, 11, 21), (9, 10, 20), (10, 9, 19)]
    assert merged(face) == [(10, 10, 20)]
    assert merged(face[:5]) == []  # five are too few
    assert merged(face[:5], 4) == [(10, 10, 20)] and merged(face[:4], 4) == []
    chain = [(2 * i, 0, 20) for i in range(8)]  # neighbours alone are alike, but that joins them all
    assert merged(chain) == [(7, 0, 20)]
    apart = [(100, 100, 60)] * 9
    assert sorted(merged(face + apart)) == [(10, 10, 20), (100, 100, 60)]
    around = [(0, 0, 60)] * 9  # a stronger, larger one swallows the small one inside it
    assert merged(face + around) == [(0, 0, 60)]
    assert merged([]) == []


@pytest.mark.parametrize("text", ["", "<a/>", "<a><cascade><stages><_/></stages></cascade></a>"])
def test_a_file_that_is_no_cascade(tmp_path, text):
    path = tmp_path / "cascade.xml"
    path.write_text(text)
    with pytest.raises(common.UserError, match="cascade"):
        crawl_anime.read_cascade(str(path))


# What OpenCV 4.14's detectMultiScale(equalizeHist(grey), 1.1, 5, minSize=(48, 48)) finds: left, top, side.
OPENCV = {
    "cc_luffy_1.jpg": [(133, 105, 73), (511, 448, 65)],
    "books_C_Fuko_Ibuki_Holding_Up_C.jpg": [(220, 23, 259)],
    "books_C_Nagato_Reading_The_C_Programming_Language_In_The_Library.png": [(158, 154, 258)],
    "books_Java_Kurumizawa_Satanichia_JavaFx_8_Intro_by_Example.png": [(51, 96, 288)],
    "cc_rin_1.png": [],
    "cc_lovino_1.jpg": [(192, 196, 248)],
}


def overlap(a, b) -> float:
    """Intersection over union of two squares."""
    width, height = (min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    return common / (a[2] ** 2 + b[2] ** 2 - common)


@pytest.mark.parametrize("name", OPENCV)
def test_real_faces_as_opencv_finds_them(name, real_data):
    if not (real_data / "illustrations" / name).exists():
        pytest.skip("DATA_DIR has no illustrations")
    image = common.open_picture(real_data / "illustrations" / name)
    found = crawl_anime.find_faces(image, crawl_anime.read_cascade(str(real_data / "lbpcascade_animeface.xml")), 48, 5)
    assert len(found) == len(OPENCV[name])
    assert all(max(overlap(face, other) for other in found) > 0.8 for face in OPENCV[name])


def test_known_crops(real_data, tmp_path):
    """The boxes that the detector finds in pictures on the disk, in their own pixels; fewer with more neighbours."""
    if not (real_data / "illustrations").is_dir():
        pytest.skip("DATA_DIR has no illustrations")
    (tmp_path / "pictures").mkdir()
    for name in ("cc_lovino_1.jpg", "cc_luffy_1.jpg", "cc_rin_1.png"):
        (tmp_path / "pictures" / name).write_bytes((real_data / "illustrations" / name).read_bytes())
    command = ("--from-dir", tmp_path / "pictures", "--cascade", real_data / "lbpcascade_animeface.xml", "--to")
    assert run(*command, tmp_path / "faces") == 0
    boxes = [row["boxes"] or row["reason"] for row in rows(tmp_path / "faces").values()]
    assert boxes == ["192_196_248", "131_102_78", "no face"]
    assert run(*command, tmp_path / "close", "--margin", 1, "--neighbours", 8) == 0
    (name,) = crops(tmp_path / "close")
    assert crops(tmp_path / "close")[name] != crops(tmp_path / "faces")[name]


@pytest.mark.parametrize(
    "size, box, expected",
    [
        ((400, 300), (150, 100, 100), (125, 65, 150)),  # 1.5 sides around the middle, a tenth of the face higher
        ((400, 300), (0, 0, 100), (0, 0, 150)),  # moved in
        ((400, 300), (300, 200, 100), (250, 150, 150)),
        ((400, 120), (150, 10, 100), (140, 0, 120)),  # shrunk
    ],
)
def test_where_a_face_is_cut_out(size, box, expected):
    image = draw(1).resize(size)
    jpeg, kept_box, _, _ = crawl_anime.cut(image, box, 1.5, False)
    left, top, side = expected
    face = image.resize((256, 256), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    assert kept_box == box and jpeg == encode(face, "JPEG", quality=95)


def test_the_detectors_file_is_downloaded_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    draw(1).save(tmp_path / "pictures/1.png")
    (tmp_path / "file.xml").write_text("half of it")
    for name, message in (("nothing.xml", "--detector none"), ("file.xml", "invalid hash")):
        monkeypatch.setattr(crawl_anime, "CASCADE_URL", (tmp_path / name).as_uri())
        assert run("--from-dir", "pictures") == 3 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("data/*.*"))
