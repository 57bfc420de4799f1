"""compare.py: every figure against an independent computation, the judge, the tables, grids; tests/study.py."""

import csv
import hashlib
import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

import common
import compare
import cvaegan
import dcgan
import gan
from tests import study
from tests.conftest import CPU, FP32, write_idx

np = pytest.importorskip("numpy")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    """A thousand labelled training digits and four hundred test digits."""
    train, test = common.draw_digits(True), common.draw_digits(False)
    return common.Data(train.images[:1000], train.labels[:1000]), common.Data(test.images[:400], test.labels[:400])


@pytest.fixture
def quick(monkeypatch, digits, tmp_path):
    """Few digits, a judge of few steps, an empty current folder."""
    monkeypatch.setattr(common, "draw_digits", lambda train=True: digits[0 if train else 1])
    monkeypatch.setattr(compare, "MOST_STEPS", 40)
    monkeypatch.setitem(compare.JUDGE, "batch_size", 64)
    monkeypatch.setattr(compare, "WALKS", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_frechet_distance_agrees_with_numpy_and_with_known_gaussians():
    one, other = noise(500, 6) @ noise(6, 6, seed=1), noise(400, 6, seed=2) @ noise(6, 6, seed=3) + 1
    first, second = np.cov(one.double().T.numpy()), np.cov(other.double().T.numpy())
    cross = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    squares = (one.double().mean(0) - other.double().mean(0)).square().sum().item()
    expected = squares + np.trace(first) + np.trace(second) - 2 * cross
    assert compare.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert compare.frechet_distance(one, one + 2) == pytest.approx(6 * 4, rel=1e-6)  # 2 in each of 6 dimensions
    assert compare.frechet_distance(one, one.mean(0).expand(100, 6)) == pytest.approx(np.trace(first), rel=1e-4)


def test_precision_and_recall_agree_with_a_plain_computation():
    real, fake = noise(60, 2), noise(50, 2, seed=1) * 1.5 + 0.3
    a, b = real.double().numpy(), fake.double().numpy()

    def among(points, others):
        reach = [sorted(np.linalg.norm(others - other, axis=1))[3] for other in others]
        inside = [any(np.linalg.norm(point - other) <= r for other, r in zip(others, reach)) for point in points]
        return np.mean(inside)

    precision, recall = compare.share_among(fake, real), compare.share_among(real, fake)
    assert (precision, recall) == pytest.approx((among(b, a), among(a, b))) and 0 < precision < 1


def test_class_figures():
    even = torch.full((10,), 0.1)
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
    spotted = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    spotted[..., 2::4, 2::4] = 51  # one pixel in sixteen (49 of 784), a fifth of white
    assert compare.texture(spotted) == (0, pytest.approx(0.2 * math.sqrt(49 / 784)))


def test_walk_figures():
    turn = torch.linspace(0, math.pi / 2, 5)
    arc = common.interpolate(torch.tensor([[2.0, 0]]), torch.tensor([[0, 3.0]]), 5)
    assert torch.allclose(arc[0], torch.stack([2 * turn.cos(), 3 * turn.sin()], dim=1), atol=1e-3)
    even, jump = torch.arange(17.0)[None, :, None], (torch.arange(17) > 7).float()[None, :, None]
    assert compare.evenness(even * noise(3, 1, 8)) == pytest.approx(1)
    assert compare.evenness(jump * noise(3, 1, 8)) == pytest.approx(1 / 16)


def test_sliced_wasserstein_distance_of_shifted_points():
    one, shift = noise(2000, 12), noise(12, seed=5)
    mean_projection = math.gamma(6) / (math.sqrt(math.pi) * math.gamma(6.5))  # of a unit vector on random directions
    expected = shift.norm().item() * mean_projection
    shifted = (one + shift)[torch.randperm(2000)]
    assert compare.sliced_distance(one, shifted, 2000) == pytest.approx(expected, rel=0.05)


def test_laplacian_pyramid_splits_an_image_by_scale():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    levels = compare.laplacian_pyramid(images)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    whole = levels[-1]
    for level in levels[-2::-1]:
        whole = level + torch.nn.functional.interpolate(whole, level.shape[-2:], mode="bilinear", align_corners=False)
    assert torch.allclose(whole, images, atol=1e-5)
    assert compare.laplacian_pyramid(torch.full((1, 3, 64, 64), 0.25))[0].abs().max() < 1e-6


def test_sliced_wasserstein_grows_with_what_is_wrong():
    generator = torch.Generator().manual_seed(0)
    real, other = torch.randint(0, 256, (2, 60, 3, 32, 32), generator=generator, dtype=torch.uint8)
    blurred = [gaussian_blur(real, 5, [sigma, sigma]) for sigma in (0.6, 1.2)]
    same, floor, little, much = (compare.sliced_wasserstein(real, images) for images in (real, other, *blurred))
    assert same < floor < little < much


def test_contrastive_loss_against_numpy():
    one, other = noise(5, 3), noise(5, 3, seed=1)
    both = torch.cat([one, other]).double().numpy()
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    kernel = np.exp(both @ both.T / 0.2)
    expected = [-np.log(kernel[i, (i + 5) % 10] / (kernel[i].sum() - kernel[i, i])) for i in range(10)]
    assert compare.contrastive_loss(one, other, 0.2).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_augmentations():
    torch.manual_seed(0)
    spot = torch.zeros(50, 1, 9, 9)
    spot[:, :, 4, 4] = 1
    _, _, y, x = compare.shifted(spot, 2).nonzero().T
    assert len(x) == 50 and {*y.tolist()} == {*x.tolist()} == {2, 3, 4, 5, 6} and not torch.equal(y, x)
    crops = compare.cropped(torch.rand(50, 3, 16, 16))
    assert crops.shape == (50, 3, 16, 16) and crops.min() >= 0 and crops.max() <= 1.2
    worse = compare.worsened(torch.full((200, 1, 12, 12), 0.5))
    dims, specks = worse.mean((1, 2, 3)), worse[:, :, 4:8, 4:8].flatten(1).std(1)
    assert worse.shape == (200, 1, 12, 12) and dims.min() < 0.25 and dims.max() < 0.6
    assert 0.3 < (specks < 1e-6).float().mean() < 0.7 and specks.max() < 0.52  # 0.3 in 16 pixels


def test_judge_learns_and_is_kept(quick, digits, monkeypatch, capsys):
    file = quick / "data" / "judge-digits.pt"
    judge, judge_hash = compare.load_judge(file, digits[0], CPU, FP32)
    assert "training the judge" in capsys.readouterr().out
    features, classes = compare.judge_images(judge, digits[1].images, CPU)
    assert features.shape == (400, 128) and (classes == digits[1].labels).float().mean() > 0.7  # after forty steps
    again, again_hash = compare.load_judge(file, digits[0], CPU, FP32)
    assert again_hash == judge_hash == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not capsys.readouterr().out and torch.equal(compare.judge_images(again, digits[1].images, CPU)[0], features)
    monkeypatch.setattr(compare, "train_judge", lambda *_: judge)
    compare.load_judge(file, common.Data(255 - digits[0].images, digits[0].labels), CPU, FP32)
    assert "training the judge" in capsys.readouterr().out  # of other images
    (quick / "a-file").touch()
    compare.load_judge(quick / "a-file" / "judge-digits.pt", digits[0], CPU, FP32)
    assert "the judge is not kept: can't write" in capsys.readouterr().out


@pytest.fixture
def fifth(quick, digits, monkeypatch):
    """A function that makes the run of a fifth model, which draws real test digits, of the class asked for if any."""
    images, labels = digits[1]

    def generate(latents, classes=None):
        if classes is None:
            return common.to_unit(images[latents[:, 0].mul(1e4).long() % len(images)])
        return torch.stack([common.to_unit(images[labels == label][0]) for label in classes])

    def evaluate(images, samples=500):
        return {"ELBO": -100.0, "bound": -100.0 + math.log(samples)}

    def load_sampler(checkpoint, device):
        options = checkpoint["options"]
        return common.Sampler(4, generate, 1234, options["classes"], evaluate if options["vae"] else None)

    monkeypatch.setitem(sys.modules, "fifth", Namespace(load_sampler=load_sampler))
    monkeypatch.setattr(compare, "scripts", lambda: {"gan", "fifth"})

    def make(name, classes=0, vae=False, **changes):
        checkpoint = dict(format=common.CHECKPOINT_FORMAT, script="fifth", epoch=2, networks={}, optimizers={})
        checkpoint["options"] = dict(dataset="digits", epochs=2, classes=classes, vae=vae)
        checkpoint["data"] = digits[0].digest()
        checkpoint["history"] = [{"epoch": i, "seconds": 30.0, "images per second": 100.0 * i} for i in (1, 2)]
        folder = quick / "runs" / name
        folder.mkdir(parents=True)
        torch.save(checkpoint | changes, folder / "checkpoint.pt")
        return str(folder)

    return make


def test_a_fifth_model_joins_and_every_file_agrees(fifth, quick, capsys):
    under_way = dict(epoch=1, history=[{"epoch": 1, "seconds": 30.0, "images per second": 100.0}])
    bf16, fp32 = ([dict(torch="2.14", device="cpu", precision=precision)] for precision in ("bf16", "fp32"))
    folders = [fifth("plain", arithmetic=bf16), fifth("one/twin", classes=10, arithmetic=fp32)]
    folders += [fifth("other/twin", vae=True, **under_way)]
    compare.main([*folders, "absent", "--samples", "200", "--to", "out/results"])
    text = capsys.readouterr().out
    assert "the runs on digits were not all trained with the same precision (bf16, fp32)" in text
    assert "compare: left out: there is no folder absent" in text and (quick / "data" / "judge-digits.pt").is_file()
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert results["samples"] == 200 and results["judges"]["digits"]["accuracy"] > 0.7
    assert [row["run"] for row in results["rows"]] == ["real images", "plain", *folders[1:]]  # equal names told apart
    _, plain, by_class, likelihood = results["rows"]
    assert plain["parameters"] == 1234 and plain["epochs"] == 2 and plain["minutes"] == 1 and plain["images/s"] == 150
    assert plain["precision"] > 0.9 and plain["classes"] == 10 and plain["sharpness"] == pytest.approx(1, abs=0.1)
    assert plain["noise"] == pytest.approx(1, abs=0.3) and plain["KL [nats]"] < 0.2
    assert "agreement" not in plain and by_class["agreement"] > 0.7 and "ELBO [nats]" not in by_class
    assert by_class["recall"] < plain["recall"]  # ten pictures in all
    assert likelihood["ELBO [nats]"] == -100 and likelihood["bound [nats]"] == pytest.approx(-100 + math.log(500))

    markdown = Path("out/results.md").read_text(encoding="utf-8")
    header, _, *lines = [line.split("|")[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    _, shown, _, last = [{name.strip(): word.strip() for name, word in zip(header, line)} for line in lines]
    assert (shown["run"], shown["precision"], shown["parameters"]) == ("plain", f"{plain['precision']:.3f}", "1,234")
    assert last["epochs"] == "1 of 2" and "Wasserstein" not in shown and markdown in text
    floor, row, *_ = csv.DictReader(Path("out/results.csv").read_text(encoding="utf-8").splitlines())
    assert float(row["Frechet"]) == plain["Frechet"] and floor["epochs"] == ""
    width, height = Image.open("out/results.png").size
    assert width > 1000 and height > 4 * 60


@pytest.mark.full
def test_a_folder_of_pictures_is_a_row_and_seeds_of_one_run_are_one(fifth, quick, digits, refusal):
    for i, image in enumerate(digits[1].images.repeat(3, 1, 1, 1)[:1000]):
        picture = common.to_picture(image)
        common.write_picture(quick / "theirs" / f"{i % 10}" / f"{i}.png", picture.convert("RGB") if i % 2 else picture)
    runs = [fifth("own"), fifth("own-seed1"), fifth("other", classes=10)]
    compare.main(["theirs", *runs, "--dataset", "digits", "--samples", "900"])
    _, theirs, own, other = json.loads(Path("comparison.json").read_text())["rows"]
    assert theirs["run"] == "theirs (900 pictures)" and theirs["precision"] > 0.9 and theirs["Frechet"] < 5
    assert (own["run"], own["seeds"], own["parameters"]) == ("own", 2, 1234) and "seeds" not in other
    Image.new("L", (32, 32)).save(quick / "theirs" / "5" / "5.png")
    assert "5.png has 32x32 pixels, not 28x28" in refusal("compare", "theirs")
    (quick / "theirs" / "5" / "5.png").unlink()
    assert "theirs holds no run and 999 pictures" in refusal("compare", "theirs")
    assert "runs holds runs and is none: name runs/*" in refusal("compare", "runs")
    compare.main([f"{runs[0]}/checkpoint.pt", "--samples", "100"])
    assert json.loads(Path("comparison.json").read_text())["rows"][1]["run"] == "own"


def test_twenty_images_that_moved_are_enough_and_others_are_refused(quick, monkeypatch, refusal):
    monkeypatch.setattr(compare, "MOST_STEPS", 4)
    monkeypatch.setitem(dcgan.PRESETS["guo"]["folder"], "features", 4)
    (quick / "faces").mkdir()
    for i in range(20):
        Image.effect_noise((32, 32), 60).convert("RGB").save(quick / "faces" / f"{i}.png")
    dcgan.main("--dataset faces --image-size 32 --batch-size 10 --epochs 1 --device cpu --out-dir run".split())
    (quick / "faces").rename(quick / "moved")
    assert "there is no folder" in refusal("compare", "run", "--samples", 100)
    compare.main(["run", "--dataset", "moved", "--samples", "100"])
    floor, row = json.loads(Path("comparison.json").read_text())["rows"]
    assert {"Frechet", "precision", "recall", "Wasserstein", "sharpness", "noise", "walk"} < set(row)
    assert not {"classes", "KL [nats]", "agreement"} & set(row) and floor["Wasserstein"] > 0
    table = compare.Table("moved", 32, ".", CPU, FP32)  # one half of the images meets the other
    halves = [{image.numpy().tobytes() for image in images} for images in (table.images, table.rows[0]["pictures"])]
    assert [len(half) for half in halves] == [10, 10] and not halves[0] & halves[1]
    Image.new("RGB", (32, 32)).save(quick / "moved" / "0.png")
    assert "run was trained on other images than" in refusal("compare", "run", "--dataset", "moved")


def test_a_checkpoint_names_no_other_code_and_may_be_of_another_version(fifth, refusal):
    assert "no such script" in refusal("compare", fifth("strange", script="os"))
    assert "is damaged or of another version" in refusal("compare", fifth("earlier", script="gan"))


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "name the folders"),
        ("--repeat 2 x", "--grid"),
        ("--grid compare.py --lr 1", "--grid takes one of"),
        ("--grid gan.py 5", "must follow"),
        ("--grid gan.py --out-dir x", "no place in a grid"),
        ("--grid gan.py --seed 1 2 --repeat 2", "a single whole number"),
        ("--grid gan.py --lr 1e-4 -3", "--lr"),
    ],
)
def test_mistakes_get_one_line(quick, command, words, refusal):
    assert words in refusal("compare", *command.split())
    assert not list(quick.iterdir())


