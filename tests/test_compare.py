"""compare.py: every figure against an independent computation, the judge, the tables, grids and errors."""

import csv
import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import common
import compare
import cvaegan
import dcgan
import gan
from tests import study
from tests.conftest import write_idx

np = pytest.importorskip("numpy")
CPU = torch.device("cpu")
FP32 = torch.autocast("cpu", enabled=False)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def precision_and_recall(real, fake):
    return compare.share_among(fake, real), compare.share_among(real, fake)


@pytest.fixture(scope="module")
def digits():
    """A thousand labelled training digits and four hundred test digits."""
    train, test = common.draw_digits(True), common.draw_digits(False)
    return common.Data(train.images[:1000], train.labels[:1000]), common.Data(test.images[:400], test.labels[:400])


@pytest.fixture
def quick(monkeypatch, digits, tmp_path):
    """Few digits, a judge of few steps, an empty current folder."""
    monkeypatch.setattr(common, "draw_digits", lambda train=True: digits[0 if train else 1])
    monkeypatch.setattr(compare, "LEAST_STEPS", 40)
    monkeypatch.setattr(compare, "MOST_STEPS", 40)
    monkeypatch.setitem(compare.JUDGE, "batch_size", 64)
    monkeypatch.setattr(compare, "WALKS", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------- measures


def test_frechet_distance_agrees_with_numpy_and_with_known_gaussians():
    one, other = noise(500, 6) @ noise(6, 6, seed=1), noise(400, 6, seed=2) @ noise(6, 6, seed=3) + 1
    a, b = one.double().numpy(), other.double().numpy()
    first, second = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross
    assert compare.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert compare.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert compare.frechet_distance(one, one + 2) == pytest.approx(6 * 4, rel=1e-6)  # 2 in each of 6 dimensions
    variance = one.double().T.cov().trace().item()
    centred = one - one.mean(0)
    assert compare.frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-6)  # (3 - 1)^2
    collapsed = one.mean(0).expand(100, 6)
    assert compare.frechet_distance(one, collapsed) == pytest.approx(variance, rel=1e-4)
    assert math.isfinite(compare.frechet_distance(one[:3], other))  # fewer images than features


def test_precision_and_recall_agree_with_a_plain_computation():
    real, fake = noise(60, 2), noise(50, 2, seed=1) * 1.5 + 0.3
    a, b = real.double().numpy(), fake.double().numpy()

    def among(points, others):
        reach = [sorted(np.linalg.norm(others - other, axis=1))[3] for other in others]
        inside = [any(np.linalg.norm(point - other) <= r for other, r in zip(others, reach)) for point in points]
        return np.mean(inside)

    found = precision_and_recall(real, fake)
    assert found == pytest.approx((among(b, a), among(a, b)))
    assert 0 < found[0] < 1


def test_precision_falls_with_bad_samples_and_recall_with_collapse():
    left, right, far = noise(300, 4), noise(300, 4, seed=1) + 100, noise(300, 4, seed=2) - 100
    real = torch.cat([left, right])
    precision, recall = precision_and_recall(real, noise(300, 4, seed=3))  # one of the two modes
    assert precision > 0.8 and 0.4 < recall < 0.5
    precision, recall = precision_and_recall(left, torch.cat([noise(300, 4, seed=3), far]))  # half are junk
    assert 0.4 < precision < 0.5 and recall > 0.8
    assert precision_and_recall(left, far) == (0, 0)


def test_class_figures():
    even = torch.full((10,), 0.1)
    assert compare.class_figures(even, even) == (10, pytest.approx(0, abs=1e-6))
    two = torch.tensor([0, 0, 0, 0.5, 0, 0, 0, 0, 0.5, 0])
    assert compare.class_figures(two, even) == (2, pytest.approx(math.log(5)))  # nats
    uneven = torch.tensor([0.009, 0.191, *[0.1] * 8])
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(p) for p in (uneven, even)))
    assert compare.class_figures(uneven, even) == (9, pytest.approx(expected.item(), abs=1e-6))


