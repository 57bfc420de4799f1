"""vae.py: networks, losses, bounds, the step, evaluation, pictures."""

from argparse import Namespace
from unittest import mock

import pytest
import torch
from PIL import ImageColor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torchvision.utils import make_grid

import common
import vae
from tests.conftest import CPU, FP32


def make(preset="guo", **changes):
    """Options, networks and optimizers of a preset."""
    torch.manual_seed(0)
    args = Namespace(**vae.PRESETS[preset] | changes)
    networks = vae.build(args)
    return args, networks, vae.make_optimizers(args, networks)


def some_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder"),
    [
        ("guo", 785 * 256 + 257 * 4, 3 * 256 + 257 * 784),
        ("banerjee-linear", 785 * 512 + 513 * 128 + 129 * 32, 17 * 128 + 129 * 512 + 513 * 784),
        (
            "banerjee-conv",
            9 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 32 + 64 + 128 + 256 + 12545 * 32,
            17 * 12544 + 9 * (256 * 128 + 128 * 64 + 64 * 32 + 32 * 1) + 128 + 64 + 32 + 1,
        ),
    ],
)
def test_networks_are_the_reports(preset, encoder, decoder):
    args, networks, _ = make(preset)
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert count == {"encoder": encoder, "decoder": decoder}
    mu, logvar = vae.encode(networks["encoder"], torch.rand(5, 1, 28, 28))
    assert mu.shape == logvar.shape == (5, args.latent_size)
    assert networks["decoder"](mu).shape == (5, 1, 28, 28)


def test_layers_of_the_convolutional_preset():
    encoder, decoder = make("banerjee-conv")[1].values()
    kinds = [[type(layer).__name__ for layer in network] for network in (encoder, decoder)]
    assert kinds[0] == [*["Conv2d", "LeakyReLU", "Dropout2d"] * 4, "Flatten", "Linear"]
    assert kinds[1] == ["Linear", "Unflatten", *["ConvTranspose2d", "ReLU"] * 3, "ConvTranspose2d"]
    x, sides = torch.rand(1, 1, 28, 28), []
    for layer in [*encoder, lambda both: both[:, :16], *decoder]:
        x = layer(x)
        sides += [tuple(x.shape[1:])] if "Conv" in type(layer).__name__ else []
    up = [(128, 14, 14), (64, 14, 14), (32, 14, 14), (1, 28, 28)]
    assert sides == [(32, 14, 14), (64, 14, 14), (128, 14, 14), (256, 7, 7), *up]


def test_losses_are_those_of_torch_distributions():
    logits, images = 3 * torch.randn(6, 1, 28, 28), torch.rand(6, 1, 28, 28).round()
    expected = -Bernoulli(logits=logits).log_prob(images).sum((1, 2, 3))
    torch.testing.assert_close(vae.reconstruction_loss(logits, images), expected)
    grey = torch.full_like(images, 0.3)  # of grey pixels: the expected loss of pixels that are white 3 times in 10
    white, black = torch.ones_like(images), torch.zeros_like(images)
    mixed = 0.3 * vae.reconstruction_loss(logits, white) + 0.7 * vae.reconstruction_loss(logits, black)
    torch.testing.assert_close(vae.reconstruction_loss(logits, grey), mixed)

    mu, logvar = torch.randn(6, 16), torch.randn(6, 16)
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(vae.kl_divergence(mu, logvar), expected)


def test_log_weights_are_those_of_torch_distributions():
    encoder, decoder = make()[1].values()
    images = some_images(3) / 255
    torch.manual_seed(5)
    found = vae.log_weights(encoder, decoder, images, samples=4)

    torch.manual_seed(5)
    mu, logvar = vae.encode(encoder, images)
    posterior = Normal(mu[:, None], (logvar / 2).exp()[:, None])
    latents = posterior.mean + posterior.stddev * torch.randn(12, 2).view(3, 4, 2)
    prior_to_posterior = (Normal(0.0, 1.0).log_prob(latents) - posterior.log_prob(latents)).sum(2)
    logits = decoder(latents.view(12, 2)).view(3, 4, -1)
    likelihood = Bernoulli(logits=logits, validate_args=False).log_prob(images.view(3, 1, -1)).sum(2)
    torch.testing.assert_close(found, likelihood + prior_to_posterior, rtol=1e-5, atol=1e-3)


def test_bounds_close_in_on_the_exact_likelihood():
    """One latent, so that log p(x) can be integrated: ELBO < bound of few samples < of many < log p(x)."""
    encoder, decoder = make(latent_size=1)[1].values()
    with torch.no_grad():  # a decoder that makes much of its latent, so that the bounds are apart
        for parameter in decoder.parameters():
            parameter *= 3
    images = some_images(8)
    z = torch.linspace(-8, 8, 2001)[:, None]
    with torch.no_grad():
        losses = [vae.reconstruction_loss(decoder(z), (image / 255).expand(2001, 1, 28, 28)) for image in images]
    log_joint = Normal(0.0, 1.0).log_prob(z) - torch.stack(losses, dim=1)
    exact = (log_joint.double().logsumexp(0) + torch.tensor(16 / 2000).log()).mean().item()
    torch.manual_seed(0)
    few, many = (vae.bounds(encoder, decoder, images, samples) for samples in (5, 1000))
    elbo, loose, tight = few["ELBO [nats]"], *(found["importance-weighted bound [nats]"] for found in (few, many))
    assert elbo < loose - 0.5 < tight - 1 and exact - 0.5 < tight < exact + 0.1
    one = vae.bounds(encoder, decoder, images, 1)
    assert one["ELBO [nats]"] == pytest.approx(one["importance-weighted bound [nats]"])


