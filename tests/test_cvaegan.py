"""cvaegan.py: the six losses by hand, which network each moves, the moving averages, pictures, sampling."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

import common
import cvaegan
from tests.conftest import CPU, FP32

NETWORKS = ("encoder", "generator", "discriminator", "classifier")
PARAMETERS = dict(
    encoder=795 * 512 + 513 * 256 + 257 * 200,
    generator=111 * 512 + 2 * 512 + 513 * 1568 + 2 * 32 + 32 * 16 * 16 + 16 + 2 * 16 + 16 * 16 + 1,
    discriminator=16 * 16 + 16 + 16 * 32 * 16 + 32 + 1569 * 128 + 129,
    classifier=785 * 512 + 513 * 256 + 257 * 128 + 129 * 10,
    class_means=0,
)


def options(**changes) -> Namespace:
    return Namespace(**cvaegan.PRESETS["guo"] | changes)


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10


@pytest.fixture
def trained(trainings, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trainings.finished("cvaegan-guo"), tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------- networks
def test_networks():
    torch.manual_seed(0)
    networks = cvaegan.build(options())
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert count == PARAMETERS
    latents, classes = torch.randn(2, 100), torch.eye(10)[:2]
    images = networks["generator"].eval()(latents[[0, 0, 1]], classes[[0, 1, 0]])
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1
    for other in images[1:]:  # of another label, of another latent
        assert (images[0] - other).abs().max() > 1e-3
    mu, logvar = networks["encoder"](images[[0, 0]], classes)
    assert mu.shape == logvar.shape == (2, 100)
    assert not torch.equal(mu[0], mu[1]) and not torch.equal(logvar[0], logvar[1])
    for name, outputs in (("discriminator", 1), ("classifier", 10)):
        features, logits = networks[name](images)
        assert logits.shape == (3, outputs)
        torch.testing.assert_close(networks[name].last(features), logits)  # f is what the last layer sees


# --------------------------------------------------------------------------------------------------------------- losses
def test_cross_entropies():
    real, reconstructed, prior = torch.randn(3, 7, 1)
    fake = [-Bernoulli(logits=logits).log_prob(torch.zeros(7, 1)) for logits in (reconstructed, prior)]
    expected = -Bernoulli(logits=real).log_prob(torch.ones(7, 1)) + fake[0] + fake[1]
    torch.testing.assert_close(cvaegan.discriminator_loss(real, reconstructed, prior), expected.mean())
    expected = -Bernoulli(logits=prior).log_prob(torch.ones(7, 1)).mean()
    torch.testing.assert_close(cvaegan.adversarial_loss(prior), expected)
    assert cvaegan.adversarial_loss(torch.tensor([-1000.0])) == 1000  # no overflow where D is sure

    logits, labels = torch.randn(6, 10), torch.tensor([0, 3, 9, 9, 1, 2])
    expected = -Categorical(logits=logits).log_prob(labels).mean()
    torch.testing.assert_close(cvaegan.classifier_loss(logits, labels), expected)


def test_kl_divergence_is_a_sum_over_latents_and_a_mean_over_images():
    mu, logvar = torch.randn(2, 5, 3)
    exact = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1)).sum(1).mean()
    torch.testing.assert_close(cvaegan.kl_divergence(mu, logvar), exact)
    assert cvaegan.kl_divergence(torch.zeros(4, 100), torch.zeros(4, 100)) == 0
    assert cvaegan.kl_divergence(torch.ones(4, 100), torch.zeros(4, 100)) == 50


def test_matching_losses():
    real, reconstructed = (torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 3.0])[:, None, None, None].expand(2, 1, 2, 2))
    assert cvaegan.pairwise_loss(real, reconstructed) == (4 * 1 + 4 * 9) / 2 / 2  # half, mean of two images
    assert cvaegan.mean_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])) == 2.5
    assert cvaegan.mean_loss(torch.ones(10, 3), torch.zeros(10, 3)) == 15  # a sum over the classes


def test_moving_averages_of_each_class():
    averages = cvaegan.ClassMeans()
    features = torch.tensor([1.0, 3.0, 10.0])[:, None].expand(3, 128).clone().requires_grad_()
    classes = torch.eye(10)[[4, 4, 7]]
    step = 1 - cvaegan.DECAY
    means = averages("real", features, classes)
    assert means[4, 0].item() == pytest.approx(2 * step) and means[7, 0].item() == pytest.approx(10 * step)
    assert means.sum(1).nonzero().flatten().tolist() == [4, 7]
    assert averages.prior.abs().sum() == 0 and torch.equal(averages.real, means.detach())
    (gradient,) = torch.autograd.grad(means[4].sum(), features)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([step / 2, step / 2, 0.0]))
    means = averages("real", features, classes[[0, 1, 0]])  # a class that the batch lacks keeps its mean
    assert means[7, 0].item() == pytest.approx(10 * step)
    assert means[4, 0].item() == pytest.approx(2 * step * cvaegan.DECAY + 14 / 3 * step)
    for _ in range(200):
        means = averages("prior", features, classes)
    assert means[4, 0].item() == pytest.approx(2) and means[7, 0].item() == pytest.approx(10)


# ------------------------------------------------------------------------------------------------------------- the step
def gradients_of(weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The gradient that each network gets in one step under these weights, as one vector."""
    torch.manual_seed(0)
    args = options(loss_weights=weights)
    networks = cvaegan.build(args)
    optimizers = cvaegan.make_optimizers(args, networks)
    cvaegan.make_step(args, CPU, FP32, networks, optimizers)(*batch())
    return {name: torch.cat([p.grad.flatten() for p in networks[name].parameters()]) for name in NETWORKS}