def test_grid_lists_every_combination():
    command = "--grid gan.py --repeat 3 --lr 1e-4 2e-4 --batch-size 64 128 --epochs 5 --augment".split()
    trials = compare.list_trials("gan", compare.parse_args(command))
    labels, words = zip(*trials.values())
    assert len(trials) == 2 * 2 * 3  # by folder: so there are twelve
    assert words[0] == ["--lr", "1e-4", "--batch-size", "64", "--epochs", "5", "--augment", "--seed", "0"]
    assert labels[0] == "lr 1e-4, batch-size 64" and [options[-1] for options in words[:3]] == ["0", "1", "2"]


@pytest.mark.full
def test_grid_trains_ranks_and_resumes(quick, monkeypatch, capsys):
    commands = []

    def run(command):  # in this process, since a new one imports torch anew
        commands.append(command[2:])
        gan.main(command[2:])
        if len(commands) == 2:
            raise KeyboardInterrupt
        return Namespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    command = "--grid gan.py --dataset digits --lr 1e-9 1e-3 --epochs 1 --batch-size=200 --repeat 2 --samples 150"
    with pytest.raises(SystemExit, match="130"):
        compare.main(command.split())
    assert "compare.py: interrupted: the same command goes on with a grid" in capsys.readouterr().err
    compare.main(command.split())
    assert len(commands) == 4  # the first two are not trained again
    text = capsys.readouterr().out
    script = Path(compare.__file__).with_name("gan.py")  # as the current folder is another
    best = f"python {script} --dataset digits --lr 1e-3 --epochs 1 --batch-size 200 --seed 0"
    assert f"best on digits by Frechet distance: {best}\n" in text
    rows = json.loads((quick / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert [row["run"] for row in rows] == ["real images", "lr 1e-3", "lr 1e-9"]
    assert rows[1]["Frechet"] < rows[2]["Frechet"]
    runs = sorted((quick / "grids").glob("*lr=1e-3*"))
    assert rows[1]["seeds"] == 2 and isinstance(rows[1]["parameters"], int) and "parameters deviation" not in rows[1]
    tables = compare.compare(runs, Namespace(samples=150, data_dir=None, dataset=None), CPU, FP32)
    found = np.array([row["Frechet"] for row in tables[0].rows[1:]])
    assert rows[1]["Frechet"] == pytest.approx(found.mean())
    assert rows[1]["Frechet deviation"] == pytest.approx(found.std(ddof=1))
    assert " ± " in (quick / "comparison.md").read_text(encoding="utf-8")


def test_a_grid_of_which_all_runs_failed(quick, monkeypatch, refusal):
    monkeypatch.setattr(compare.subprocess, "run", lambda command: Namespace(returncode=2))
    assert "no run of the grid ended well" in refusal("compare", *"--grid gan.py --dataset digits".split())


@pytest.mark.full
def test_the_study_trains_what_it_is_asked_to_measures_it_and_draws_it(quick, monkeypatch, capsys):
    write_idx(quick, 200)
    monkeypatch.setattr(compare, "SAMPLES", 100)
    names = ["gan-guo-mnist", "vae-guo-mnist", "gan-guo-mnist-conventional"]
    words = ["--data-dir", str(quick), "--epochs", "1", *names]
    study.main(words)
    study.main([*words, "--epochs", "2"])  # goes on with those that can
    rows = json.loads(Path("comparison.json").read_text())["rows"][1:]
    assert [(row["run"], row["epochs"]) for row in rows] == list(zip(names, [2, 2, 1]))
    study.main(["--figure", "runs/gan-guo-mnist", "runs/vae-guo-mnist", "--to", "both.png"])
    width, height = Image.open("both.png").size
    assert width > 2 * 484 and 484 < height < 600
    kept = [str(study.keep(Path("runs", name), quick).parent) for name in names]
    assert all(Path(folder, "checkpoint.pt").stat().st_size < 2e6 for folder in kept)
    compare.main([*kept, "--data-dir", str(quick)])
    for row, whole in zip(json.loads(Path("comparison.json").read_text())["rows"][1:], rows):  # 16 bits are enough
        assert row["Frechet"] == pytest.approx(whole["Frechet"], rel=0.02)
        assert (row["parameters"], row["minutes"]) == (whole["parameters"], whole["minutes"])
    with pytest.raises(SystemExit, match="2"):
        gan.main(["--out-dir", kept[0], "--resume", "--epochs", "9"])
    assert "was kept for drawing" in capsys.readouterr().err
    cvaegan.main([*words[:2], "--epochs", "2", "--out-dir", "runs/cvaegan"])
    claims = ["--claims", "runs/absent", "runs/cvaegan", "runs/gan-guo-mnist", "--data-dir", str(quick)]
    with pytest.raises(SystemExit, match="2"):
        study.main(claims)
    out, err = capsys.readouterr()
    assert err.startswith("study.py: error: there is no folder runs/absent")  # the others are measured
    classes, digits = out.splitlines()[-2:]
    pattern = r"gan-guo-mnist: unsure [\d.]+% \(real [\d.]+%; .+\); kept 1-2: [01]\.\d\d; last epoch 2, .+"
    assert re.fullmatch(pattern, digits)
    number = r"(-?[\d.]+)"
    figures = rf"cvaegan: unsure .+; kept 1-2: .+; morphs {number} \(\d+%, .+\); "
    figures += rf"styles {number}%, ink {number}, slant {number}"
    morphs, styles, ink, slant = map(float, re.fullmatch(figures, classes).groups())
    assert 1 / 16 <= morphs <= 1 and 0 <= styles <= 100 and -1 <= ink <= 1 and -1 <= slant <= 1


def test_ink_and_slant_of_a_leaning_stroke():
    upright, leaning = torch.zeros(2, 1, 28, 28)
    for y in range(4, 24):
        upright[0, y, 10:13], leaning[0, y, y // 2 + 3 : y // 2 + 5] = 1, 0.5
    ink, slant = study.ink_and_slant(torch.stack([upright, leaning]))
    assert torch.allclose(ink, torch.tensor([60 / 784, 20 / 784]))
    assert torch.allclose(slant, torch.tensor([0.0, 0.5]), atol=0.01)


def test_styles_that_stay_and_styles_that_go(monkeypatch):
    """A generator that copies its image keeps ink and slant and shows no asked label; one of noise keeps neither."""
    images = torch.rand(200, 1, 28, 28) * torch.rand(200, 1, 1, 1)
    test = common.Data(common.to_bytes(images), torch.arange(200) % 10)
    judge, networks = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), dict(encoder=0, generator=0)
    monkeypatch.setattr(cvaegan, "encode", lambda _, images, classes: common.to_unit(images).flatten(1))
    monkeypatch.setattr(cvaegan, "generate", lambda _, latents, classes: latents.view(-1, 1, 28, 28))
    assert min(study.measure_styles(networks, judge, test)[1:]) > 0.99
    monkeypatch.setattr(cvaegan, "generate", lambda _, latents, classes: torch.rand(len(latents), 1, 28, 28))
    assert max(map(abs, study.measure_styles(networks, judge, test)[1:])) < 0.2
