"""GAN: a generator and a discriminator of linear layers that learn from each other.

    python gan.py                                   # MNIST, the first report's (Guo's) numbers: 200 epochs
    python gan.py --preset banerjee                 # the second report's (Banerjee's): 100 epochs
    python gan.py --sample 64 --to grid.png         # draw from the run of the first command

The generator turns Gaussian noise into an image. The discriminator tells real images from generated ones. Each is
trained against the other (Goodfellow et al. 2014, arXiv 1406.2661). Networks and numbers are the reports'. Where the
reports are silent we use Gaussian latents, the paper's non-saturating generator loss, and one batch of generated
images a step, which serves both players.

The 200 epochs take about 18 minutes on one core of an AMD EPYC (Zen 3, torch 2.14.1, float32: 10,900 images a second).
They give all ten digits, speckled. compare.py: Frechet distance 12.8 (0 is perfect), precision 0.78, recall 0.70 (1 is
perfect).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import os
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import nn

import common  # common.py, which lies beside this file

PRESETS = {
    "guo": dict(
        epochs=200, batch_size=100, lr=2e-4,
        latent_size=64, generator_sizes=(256, 256), generator_slope=0.0, discriminator_sizes=(256, 256), dropout=0.0,
    ),
    "banerjee": dict(
        epochs=100, batch_size=128, lr=2e-4,
        latent_size=100, generator_sizes=(128, 256, 512), generator_slope=0.2,
        discriminator_sizes=(512, 256, 128), dropout=0.4,
    ),
}  # fmt: skip


class Generator(nn.Sequential):
    """Latents (N, latent_size) to images (N, 1, 28, 28) in [-1, 1]. A LeakyReLU of slope 0 is a ReLU."""

    def __init__(self, latent_size: int, sizes: tuple[int, ...], slope: float):
        layers = []
        for inputs, outputs in zip((latent_size, *sizes), sizes):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(slope)]
        super().__init__(*layers, nn.Linear(sizes[-1], 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class Dropout(nn.Dropout):
    """nn.Dropout by uniform draws: four times as fast on a CPU as its Bernoulli draws."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return values
        kept = torch.rand(values.shape, device=values.device) >= self.p
        return values * kept.to(values.dtype).div_(1 - self.p)


class Discriminator(nn.Sequential):
    """Images (N, 1, 28, 28) in [-1, 1] to logits (N,) of being real."""

    def __init__(self, sizes: tuple[int, ...], dropout: float):
        layers = [nn.Flatten()]
        for inputs, outputs in zip((784, *sizes), sizes):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
            layers += [Dropout(dropout)] if dropout else []
        super().__init__(*layers, nn.Linear(sizes[-1], 1), nn.Flatten(0))


def build(args: Namespace) -> dict[str, nn.Module]:
    return dict(
        generator=Generator(args.latent_size, args.generator_sizes, args.generator_slope),
        discriminator=Discriminator(args.discriminator_sizes, args.dropout),
    )


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(x) - log(1 - D(G(z))), batch mean, in nats (Goodfellow et al., eq. 1): 2 log 2 when it can't tell."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(G(z)), mean over the batch, in nats: the non-saturating loss (Goodfellow et al., section 3)."""
    return F.softplus(-fake_logits).mean()