def test_measured_elbo_is_the_evaluated_one():
    """The log's loss (analytic KL, one latent) and --evaluate's ELBO (500 latents) estimate the same figure."""
    networks, images = make()[1].values(), some_images(100)
    loss = vae.measure(*networks, images)["test loss [nats]"]
    elbo = vae.bounds(*networks, images, 50)["ELBO [nats]"]
    assert loss == pytest.approx(-elbo, rel=1e-3)


def test_gradient_goes_through_the_latents():
    mu, logvar = torch.tensor([[0.7]], requires_grad=True), torch.tensor([[-0.4]], requires_grad=True)
    square = vae.reparameterize(mu, logvar, torch.randn(100_000, 1)).square().mean()
    by_mu, by_logvar = torch.autograd.grad(square, [mu, logvar])  # E z^2 = mu^2 + exp(logvar)
    assert by_mu.item() == pytest.approx(1.4, abs=0.02) and by_logvar.item() == pytest.approx(0.6703, abs=0.02)


@pytest.mark.parametrize(("preset", "beta"), [("guo", 1.0), ("banerjee-linear", 4.0)])
def test_step_equals_the_textbook_step(preset, beta):
    args, networks, optimizers = make(preset, beta=beta)
    encoder, decoder = make(preset)[1].values()  # the same seed: the same weights
    images = some_images(8)
    torch.manual_seed(3)
    losses = vae.make_step(args, CPU, FP32, networks, optimizers)(images)

    torch.manual_seed(3)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.lr)
    mu, logvar = encoder(images / 255).chunk(2, dim=1)
    pictures = torch.sigmoid(decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)))
    reconstruction = torch.nn.functional.binary_cross_entropy(pictures, images / 255, reduction="sum") / 8
    divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / 8
    (reconstruction + beta * divergence).backward()
    optimizer.step()
    torch.testing.assert_close(losses["train reconstruction [nats]"], reconstruction.detach())
    torch.testing.assert_close(losses["train KL [nats]"], divergence.detach())
    torch.testing.assert_close(losses["train loss [nats]"], (reconstruction + divergence).detach())  # beta or not
    for ours, theirs in zip(*(adam.param_groups[0]["params"] for adam in (optimizers["adam"], optimizer))):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_evaluating_has_no_dropout():
    encoder, decoder = make("banerjee-conv")[1].values()
    images = some_images(8)
    for evaluate in (
        lambda: vae.measure(encoder, decoder, images),
        lambda: vae.bounds(encoder, decoder, images, 3),
        lambda: vae.draw_reconstructions(encoder, decoder, images).tobytes(),
    ):
        found = []
        for training in (True, False):
            encoder.train(training), decoder.train(training)
            torch.manual_seed(0)
            found.append(evaluate())
        assert found[0] == found[1]


@pytest.mark.parametrize("preset", vae.PRESETS)
def test_training_leaves_its_pictures_and_losses(preset, trainings):
    run = trainings.finished(f"vae-{preset}")
    names = {path.name for path in run.iterdir()}
    assert {"reconstructions.png", "latent.png", "losses.png", "samples"} <= names
    assert ("manifold.png" in names) == (preset == "guo")
    for row in common.load_checkpoint(run)["history"]:
        for split in ("train", "test"):
            loss, *parts = (row[f"{split} {name} [nats]"] for name in ("loss", "reconstruction", "KL"))
            assert loss == pytest.approx(sum(parts), rel=1e-5)


def test_evaluate_prints_the_two_bounds_of_a_run(trainings, capsys):
    capsys.readouterr()
    for _ in range(2):
        trainings.main("vae-guo", "--out-dir", trainings.finished("vae-guo"), "--evaluate")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vae: test ")]
    assert len(lines) == 4 and lines[:2] == lines[2:]  # the same seed, the same figures
    elbo, bound = (float(line.rpartition(" ")[2]) for line in lines[:2])
    assert elbo <= bound < 0


def test_manifold_goes_right_with_the_first_latent_and_up_with_the_second():
    class Brightness(torch.nn.Module):  # the left half of a picture shows the first latent, the right half the second
        def forward(self, latents):
            return latents.repeat_interleave(14, dim=1)[:, None, None].expand(-1, 1, 28, 28)

    with mock.patch.object(common, "grid", lambda images, columns: make_grid(images, columns)[:1]):
        with mock.patch.object(common, "label_panels", lambda panels: panels[0][1]):
            picture = vae.draw_manifold(Brightness(), torch.device("cpu"), side=20)
    assert picture.shape == (1, 20 * 30 + 2, 20 * 30 + 2)
    first, second = picture[0, 16::30, 9::30], picture[0, 16::30, 23::30]  # (20, 20) each
    assert (first.diff(dim=1) > 0).all() and (first.diff(dim=0) == 0).all()
    assert (second.diff(dim=0) < 0).all() and (second.diff(dim=1) == 0).all()
    torch.testing.assert_close(first[0, -1], Normal(0.0, 1.0).icdf(torch.tensor(0.95)).sigmoid())


@pytest.mark.parametrize("latent_size", [2, 16])
def test_latent_map_shows_every_class(latent_size):
    encoder = make(latent_size=latent_size)[1]["encoder"]
    labels = torch.arange(200) % 10
    picture = vae.draw_latent_map(encoder, some_images(200), labels)
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {ImageColor.getrgb(colour) for colour in common.COLOURS} <= colours
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    vae.draw_latent_map(encoder, some_images(200), labels)  # all in one place
