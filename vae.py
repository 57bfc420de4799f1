"""VAE: an encoder maps an image to a Gaussian over latents; a decoder maps latents to images.

    python vae.py                                   # the first report's run: MNIST, two latents, 200 epochs
    python vae.py --preset banerjee-linear          # the second report's, 16 latents, 100 epochs
    python vae.py --preset banerjee-conv            # and its convolutional one
    python vae.py --evaluate                        # the trained run's bounds on log p(x), test images
    python vae.py --sample 64 --to grid.png         # draw from it

Both learn together to maximise the evidence lower bound, ELBO <= log p(x) (Kingma and Welling 2013, arXiv 1312.6114).
Its reconstruction term asks the decoder to rebuild an image from its latents. Its KL term keeps every image's Gaussian
near N(0, I), so that a latent drawn from N(0, I) decodes to an image. Losses are -ELBO in nats an image: sums over
pixels and latents, means over images. Grey pixels enter as probabilities, as in the reports; figures for binarised
MNIST don't compare.

Test losses on MNIST: 152.7 nats for `guo` after 200 epochs (importance-weighted bound 149.7; 2.9 seconds an epoch on
one core of an AMD EPYC, Zen 3, torch 2.14.1, float32), 149.2 with --lr 1e-3, 99.8 for `banerjee-linear` and 95.5 for
`banerjee-conv` after 100.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import math
import os
from argparse import Namespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import common  # common.py, which lies beside this file

PRESETS = {
    "guo": dict(epochs=200, batch_size=128, lr=1e-4, latent_size=2, convolutional=False, sizes=(256,), beta=1.0),
    "banerjee-linear": dict(
        epochs=100, batch_size=64, lr=1e-4, latent_size=16, convolutional=False, sizes=(512, 128), beta=1.0,
    ),
    "banerjee-conv": dict(
        epochs=100, batch_size=128, lr=1e-4, latent_size=16, convolutional=True, sizes=(32, 64, 128, 256), beta=1.0,
    ),
}  # fmt: skip
STRIDES = (2, 1, 1, 2)  # of the encoder's convolutions: 28 -> 14 -> 14 -> 14 -> 7; the decoder's are the mirror image
IMPORTANCE_SAMPLES = 500  # an image, for the importance-weighted bound


class LinearEncoder(nn.Sequential):
    """Images (N, 1, 28, 28) in [0, 1] to mean and log variance of q(z | x), side by side: (N, 2 * latent_size)."""

    def __init__(self, latent_size: int, sizes: tuple[int, ...]):
        layers = [nn.Flatten()]
        for inputs, outputs in zip((784, *sizes), sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], 2 * latent_size))


class LinearDecoder(nn.Sequential):
    """Latents (N, latent_size) to logits (N, 1, 28, 28): a pixel is white with probability sigmoid(logit)."""

    def __init__(self, latent_size: int, sizes: tuple[int, ...]):
        layers, sizes = [], sizes[::-1]
        for inputs, outputs in zip((latent_size, *sizes), sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], 784), nn.Unflatten(1, (1, 28, 28)))


class ConvolutionalEncoder(nn.Sequential):
    """As LinearEncoder. Dropout takes whole channels: a lone pixel could be told from its neighbours."""

    def __init__(self, latent_size: int, sizes: tuple[int, ...]):
        layers = []
        for inputs, outputs, stride in zip((1, *sizes), sizes, STRIDES):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(sizes[-1] * 7 * 7, 2 * latent_size))


class ConvolutionalDecoder(nn.Sequential):
    """As LinearDecoder; the encoder's mirror image: 256x7x7 -> 128x14x14 -> 64x14x14 -> 32x14x14 -> 1x28x28."""

    def __init__(self, latent_size: int, sizes: tuple[int, ...]):
        sizes = sizes[::-1]
        layers = [nn.Linear(latent_size, sizes[0] * 7 * 7), nn.Unflatten(1, (sizes[0], 7, 7))]
        for inputs, outputs, stride in zip(sizes, (*sizes[1:], 1), STRIDES[::-1]):
            layers += [nn.ConvTranspose2d(inputs, outputs, 3, stride, padding=1, output_padding=stride - 1), nn.ReLU()]
        super().__init__(*layers[:-1])  # the last layer's are logits


def build(args: Namespace) -> dict[str, nn.Module]:
    kinds = (ConvolutionalEncoder, ConvolutionalDecoder) if args.convolutional else (LinearEncoder, LinearDecoder)
    return {name: kind(args.latent_size, args.sizes) for name, kind in zip(("encoder", "decoder"), kinds)}