def test_each_loss_moves_the_networks_of_the_table_alone():
    nothing = dict.fromkeys(cvaegan.WEIGHTS["ours"], 0.0)
    base = gradients_of(nothing)  # L_D, L_C and L_G have weight 1 throughout
    assert all(gradient.abs().sum() > 0 for gradient in base.values())
    moved = {}
    for term in nothing:
        changed = gradients_of(nothing | {term: 1.0})
        moved[term] = {name for name in NETWORKS if not torch.equal(base[name], changed[name])}
    assert moved.pop("kl") == {"encoder"}
    assert moved == dict.fromkeys(("mean", "class_mean", "adversarial", "label"), {"generator"})


def test_step_equals_the_textbook_step():
    """Shared passes and gradients change nothing against a pass and a gradient for every loss."""
    torch.manual_seed(0)
    args = options(lr=0.0)  # the weights stay
    networks = cvaegan.build(args)
    step = cvaegan.make_step(args, CPU, FP32, networks, cvaegan.make_optimizers(args, networks))
    images, labels = batch()
    common.seed_everything(3)
    losses = step(images, labels)

    common.seed_everything(3)
    noise, prior_latents = torch.randn(8, 2, 100).unbind(1)
    x, c, w = common.to_symmetric(images), torch.eye(10)[labels], cvaegan.WEIGHTS["ours"]
    E, G, D, C = (networks[name] for name in NETWORKS)

    def reconstruct():
        mu, logvar = E(x, c)
        return G(mu + (logvar / 2).exp() * noise, c)

    def half_square(a, b):
        return sum((a[i] - b[i]).pow(2).sum() for i in range(len(a))) / len(a) / 2

    def prior():
        return G(prior_latents, c)

    drawn = [(1 - D(images)[1].sigmoid()).log() for images in (reconstruct(), prior())]
    loss_d = -(D(x)[1].sigmoid().log() + drawn[0] + drawn[1])
    loss_c = -C(x)[1].softmax(1).log()[range(8), labels]
    loss_g = (
        half_square(x, reconstruct())
        + half_square(D(x)[0], D(reconstruct())[0])
        + half_square(C(x)[0], C(reconstruct())[0])
    )
    loss_gd = (D(x)[0].mean(0) - D(prior())[0].mean(0)).pow(2).sum() / 2
    loss_gc = 0
    for k in range(10):
        if (labels == k).any():
            means = [(1 - cvaegan.DECAY) * C(images)[0][labels == k].mean(0) for images in (x, prior())]
            loss_gc = loss_gc + (means[0] - means[1]).pow(2).sum() / 2
    loss_adversarial = -D(prior())[1].sigmoid().log().mean()
    loss_label = -C(prior())[1].softmax(1).log()[range(8), labels].mean()
    mu, logvar = E(x, c)
    loss_kl = sum((mu[i] ** 2 + logvar[i].exp() - logvar[i] - 1).sum() / 2 for i in range(8)) / 8

    textbook = [loss_d.mean(), loss_c.mean(), loss_kl, loss_g, loss_gd, loss_gc, loss_adversarial, loss_label]
    for ours, theirs in zip(losses.values(), textbook, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    of_generator = loss_g + w["mean"] * loss_gd + w["class_mean"] * loss_gc
    of_generator = of_generator + w["adversarial"] * loss_adversarial + w["label"] * loss_label
    objectives = w["kl"] * loss_kl + loss_g, of_generator, loss_d.mean(), loss_c.mean()
    for network, loss in zip((E, G, D, C), objectives):
        parameters = list(network.parameters())
        scale = max(parameter.grad.abs().max() for parameter in parameters).item()
        for parameter, expected in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * scale)