def test_sharpness_is_the_slope_of_edges_and_noise_the_size_of_lone_pixels():
    for width in (1, 2, 4, 5):  # an edge of height 1 that takes `width` pixels
        ramp = (torch.arange(20).sub(8).clamp(0, width) / width).expand(3, 1, 20, 20)
        slope, speckle = compare.texture(common.to_bytes(ramp))
        assert slope == pytest.approx(1 / width, rel=0.03) and speckle == 0
    black = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    spotted = black.clone()
    spotted[:, :, 2::4, 2::4] = 51  # one pixel in sixteen (49 of 784), a fifth of white
    slope, speckle = compare.texture(spotted)
    assert speckle == pytest.approx(0.2 * math.sqrt(49 / 784)) and slope == 0
    calm, lone = compare.split_speckle(common.to_unit(spotted))
    assert torch.equal(calm + lone, common.to_unit(spotted)) and not calm.any()


def test_sharpness_and_noise_tell_blur_from_speckle(digits):
    from torchvision.transforms.functional import gaussian_blur

    images = digits[1].images
    slope, speckle = compare.texture(images)
    blurred = [compare.texture(gaussian_blur(images, 5, [sigma, sigma]))[0] / slope for sigma in (0.5, 0.7, 1.0)]
    assert 0.9 > blurred[0] > blurred[1] > blurred[2] > 0.2
    with_noise = [common.to_bytes(common.to_unit(images) + size * noise(*images.shape)) for size in (0.05, 0.1)]
    (slope_a, speckle_a), (slope_b, speckle_b) = (compare.texture(noised) for noised in with_noise)
    assert speckle_b > 1.5 * speckle_a > 3 * speckle
    assert slope_b / slope == pytest.approx(1, abs=0.15)  # speckle is not taken for sharpness


def test_walk_figures():
    start, end = noise(5, 100), noise(5, 100, seed=1)
    path = compare.interpolate(start, end, 9)
    assert torch.allclose(path[:, 0], start, atol=1e-3) and torch.allclose(path[:, -1], end, atol=1e-3)
    angles = torch.cosine_similarity(path[:, :-1], path[:, 1:], dim=2)
    circle = compare.interpolate(torch.tensor([[2.0, 0]]), torch.tensor([[0, 2.0]]), 5)[0]
    assert torch.allclose(circle.norm(dim=1), torch.full((5,), 2.0)) and angles.std(1).max() < 0.02
    even = torch.arange(17.0)[None, :, None] * noise(3, 1, 8)
    assert compare.evenness(even) == pytest.approx(1)
    jump = (torch.arange(17) > 7).float()[None, :, None] * noise(3, 1, 8)
    assert compare.evenness(jump) == pytest.approx(1 / 16)


def test_sliced_wasserstein_distance_of_shifted_points():
    one = noise(2000, 12)
    shift = noise(12, seed=5)
    mean_projection = math.gamma(6) / (math.sqrt(math.pi) * math.gamma(6.5))  # of a unit vector on random directions
    assert compare.sliced_distance(one, one + shift, 2000) == pytest.approx(
        shift.norm().item() * mean_projection, rel=0.05
    )
    assert compare.sliced_distance(one, one[torch.randperm(2000)]) == 0
    other = noise(2000, 1, seed=2) * 2
    plain = np.abs(np.sort(one[:, 0].numpy()) - np.sort(other[:, 0].numpy())).mean()
    assert compare.sliced_distance(one[:, :1], other) == pytest.approx(plain, rel=1e-5)


def test_laplacian_pyramid_splits_an_image_by_scale():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    levels = compare.laplacian_pyramid(images)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    whole = levels[-1]
    for level in levels[-2::-1]:
        whole = level + torch.nn.functional.interpolate(whole, level.shape[-2:], mode="bilinear", align_corners=False)
    assert torch.allclose(whole, images, atol=1e-5)
    flat = compare.laplacian_pyramid(torch.full((1, 3, 64, 64), 0.25))
    assert flat[0].abs().max() < 1e-6 and torch.allclose(flat[2], torch.tensor(0.25))