def make_optimizers(args: Namespace, networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    return {name: common.adam(network.parameters(), args.lr) for name, network in networks.items()}


def make_step(args: Namespace, device: torch.device, autocast: torch.autocast, networks: dict, optimizers: dict):
    """A function from a batch, uint8 (N, 1, 28, 28), to the losses of one step of both players."""
    generator, discriminator = networks["generator"], networks["discriminator"]

    def step(images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        real_images = common.to_symmetric(images)
        latents = torch.randn(len(images), args.latent_size, device=device)
        with autocast:
            fake_images = generator(latents)
            both = torch.cat([real_images, fake_images.detach()])  # one pass: no batch norm would mix the halves
            real_logits, fake_logits = discriminator(both).float().chunk(2)
        loss_of_discriminator = discriminator_loss(real_logits, fake_logits)
        # The discriminator's mean probability of "real", for real and for generated images.
        probabilities = {
            "D(x)": real_logits.detach().sigmoid().mean(),
            "D(G(z))": fake_logits.detach().sigmoid().mean(),
        }
        common.descend(loss_of_discriminator, optimizers["discriminator"])  # gradients and Adam, for this player alone

        with autocast:
            fake_logits = discriminator(fake_images).float()
        loss_of_generator = generator_loss(fake_logits)
        common.descend(loss_of_generator, optimizers["generator"])
        losses = {"discriminator loss [nats]": loss_of_discriminator, "generator loss [nats]": loss_of_generator}
        return losses | probabilities

    return step


def train(args: Namespace) -> None:
    device = common.choose_device(args)
    autocast = common.choose_autocast(args, device)
    data = common.load_data(args.dataset, args.data_dir).to(device)  # images uint8 (N, 1, 28, 28)

    common.seed_everything(args.seed)
    networks = {name: common.to_device(network, device, autocast) for name, network in build(args).items()}
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
                network.train()  # drawing samples leaves the generator in eval mode
            for images, _ in common.batches(data, args.batch_size, device):
                run.log(step(images))
            run.end_epoch()
            run.save_samples(generate(networks["generator"], fixed_latents))
            run.save(networks, optimizers)
        run.finish()


@torch.no_grad()
def generate(generator: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, latent_size) to images (N, 1, 28, 28) in [0, 1]."""
    return common.symmetric_to_unit(generator.eval()(latents))


def load_sampler(checkpoint: dict, device: torch.device | str = "cpu") -> common.Sampler:
    """What `--sample`, compare.py and your own code draw from: a run, rebuilt from its checkpoint alone."""
    args = Namespace(**checkpoint["options"])
    networks = build(args)
    generator = networks["generator"]
    common.restore({"generator": generator}, checkpoint["networks"])
    common.to_device(generator, device)
    parameters = common.count_parameters(networks)
    return common.Sampler(args.latent_size, lambda latents, labels: generate(generator, latents), parameters)


def sample(args: Namespace) -> None:
    device = common.choose_device(args)
    common.sample(args, load_sampler(args.checkpoint, device), device)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.Parser("gan.py", __doc__)
    whole, positive = common.number(int, 1), common.number(float, 1e-9)
    natural = common.number(int, 0)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="guo", help="the report whose numbers are the defaults (guo)")
    names = "MNIST, Fashion-MNIST, or digits drawn in a font, which need no download (mnist)"
    add("--dataset", choices=common.LABELLED, default="mnist", help=names)
    add("--data-dir", metavar="DIR", type=common.absolute_path, default="data", help="folder of the data sets (data)")
    add("--out-dir", metavar="DIR", type=os.path.expanduser, help="folder of the run (runs/SCRIPT-PRESET-DATASET)")
    add("--epochs", metavar="N", type=whole, help="passes over the images (guo 200, banerjee 100)")
    add("--batch-size", metavar="N", type=whole, help="images a step (guo 100, banerjee 128)")
    add("--lr", metavar="RATE", type=positive, help="learning rate (guo 2e-4, banerjee 2e-4)")
    add("--seed", metavar="N", type=natural, default=0, help="of all that is random (0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: an accelerator, if any (auto)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is native (auto)")
    add("--resume", action="store_true", help="go on from the run's checkpoint, or start where there is none")
    add("--sample", metavar="N", type=whole, help="draw N images from the run's checkpoint and end")
    add("--walk", metavar="N", type=whole, help="draw N steps between each two of eight samples, and end")
    add("--to", metavar="PATH", type=os.path.expanduser, help="of --sample, --walk: NAME.png, NAME.gif or a folder")
    return common.parse(parser, PRESETS, argv)


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors("gan.py"):
        args = parse_args(argv)
        if args.sample is None and args.walk is None:
            train(args)
        else:
            sample(args)


if __name__ == "__main__":
    main()