# ----------------------------------------------------------------------------------------------------------------- runs
def test_training_leaves_a_whole_folder(trained):
    names = {"checkpoint.pt", "log.csv", "losses.png", "real.png", "progress.png", "progress.gif"}
    names |= {"classes.png", "morph.png", "styles.png", "morph.gif"}
    assert names <= {path.name for path in trained.iterdir()}
    assert len(list((trained / "samples").iterdir())) == 2
    for name, columns, rows in (("classes", 10, 10), ("morph", 10, 10), ("styles", 11, 10)):
        width, height = Image.open(trained / f"{name}.png").size  # a margin and a title around it
        assert 0 < width - 2 * (columns * 30 + 2) < 100 and 0 < height - 2 * (rows * 30 + 2) < 150
    assert Image.open(trained / "morph.gif").n_frames > 4
    assert (trained / "log.csv").read_text().startswith("epoch,L_D [nats],L_C [nats],L_KL [nats],L_G [squares]")
    assert common.load_checkpoint(trained)["networks"]["class_means"]["real"].abs().sum() > 0


def test_samples_of_classes_in_turn_and_of_one(trainings, trained, tmp_path):
    before = {name: (trained / name).read_bytes() for name in ("classes.png", "morph.png", "styles.png")}
    run = ["--out-dir", trained, "--sample"]
    for name, options, expected in (
        ("all", [23], {f"{i % 10}/{i:05}.png" for i in range(23)}),
        ("sevens", [5, "--label", 7], {f"7/{i:05}.png" for i in range(5)}),
    ):
        trainings.main("cvaegan", *run, *options, "--to", tmp_path / name)
        assert {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*.png")} == expected
    trainings.main("cvaegan", *run, 64)  # the fixed latents' grid: a column a class
    assert (trained / "sample.png").read_bytes() == (trained / "samples/epoch-0002.png").read_bytes()
    assert before == {name: (trained / name).read_bytes() for name in before}  # drawn anew, and the same


def test_sampling_without_test_images_says_so(trained, tmp_path, monkeypatch, capsys):
    def absent(*_, **__):
        raise common.UserError("not there")

    monkeypatch.setattr(common, "load_data", absent)
    (trained / "classes.png").unlink()
    cvaegan.main(["--out-dir", str(trained), "--sample", "4", "--to", str(tmp_path / "grid.png")])
    assert "real test images: not there" in capsys.readouterr().out
    assert (trained / "classes.png").exists() and (tmp_path / "grid.png").exists()


def test_sampler(trained):
    sampler = cvaegan.load_sampler(common.load_checkpoint(trained, "cvaegan"), torch.device("cpu"))
    assert (sampler.latent_size, sampler.classes) == (100, 10)
    assert sampler.parameters == sum(PARAMETERS.values())
    images = sampler.generate(torch.randn(4, 100), torch.tensor([3, 3, 0, 9]))
    assert images.shape == (4, 1, 28, 28) and 0 <= images.min() <= images.max() <= 1


def test_the_papers_weights_train(trainings, tmp_path):
    trainings.train("cvaegan-guo", tmp_path, "--epochs", 1, "--weights", "paper")
    assert common.load_checkpoint(tmp_path)["options"]["loss_weights"] == cvaegan.WEIGHTS["paper"]