def encode(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] to the mean and the log variance of q(z | x), each float32 (N, latent_size)."""
    mu, logvar = encoder(images).float().chunk(2, dim=1)
    return mu, logvar


def reparameterize(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Latents of q(z | x) that let the gradient through to the encoder (Kingma and Welling, section 2.4)."""
    return mu + (logvar / 2).exp() * noise


def reconstruction_loss(logits: Tensor, images: Tensor) -> Tensor:
    """-log p(x | z) of Bernoulli pixels, x in [0, 1]: (N, 1, 28, 28) to nats an image (N,), summed over pixels."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, I)), (N, latent_size) to nats an image (N,) (Kingma and Welling, appendix B)."""
    return (mu.square() + logvar.exp() - logvar - 1).sum(1) / 2


def make_optimizers(args: Namespace, networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    return dict(adam=common.adam(parameters, args.lr))


def make_step(args: Namespace, device: torch.device, autocast: torch.autocast, networks: dict, optimizers: dict):
    """A function from a batch, uint8 (N, 1, 28, 28), to the losses of one step of both networks."""
    encoder, decoder = networks["encoder"], networks["decoder"]

    def step(images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        images = common.to_unit(images)
        noise = torch.randn(len(images), args.latent_size, device=device)
        with autocast:
            mu, logvar = encode(encoder, images)
            logits = decoder(reparameterize(mu, logvar, noise)).float()
        reconstruction = reconstruction_loss(logits, images).mean()
        divergence = kl_divergence(mu, logvar).mean()
        # beta weighs the divergence in training alone (Higgins et al. 2017): what is logged is the ELBO.
        common.descend(reconstruction + args.beta * divergence, optimizers["adam"])
        return name_losses("train", reconstruction, divergence)

    return step


def name_losses(split: str, reconstruction: Tensor, divergence: Tensor) -> dict[str, Tensor]:
    """Columns of the log: -ELBO and the two parts of which it is the sum."""
    parts = {f"{split} reconstruction [nats]": reconstruction, f"{split} KL [nats]": divergence}
    return {f"{split} loss [nats]": reconstruction + divergence, **parts}


def train(args: Namespace) -> None:
    device = common.choose_device(args)
    autocast = common.choose_autocast(args, device)
    data = common.load_data(args.dataset, args.data_dir).to(device)  # images uint8 (N, 1, 28, 28)
    test_images, test_labels = common.load_data(args.dataset, args.data_dir, train=False)
    test_images = test_images.to(device)

    common.seed_everything(args.seed)
    networks = {name: common.to_device(network, device, autocast) for name, network in build(args).items()}
    encoder, decoder = networks["encoder"], networks["decoder"]
    optimizers = make_optimizers(args, networks)
    fixed_latents = common.first_latents(args.seed, args.latent_size).to(device)
    if args.resume:
        common.restore(networks, args.checkpoint["networks"])
        common.restore(optimizers, args.checkpoint["optimizers"])

    with common.record(args, data) as run:  # its folder and log; `history` has the epochs of a resumed run
        step = common.capture(make_step(args, device, autocast, networks, optimizers), device)
        for epoch in range(len(run.history) + 1, args.epochs + 1):
            common.seed_everything(args.seed, epoch)  # of (seed, epoch) alone: a resumed run is the unbroken one
            for network in networks.values():
                network.train()  # measuring and drawing leave them in eval mode
            for images, _ in common.batches(data, args.batch_size, device):
                run.log(step(images))
            run.end_epoch(measure(encoder, decoder, test_images))
            run.save_samples(decode(decoder, fixed_latents))
            run.save(networks, optimizers)
        run.save_picture("reconstructions.png", draw_reconstructions(encoder, decoder, test_images[:32]))
        run.save_picture("latent.png", draw_latent_map(encoder, test_images, test_labels))
        pictures = ["reconstructions.png", "latent.png"]
        if args.latent_size == 2:
            run.save_picture("manifold.png", draw_manifold(decoder, device))
            pictures.append("manifold.png")
        run.finish(*pictures)


@torch.no_grad()
def measure(encoder: nn.Module, decoder: nn.Module, images: Tensor) -> dict[str, float]:
    """Losses of test images, uint8 (N, 1, 28, 28), for the log: one latent an image, eval mode, float32."""
    encoder.eval(), decoder.eval()
    parts = []
    for chunk in images.split(500):
        chunk = common.to_unit(chunk)
        mu, logvar = encode(encoder, chunk)
        logits = decoder(reparameterize(mu, logvar, torch.randn_like(mu)))
        parts.append(torch.stack([reconstruction_loss(logits, chunk), kl_divergence(mu, logvar)]))  # (2, n)
    named = name_losses("test", *torch.cat(parts, dim=1).mean(1))
    return {name: loss.item() for name, loss in named.items()}


@torch.no_grad()
def log_weights(encoder: nn.Module, decoder: nn.Module, images: Tensor, samples: int) -> Tensor:
    """log p(x, z) - log q(z | x) for latents z drawn from q: images (N, 1, 28, 28) in [0, 1] to nats (N, samples).

    Their mean is an image's ELBO; the logarithm of their mean exponential is its importance-weighted bound (Burda et
    al. 2015, arXiv 1509.00519, equation 8), never below the ELBO and nearer to log p(x) with more samples.
    """
    mu, logvar = (part.repeat_interleave(samples, dim=0) for part in encode(encoder, images))  # (N * samples, latents)
    noise = torch.randn_like(mu)
    latents = reparameterize(mu, logvar, noise)
    log_prior_to_posterior = (noise.square() + logvar - latents.square()).sum(1) / 2  # log p(z) - log q(z | x)
    log_likelihood = -reconstruction_loss(decoder(latents), images.repeat_interleave(samples, dim=0))
    return (log_likelihood + log_prior_to_posterior).view(-1, samples)


def bounds(encoder: nn.Module, decoder: nn.Module, images: Tensor, samples: int) -> dict[str, float]:
    """Two lower bounds on log p(x) in nats, means over images uint8 (N, 1, 28, 28); decodes about 1,000 at a time."""
    encoder.eval(), decoder.eval()
    progress, found = common.Progress(len(images), "images"), []
    for chunk in images.split(max(1, 1000 // samples)):
        log_w = log_weights(encoder, decoder, common.to_unit(chunk), samples)
        found.append(torch.stack([log_w.mean(1), log_w.logsumexp(1) - math.log(samples)]).cpu())  # (2, n)
        progress.update(sum(part.shape[1] for part in found))
    common.show_line(f"{samples} samples for each of {len(images):,} images")
    elbo, importance_weighted = torch.cat(found, dim=1).mean(1).tolist()
    return {"ELBO [nats]": elbo, "importance-weighted bound [nats]": importance_weighted}


@torch.no_grad()
def decode(decoder: nn.Module, latents: Tensor) -> Tensor:
    """Latents (N, latent_size) to images (N, 1, 28, 28) in [0, 1]: each pixel's expected brightness."""
    return decoder.eval()(latents).sigmoid()


@torch.no_grad()
def draw_reconstructions(encoder: nn.Module, decoder: nn.Module, images: Tensor) -> Image.Image:
    """Rows of eight originals, uint8 (N, 1, 28, 28), each above a row of what is decoded from their mean latents."""
    originals = common.to_unit(images)
    reconstructions = decode(decoder, encode(encoder.eval(), originals)[0])
    rows = [row for pair in zip(originals.split(8), reconstructions.split(8)) for row in pair]
    return common.label_panels([("test images, each above its reconstruction", common.grid(torch.cat(rows).cpu()))])


@torch.no_grad()
def draw_latent_map(encoder: nn.Module, images: Tensor, labels: Tensor) -> Image.Image:
    """Mean latents of images, uint8 (N, 1, 28, 28), as points coloured by class; of more than two latents the first
    two principal components."""
    encoder.eval()
    points = torch.cat([encode(encoder, common.to_unit(chunk))[0].cpu() for chunk in images.split(500)])
    names = ["first latent", "second latent"]
    if points.shape[1] > 2:
        points -= points.mean(0)
        _, deviations, directions = torch.linalg.svd(points, full_matrices=False)
        shares = deviations.square() / deviations.square().sum()
        names = [f"principal component {i + 1}, {shares[i]:.0%} of the variance" for i in range(2)]
        points = points @ directions[:2].T  # (N, 2)
    low, high = points.amin(0), points.amax(0)
    places = 100 + 800 * (points - low) / (high - low).clamp(min=1e-6)  # pixels from the left and from the bottom
    picture = Image.new("RGB", (1120, 1060), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(size=24)
    for (x, y), label in zip(places.tolist(), labels.tolist()):
        pen.circle((x, 1000 - y), 4, common.COLOURS[label])
    pen.rectangle((80, 80, 920, 920), None, "black", 2)
    for axis in (0, 1):
        least, most = low[axis].item(), high[axis].item()
        for value in common.ticks(least, most) if most > least else []:
            place = 100 + 800 * (value - least) / (most - least)
            spot, anchor = ((place, 930), "ma") if axis == 0 else ((70, 1000 - place), "rm")
            pen.text(spot, f"{value:g}", "black", anchor=anchor)
    pen.text((500, 1000), f"to the right: {names[0]}", "black", anchor="ma")
    pen.text((500, 50), f"up: {names[1]}", "black", anchor="mm")
    for label, colour in enumerate(common.COLOURS):
        pen.rectangle((960, 90 + 40 * label, 1000, 100 + 40 * label), colour)
        pen.text((1020, 95 + 40 * label), str(label), "black", anchor="lm")
    return picture


def draw_manifold(decoder: nn.Module, device: torch.device, side: int = 20) -> Image.Image:
    """Images across a two-dimensional latent space in steps of equal probability: first latent right, second up."""
    steps = torch.special.ndtri(torch.linspace(0.05, 0.95, side))  # the inverse of the Gaussian's distribution function
    second, first = torch.meshgrid(steps.flip(0), steps, indexing="ij")
    latents = torch.stack([first.flatten(), second.flatten()], dim=1)  # (side * side, 2)
    picture = common.grid(decode(decoder, latents.to(device)).cpu(), columns=side)
    title = "first latent to the right, second up: each -1.64 to 1.64"
    return common.label_panels([(title, picture)])


def load_sampler(checkpoint: dict, device: torch.device | str = "cpu") -> common.Sampler:
    """What `--sample`, `--evaluate`, compare.py and your own code ask of a run, rebuilt from its checkpoint alone."""
    args = Namespace(**checkpoint["options"])
    networks = build(args)
    common.restore(networks, checkpoint["networks"])
    encoder, decoder = (common.to_device(network, device) for network in networks.values())
    return common.Sampler(
        args.latent_size,
        lambda latents, labels: decode(decoder, latents),
        common.count_parameters(networks),
        evaluate=lambda images, samples=IMPORTANCE_SAMPLES: bounds(encoder, decoder, images.to(device), samples),
    )


def sample(args: Namespace) -> None:
    device = common.choose_device(args)
    common.sample(args, load_sampler(args.checkpoint, device), device)


def evaluate(args: Namespace) -> None:
    """Print the run's two bounds on log p(x) of the test images, in float32 whatever the run was trained in."""
    sampler = load_sampler(args.checkpoint, common.choose_device(args))
    images = common.load_data(args.dataset, args.data_dir, train=False).images
    common.seed_everything(args.seed)
    for name, figure in sampler.evaluate(images).items():
        common.show_line(f"{args.script}: test {name}: {figure:.2f}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.Parser("vae.py", __doc__)
    whole, positive = common.number(int, 1), common.number(float, 1e-9)
    natural = common.number(int, 0)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="guo", help="the report whose numbers are the defaults (guo)")
    names = "MNIST, Fashion-MNIST, or digits drawn in a font, which need no download (mnist)"
    add("--dataset", choices=common.LABELLED, default="mnist", help=names)
    add("--data-dir", metavar="DIR", type=common.absolute_path, default="data", help="folder of the data sets (data)")
    add("--out-dir", metavar="DIR", type=os.path.expanduser, help="folder of the run (runs/SCRIPT-PRESET-DATASET)")
    add(
        "--epochs",
        metavar="N",
        type=whole,
        help="passes over the images (guo 200, banerjee-linear 100, banerjee-conv 100)",
    )
    add("--batch-size", metavar="N", type=whole, help="images a step (guo 128, banerjee-linear 64, banerjee-conv 128)")
    add(
        "--lr", metavar="RATE", type=positive, help="learning rate (guo 1e-4, banerjee-linear 1e-4, banerjee-conv 1e-4)"
    )
    add("--seed", metavar="N", type=natural, default=0, help="of all that is random (0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: an accelerator, if any (auto)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is native (auto)")
    add("--resume", action="store_true", help="go on from the run's checkpoint, or start where there is none")
    add("--sample", metavar="N", type=whole, help="draw N images from the run's checkpoint and end")
    add("--walk", metavar="N", type=whole, help="draw N steps between each two of eight samples, and end")
    add("--to", metavar="PATH", type=os.path.expanduser, help="of --sample, --walk: NAME.png, NAME.gif or a folder")
    add = parser.add_argument_group("VAE").add_argument
    add("--beta", metavar="WEIGHT", type=common.number(float, 0), help="weight of the KL in training (1)")
    add("--evaluate", action="store_true", help="print the run's test ELBO and importance-weighted bound, in nats")
    return common.parse(parser, PRESETS, argv)


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors("vae.py"):
        args = parse_args(argv)
        if args.evaluate:
            evaluate(args)
        elif args.sample is None and args.walk is None:
            train(args)
        else:
            sample(args)


if __name__ == "__main__":
    main()