def test_sliced_wasserstein_grows_with_what_is_wrong():
    from torchvision.transforms.functional import gaussian_blur

    generator = torch.Generator().manual_seed(0)
    real, other = (torch.randint(0, 256, (60, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2))
    blurred = [gaussian_blur(real, 5, [sigma, sigma]) for sigma in (0.6, 1.2)]
    floor, little, much = (compare.sliced_wasserstein(real, images) for images in (other, *blurred))
    assert compare.sliced_wasserstein(real, real) < floor < little < much


# -------------------------------------------------------------------------------------------------- the judge


def test_contrastive_loss_against_numpy():
    one, other = noise(5, 3), noise(5, 3, seed=1)
    both = torch.cat([one, other]).double().numpy()
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    kernel = np.exp(both @ both.T / 0.2)
    expected = [-np.log(kernel[i, (i + 5) % 10] / (kernel[i].sum() - kernel[i, i])) for i in range(10)]
    assert compare.contrastive_loss(one, other, 0.2).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_augmentations():
    torch.manual_seed(0)
    image = torch.zeros(50, 1, 9, 9)
    image[:, :, 4, 4] = 1
    moved = compare.shifted(image, 2)
    assert moved.shape == image.shape and torch.equal(moved.sum((1, 2, 3)), torch.ones(50))
    places = moved.flatten(1).argmax(1)
    assert len(places.unique()) > 15 and {*(places // 9).tolist()} == {*(places % 9).tolist()} == {2, 3, 4, 5, 6}
    crops = compare.cropped(torch.rand(50, 3, 16, 16))
    assert crops.shape == (50, 3, 16, 16) and crops.min() >= 0 and crops.max() <= 1.2


def test_judge_learns_and_is_kept(quick, digits, monkeypatch, capsys):
    file = quick / "data" / "judge-digits.pt"
    judge = compare.load_judge(file, digits[0], CPU, FP32)
    assert "training the judge" in capsys.readouterr().out
    features, classes = compare.judge_images(judge, digits[1].images, CPU)
    assert features.shape == (400, 128) and features.dtype == torch.float64
    assert (classes == digits[1].labels).float().mean() > 0.7  # after forty steps
    again = compare.load_judge(file, digits[0], CPU, FP32)
    assert not capsys.readouterr().out and torch.equal(compare.judge_images(again, digits[1].images, CPU)[0], features)
    monkeypatch.setattr(compare, "train_judge", lambda *_: judge)
    (quick / "a-file").touch()
    compare.load_judge(quick / "a-file" / "judge-digits.pt", digits[0], CPU, FP32)  # a folder that can't be written
    assert "the judge is not kept: can't write" in capsys.readouterr().out
    for change in ("images", "settings", "damage"):
        data = digits[0]
        if change == "images":
            data = common.Data(255 - data.images, data.labels)
        elif change == "settings":
            monkeypatch.setitem(compare.JUDGE, "lr", 1.0)
        else:
            file.write_bytes(file.read_bytes()[:1000])
        compare.load_judge(file, data, CPU, FP32)
        assert "training the judge" in capsys.readouterr().out, change


def test_judge_sees_through_blur_and_dimness():
    torch.manual_seed(0)
    worse = compare.worsened(torch.full((200, 1, 12, 12), 0.5))
    dims, specks = worse.mean((1, 2, 3)), worse[:, :, 4:8, 4:8].flatten(1).std(1)
    assert worse.shape == (200, 1, 12, 12) and dims.min() < 0.25 and dims.max() < 0.6
    assert 0.3 < (specks < 1e-6).float().mean() < 0.7 and specks.max() < 0.52  # 0.3 in 16 pixels


@pytest.mark.parametrize("size", [28, pytest.param(64, marks=pytest.mark.full)])
def test_judge_of_images_without_labels(size):
    images = torch.randint(0, 256, (257, 3, size, size), dtype=torch.uint8)
    judge = compare.train_judge(common.Data(images, None), CPU, FP32, steps=2)
    assert compare.judge_images(judge, images, CPU)[0].shape == (257, 128)


# -------------------------------------------------------------------------------------------- runs and tables


def draw_test_digits(latents, labels, images):
    """A perfect model: it draws real test digits, of the class that is asked for if any."""
    if labels is None:
        return common.to_unit(images.images[latents[:, 0].mul(1e4).long() % len(images.images)])
    return torch.stack([common.to_unit(images.images[images.labels == label][0]) for label in labels])


@pytest.fixture
def fifth(quick, digits, monkeypatch):
    """A function that makes the run of a fifth model; its classes and whether it has a likelihood are options."""

    def load_sampler(checkpoint, device):
        options = checkpoint["options"]
        evaluate = (
            (lambda images, samples=500: {"ELBO": -100.0, "bound": -100.0 + math.log(samples)})
            if options["vae"]
            else None
        )
        return common.Sampler(
            4, lambda z, y=None: draw_test_digits(z, y, digits[1]), 1234, options["classes"], evaluate
        )

    module = ModuleType("fifth")
    module.load_sampler = load_sampler
    monkeypatch.setitem(sys.modules, "fifth", module)
    known = compare.scripts()
    monkeypatch.setattr(compare, "scripts", lambda: known | {"fifth"})

    def make(name, classes=0, vae=False, **changes):
        options = dict(dataset="digits", epochs=2, classes=classes, vae=vae)
        history = [{"epoch": i, "seconds": 30.0, "images per second": 100.0 * i} for i in (1, 2)]
        checkpoint = dict(
            format=common.CHECKPOINT_FORMAT, script="fifth", options=options, epoch=2, networks={}, optimizers={},
            history=history,
        )  # fmt: skip
        folder = quick / "runs" / name
        folder.mkdir(parents=True)
        torch.save(checkpoint | changes, folder / "checkpoint.pt")
        return folder

    return make


def test_a_fifth_model_joins_and_every_file_agrees(fifth, quick, capsys):
    folders = [fifth("plain"), fifth("by-class", classes=10), fifth("likelihood", vae=True)]
    compare.main([*map(str, folders), "--samples", "200", "--to", "out/results"])
    text = capsys.readouterr().out
    assert (quick / "data" / "judge-digits.pt").is_file()
    results = json.loads((quick / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["samples"] == 200 and results["judge_accuracy"]["digits"] > 0.7
    floor, plain, by_class, likelihood = results["rows"]
    assert [row["run"] for row in (floor, plain, by_class, likelihood)] == [
        "real images",
        "plain",
        "by-class",
        "likelihood",
    ]
    assert plain["parameters"] == 1234 and plain["epochs"] == 2 and plain["minutes"] == 1 and plain["images/s"] == 150
    assert plain["precision"] > 0.9 and plain["classes"] == 10 and plain["sharpness"] == pytest.approx(1, abs=0.1)
    assert plain["noise"] == pytest.approx(1, abs=0.3) and plain["KL [nats]"] < 0.2
    assert "agreement" not in plain and by_class["agreement"] > 0.7 and "ELBO [nats]" not in by_class
    assert by_class["recall"] < plain["recall"]  # ten pictures in all
    assert likelihood["ELBO [nats]"] == -100 and likelihood["bound [nats]"] == pytest.approx(-100 + math.log(500))

    markdown = (quick / "out" / "results.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    header = [word.strip() for word in lines[0]]
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1 and "Wasserstein" not in header
    cells = dict(zip(header, (word.strip() for word in lines[3])))
    assert (
        cells["run"] == "plain" and cells["precision"] == f"{plain['precision']:.3f}" and cells["parameters"] == "1,234"
    )
    assert cells["precision"] in text and "test images" in text
    with open(quick / "out" / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["Frechet"]) == plain["Frechet"] and rows[0]["epochs"] == ""
    with Image.open(quick / "out" / "results.png") as picture:
        assert picture.width > 1000 and picture.height > 4 * 60


def test_a_run_under_way_is_marked(fifth):
    folder = fifth("plain", epoch=1, history=[{"seconds": 1.0, "images per second": 5.0}])
    run = compare.load_run(folder, compare.parse_args([str(folder)]), CPU)
    assert compare.cell(run.row, "epochs") == "1 of 2"


def test_what_is_no_run_is_left_out_with_a_line_and_equal_names_are_told_apart(fifth, quick, capsys):
    folders = [fifth("plain"), fifth("again/plain"), quick / "runs" / "note.txt", quick / "runs" / "begun"]
    folders[2].touch()
    folders[3].mkdir()
    compare.main([*map(str, folders), "--samples", "100"])
    text = capsys.readouterr().out
    assert text.count("compare: left out: ") == 2 and "begun holds no run" in text
    names = [row["run"] for row in json.loads(Path("comparison.json").read_text())["rows"][1:]]
    assert names == [str(folder) for folder in folders[:2]]
    with pytest.raises(SystemExit):
        compare.main([str(folders[2])])
    assert "note.txt holds no run" in capsys.readouterr().err


@pytest.fixture
def faces_run(quick, monkeypatch):
    """The folder of a run of dcgan.py on a folder of 20 images, one epoch."""
    monkeypatch.setattr(compare, "LEAST_STEPS", 4)
    monkeypatch.setattr(compare, "MOST_STEPS", 4)
    monkeypatch.setitem(dcgan.PRESETS["guo"]["folder"], "features", 4)
    (quick / "faces").mkdir()
    for i in range(20):
        Image.effect_noise((32, 32), 60).convert("RGB").save(quick / "faces" / f"{i}.png")
    dcgan.main("--dataset faces --image-size 32 --batch-size 10 --epochs 1 --device cpu --out-dir run".split())
    return quick / "run"


def test_twenty_images_that_moved_are_enough_and_others_are_refused(faces_run, quick, capsys):
    (quick / "faces").rename(quick / "moved")
    for words in (["run"], ["run", "--dataset", "moved"]):
        try:
            compare.main([*words, "--samples", "100"])
        except SystemExit:
            assert words == ["run"] and "there is no folder" in capsys.readouterr().err
    assert json.loads(Path("comparison.json").read_text())["rows"][1]["run"] == "run"
    (quick / "moved" / "0.png").unlink()
    Image.effect_noise((32, 32), 60).convert("RGB").save(quick / "moved" / "00.png")
    with pytest.raises(SystemExit):
        compare.main(["run", "--dataset", "moved", "--samples", "100"])
    assert "run was trained on other images than" in capsys.readouterr().err


def test_folder_runs_are_measured_without_labels(fifth, quick, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    faces = torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    faces = faces.repeat_interleave(2, 2).repeat_interleave(2, 3)
    monkeypatch.setattr(common, "load_data", lambda *_, **__: common.Data(faces, None))
    monkeypatch.setattr(compare, "LEAST_STEPS", 4)
    monkeypatch.setattr(compare, "MOST_STEPS", 4)
    sampler = common.Sampler(4, lambda z, y=None: common.to_unit(faces[: len(z)]), 1)
    run = compare.Measurable(("/elsewhere/faces", 32, "data"), None, sampler, dict(run="faces", parameters=1))
    monkeypatch.setattr(compare, "load_run", lambda *_: run)
    measure, measured = compare.Table.measure, []

    def remember(table, images, labels):
        measured.append(images)
        return measure(table, images, labels)

    monkeypatch.setattr(compare.Table, "measure", remember)
    args = Namespace(samples=60, to="faces")
    (table,) = compare.compare(["faces"], args, CPU, FP32)
    compare.report([table], args)
    floor, row = table.rows
    assert len(table.images) == len(measured[0]) == 30
    assert {image.numpy().tobytes() for image in torch.cat([table.images, measured[0]])} == {
        image.numpy().tobytes() for image in faces
    }  # one half meets the other
    assert {"Frechet", "precision", "recall", "Wasserstein", "sharpness", "noise", "walk"} < set(row)
    assert not {"classes", "KL [nats]", "agreement"} & set(row) and floor["Wasserstein"] > 0
    assert "elsewhere" not in (quick / "faces.json").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(script="os"), "no such script"),
        (dict(script="common"), "no such script"),
        (dict(script="../gan"), "no such script"),
        (dict(script=["gan"]), "no checkpoint of this version"),
        (dict(script="gan"), "is damaged"),  # with another script's options
        (dict(history=[]), "is damaged"),
        (dict(history=[{"epoch": 1}]), "is damaged"),
        (dict(options={}), "is damaged"),
        (dict(options=None), "no checkpoint of this version"),
        (dict(format=0), "version"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(fifth, changes, words, capsys):
    with pytest.raises(SystemExit) as end:
        compare.main([str(fifth("plain", **changes))])
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1 and error.startswith("compare.py: error: ")


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "name the folders"),
        ("nowhere", "holds no run"),
        ("truncated", "damaged"),
        ("--repeat 2 x", "--grid"),
        ("--samples 5 x", "--samples"),
        ("--grid", "--grid takes one of"),
        ("--grid compare.py --lr 1", "--grid takes one of"),
        ("--grid gan.py 5", "must follow"),
        ("--grid gan.py --out-dir x", "no place in a grid"),
        ("--grid gan.py --seed 1 2 --repeat 2", "a single whole number"),
        ("--grid gan.py --dataset mnist digits", "one data set"),
        ("--grid gan.py --lr 1e-4 -3", "--lr"),
        ("--grid gan.py --colour blue", "--colour"),
        ("x --grid gan.py --lr 1", "name no others"),
    ],
)
def test_mistakes_get_one_line_and_status_2(quick, command, words, capsys):
    (quick / "truncated").mkdir()
    (quick / "truncated" / "checkpoint.pt").write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(SystemExit) as end:
        compare.main(command.split())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "error: " in error and words in error
    assert not list(quick.glob("**/comparison*")) and not (quick / "grids").exists()


# ------------------------------------------------------------------------------------------------------ grids


def test_grid_lists_every_combination():
    command = "--grid gan.py --repeat 3 --lr 1e-4 2e-4 --batch-size 64 128 --epochs 5 --augment".split()
    trials = compare.list_trials("gan", compare.parse_args(command))
    labels, words = zip(*trials.values())
    assert len(trials) == 2 * 2 * 3  # by folder: so there are twelve
    assert words[0] == ["--lr", "1e-4", "--batch-size", "64", "--epochs", "5", "--augment", "--seed", "0"]
    assert labels[0] == "lr 1e-4, batch-size 64" and [options[-1] for options in words[:3]] == ["0", "1", "2"]
    elsewhere = compare.list_trials("gan", compare.parse_args([*command, "--data-dir", "x"]))
    assert list(elsewhere) == list(trials)


@pytest.mark.full
def test_grid_trains_ranks_and_resumes(quick, monkeypatch, capsys):
    commands = []

    def run(command):  # in this process, since a new one imports torch anew
        commands.append(command[2:])
        gan.main(command[2:])
        if len(commands) == 2 and stop:
            raise KeyboardInterrupt
        return Namespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    command = (
        "--grid gan.py --dataset digits --lr 1e-9 1e-3 --epochs 1 --batch-size=200 --repeat 2 --samples 150".split()
    )
    stop = True
    with pytest.raises(SystemExit) as end:
        compare.main(command)
    assert end.value.code == 130 and len(commands) == 2
    assert "compare.py: interrupted: the same command goes on" in capsys.readouterr().err
    stop = False
    compare.main(command)
    assert len(commands) == 4  # the first two are not trained again
    text = capsys.readouterr().out
    script = Path(compare.__file__).with_name("gan.py")  # as the current folder is another
    best = f"python {script} --dataset digits --lr 1e-3 --epochs 1 --batch-size 200 --seed 0"
    assert f"best on digits by Frechet distance: {best}\n" in text
    rows = json.loads((quick / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert [row["run"] for row in rows] == ["real images", "lr 1e-3", "lr 1e-9"]
    assert rows[1]["Frechet"] < rows[2]["Frechet"] and rows[1]["Frechet deviation"] > 0
    folders = sorted((quick / "grids").iterdir())
    runs = [folder for folder in folders if "lr=1e-3" in folder.name]
    tables = compare.compare(runs, Namespace(samples=150, data_dir=None, dataset=None), CPU, FP32)
    found = np.array([row["Frechet"] for row in tables[0].rows[1:]])
    assert rows[1]["Frechet"] == pytest.approx(found.mean())
    assert rows[1]["Frechet deviation"] == pytest.approx(found.std(ddof=1))
    assert " ± " in (quick / "comparison.md").read_text(encoding="utf-8")


def test_grid_goes_on_without_a_run_that_failed(quick, monkeypatch, capsys):
    monkeypatch.setattr(compare.subprocess, "run", lambda command: Namespace(returncode=2))
    with pytest.raises(SystemExit) as end:
        compare.main("--grid gan.py --dataset digits --lr 1e-4 1e-3".split())
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out.count("failed, and is left out") == 2 and "no run" in captured.err


@pytest.mark.full
def test_the_study_trains_what_it_is_asked_to_measures_it_and_draws_it(quick, monkeypatch, capsys):
    write_idx(quick, 200)
    monkeypatch.setattr(compare, "SAMPLES", 100)
    words = ["--data-dir", str(quick), "--epochs", "1", "gan-guo", "vae-guo"]
    study.main(words)
    study.main([*words, "--epochs", "2"])  # goes on with both
    assert [row["epochs"] for row in json.loads(Path("comparison.json").read_text())["rows"][1:]] == [2, 2]
    assert "gan-guo                        2" in capsys.readouterr().out
    study.main(["--figure", "runs/gan-guo", "runs/vae-guo", "--to", "both.png"])
    width, height = Image.open("both.png").size
    assert width > 2 * 466 and 466 < height < 600
    cvaegan.main([*words[:2], "--epochs", "2", "--out-dir", "runs/cvaegan"])
    capsys.readouterr()
    Path(quick, "judge-mnist.pt").unlink()
    study.main(["--claims", "runs/gan-guo", "runs/cvaegan", "--data-dir", str(quick)])
    training, gan, classes = capsys.readouterr().out.splitlines()
    assert "training the judge, once" in training
    assert re.fullmatch(r"gan-guo: unsure [\d.]+% \(real [\d.]+%; .+\); kept 1-2: [01]\.\d\d", gan)
    figures = (
        r"cvaegan: unsure .+; kept 1-2: .+; morphs (\d\.\d{3}); styles ([\d.]+)%, ink (-?[\d.]+), slant (-?[\d.]+)"
    )
    morphs, styles, ink, slant = map(float, re.fullmatch(figures, classes).groups())
    assert 1 / 16 <= morphs <= 1 and 0 <= styles <= 100 and -1 <= ink <= 1 and -1 <= slant <= 1
    Path("runs/cvaegan/samples/epoch-0001.png").unlink()
    with pytest.raises(SystemExit) as end:
        study.main(["--claims", "runs/absent", "runs/cvaegan", "runs/gan-guo", "--data-dir", str(quick)])
    told = capsys.readouterr()
    assert end.value.code == 2 and told.out == gan + "\n"  # the one that is whole, as before
    assert told.err.startswith("study.py: error: runs/absent holds no run") and "epoch-0001.png" in told.err
    Image.new("RGB", (242, 242)).save("runs/cvaegan/samples/epoch-0001.png")
    with pytest.raises(SystemExit):
        study.main(["--claims", "runs/cvaegan", "runs/gan-guo", "--data-dir", str(quick)])
    told = capsys.readouterr()
    assert told.out == gan + "\n" and "epoch-0001.png is no grid of digits" in told.err
    content = Path("runs/gan-guo/samples/epoch-0001.png").read_bytes()
    at = content.index(b"IDAT")  # a wrong length of it: Pillow raises SyntaxError
    Path("runs/cvaegan/samples/epoch-0001.png").write_bytes(content[: at - 4] + b"\0\0\0\5" + content[at:])
    with pytest.raises(SystemExit):
        study.main(["--claims", "runs/cvaegan", "runs/gan-guo", "--data-dir", str(quick)])
    told = capsys.readouterr()
    assert told.out == gan + "\n" and "epoch-0001.png can't be read" in told.err


def test_ink_and_slant_of_a_leaning_stroke():
    upright, leaning = torch.zeros(2, 1, 28, 28)
    for y in range(4, 24):
        upright[0, y, 10:13], leaning[0, y, y // 2 + 3 : y // 2 + 5] = 1, 0.5
    ink, slant = study.ink_and_slant(torch.stack([upright, leaning]))
    assert torch.allclose(ink, torch.tensor([60 / 784, 20 / 784]))
    assert torch.allclose(slant, torch.tensor([0.0, 0.5]), atol=0.01)


def test_styles_that_stay_and_styles_that_go(monkeypatch):
    """A generator that copies its image keeps ink and slant and shows no asked label; one of noise keeps neither."""
    images = common.to_bytes(torch.rand(200, 1, 28, 28) * torch.rand(200, 1, 1, 1))
    test = common.Data(images, torch.arange(200) % 10)
    judge = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    monkeypatch.setattr(study.cvaegan, "encode", lambda _, images, classes: common.to_unit(images).flatten(1))
    monkeypatch.setattr(study.cvaegan, "generate", lambda _, latents, classes: latents.view(-1, 1, 28, 28))
    networks = dict(encoder=None, generator=None)
    _, ink, slant = study.measure_styles(networks, judge, test)
    assert ink > 0.99 and slant > 0.99
    monkeypatch.setattr(study.cvaegan, "generate", lambda _, latents, classes: torch.rand(len(latents), 1, 28, 28))
    _, ink, slant = study.measure_styles(networks, judge, test)
    assert abs(ink) < 0.2 and abs(slant) < 0.2
