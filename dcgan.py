"""DCGAN: the adversarial pair of gan.py as convolutional networks, for digits and for faces.

    python dcgan.py                                 # MNIST, the first report's numbers: 100 epochs
    python dcgan.py --dataset anime                 # the images in data/anime at 64x64: 50 epochs
    python dcgan.py --dataset path/to/images        # any folder of images, flat or nested
    python dcgan.py --preset banerjee               # the second report's network
    python dcgan.py --dataset digits --epochs 10    # nothing to download, a minute or two
    python dcgan.py --sample 64 --to grid.png       # draw from the trained run

Strided convolutions shrink an image to one logit, transposed ones grow a latent to an image, and batch norm in both
keeps the game balanced: no pooling, no fully connected layer (Radford et al. 2015, arXiv 1511.06434). The network for
28x28 images follows these rules, which the first report states; the second report's has a linear layer at each end and
no batch norm. What the reports leave open: Gaussian latents, Adam's beta1 of 0.5 (Radford et al., section 4), and one
batch of generated images a step that serves both players.

On 2 cores (AMD EPYC, Zen 4, bfloat16) an epoch takes 15 seconds on MNIST and two minutes on 16,036 faces. compare.py's
Frechet distance after the reports' epochs: 7.5 on MNIST (all ten digits), 19.7 on the faces, 4.2 with --ema 0.999.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import copy
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import nn

import common

PRESETS = {
    "guo": dict(
        epochs=100, batch_size=128, lr=3e-4, beta1=0.5,
        latent_size=100, image_size=28, features=32, augment="none", ema=0.0,
        folder=dict(epochs=50, lr=2e-4, image_size=64, features=64, augment="flip", seed=999),
    ),
    "banerjee": dict(
        epochs=100, batch_size=128, lr=2e-4, beta1=0.5,
        latent_size=100, image_size=28, features=32, augment="none", ema=0.0,
    ),
}  # fmt: skip


def widths(image_size: int, features: int) -> tuple[int, list[int]]:
    """The side of the smallest feature maps, and the channels of all maps from the largest to the smallest."""
    smallest = 7 if image_size == 28 else 4
    halvings = (image_size // smallest).bit_length() - 1
    return smallest, [features << i for i in range(halvings)]


class Generator(nn.Sequential):
    """Latents (N, latent_size) to images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, latent_size: int, image_size: int, channels: int, features: int):
        smallest, (*outer, width) = widths(image_size, features)
        layers = [nn.Unflatten(1, (latent_size, 1, 1))]
        layers += [nn.ConvTranspose2d(latent_size, width, smallest, bias=False)]  # (N, width, smallest, smallest)
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        for narrower in reversed(outer):
            layers += [nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1, bias=False)]  # twice the side
            layers += [nn.BatchNorm2d(narrower), nn.ReLU(inplace=True)]
            width = narrower
        super().__init__(*layers, nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1), nn.Tanh())


class Discriminator(nn.Sequential):
    """Images (N, channels, image_size, image_size) in [-1, 1] to logits (N,) of being real."""

    def __init__(self, image_size: int, channels: int, features: int):
        smallest, (width, *inner) = widths(image_size, features)
        layers = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for wider in inner:
            layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1, bias=False)]  # half the side
            layers += [nn.BatchNorm2d(wider), nn.LeakyReLU(0.2, inplace=True)]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, smallest), nn.Flatten(0))  # (N, 1, 1, 1), then (N,)


def initialise(layer: nn.Module) -> None:
    """Weights from N(0, 0.02) (Radford et al., section 4); those of batch norm around 1, as in the authors' code."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1, 0.02)


class BanerjeeGenerator(nn.Sequential):
    """Latents (N, latent_size) to images (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_size: int):
        super().__init__(
            nn.Linear(latent_size, 12544), nn.Unflatten(1, (256, 7, 7)),
            nn.ConvTranspose2d(256, 128, 3, stride=2, padding=1, output_padding=1), nn.ReLU(inplace=True),  # 14x14
            nn.ConvTranspose2d(128, 64, 3, padding=1), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(64, 32, 3, padding=1), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1), nn.Tanh(),  # 28x28
        )  # fmt: skip


class BanerjeeDiscriminator(nn.Sequential):
    """Images (N, 1, 28, 28) in [-1, 1] to logits (N,) of being real."""

    def __init__(self):
        layers = []
        for inputs, outputs, stride in ((1, 32, 2), (32, 64, 1), (64, 128, 1), (128, 256, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1)]
            layers += [nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(0.25)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(256 * 7 * 7, 1), nn.Flatten(0))


class Average(nn.Module):
    """A generator whose weights and batch statistics are the exponential moving average of another's."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = copy.deepcopy(generator)
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.generator(latents)

    @torch.no_grad()
    def update(self, generator: nn.Module, decay: float) -> None:
        """One step of the average; the first steps weigh more, so that the initial weights are soon forgotten."""
        weight = (10 / (10 + self.updates)).clamp(min=1 - decay)
        for mean, value in zip(self.generator.state_dict().values(), generator.state_dict().values()):
            mean.lerp_(value, weight) if mean.is_floating_point() else mean.copy_(value)
        self.updates += 1


def build(args: Namespace) -> dict[str, nn.Module]:
    if args.preset == "banerjee":
        networks = dict(generator=BanerjeeGenerator(args.latent_size), discriminator=BanerjeeDiscriminator())
    else:
        channels = 1 if args.dataset in common.LABELLED else 3
        networks = dict(
            generator=Generator(args.latent_size, args.image_size, channels, args.features).apply(initialise),
            discriminator=Discriminator(args.image_size, channels, args.features).apply(initialise),
        )
    for network in networks.values():
        network.to(memory_format=torch.channels_last)  # how the fast convolutions of CPUs and GPUs read images
    if args.ema:
        networks["average"] = Average(networks["generator"])
    return networks


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(x) - log(1 - D(G(z))), batch mean in nats (Goodfellow et al., eq. 1): 2 log 2 when it can't tell."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(G(z)), mean over the batch, in nats: the non-saturating loss (Goodfellow et al., section 3)."""
    return F.softplus(-fake_logits).mean()


def flip(images: torch.Tensor) -> torch.Tensor:
    """Half of the images (N, C, H, W), drawn at random, mirrored left to right."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def diff_augment(images: torch.Tensor) -> torch.Tensor:
    """Random colour, translation and cutout of images (N, C, H, W) in [-1, 1], through which gradients flow.

    The discriminator sees real and generated images through it alike: it can't learn a small data set by heart, and the
    generator does not learn to draw the distortions (Zhao et al. 2020, arXiv 2006.10738).
    """
    count, _, size, _ = images.shape
    brightness, saturation, contrast = torch.rand(3, count, 1, 1, 1, device=images.device)
    images = images + brightness - 0.5
    images = images.mean(1, keepdim=True).lerp(images, 2 * saturation)
    images = images.mean((1, 2, 3), keepdim=True).lerp(images, contrast + 0.5)

    places, reach = torch.arange(size, device=images.device), size // 8
    down, across = torch.randint(-reach, reach + 1, (2, count, 1, 1), device=images.device)
    # Row i of the result is row i - down: products with 0-1 matrices (N, 1, H, H) leave zeros where nothing moves in.
    rows, columns = ((places[:, None] - places == shift)[:, None].to(images.dtype) for shift in (down, across))
    images = rows @ images @ columns.transpose(2, 3)

    starts = torch.randint(-(size // 4), size - size // 4, (2, count, 1), device=images.device)
    rows, columns = (places >= starts) & (places < starts + size // 2)  # each (N, size)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def make_optimizers(args: Namespace, networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    players = ("generator", "discriminator")
    return {name: common.adam(networks[name].parameters(), args.lr, args.beta1) for name in players}


def make_step(args: Namespace, compute: common.Compute, networks: dict, optimizers: dict):
    """A function from a batch, uint8 (N, C, H, W), to the losses of one step of both players."""
    generator, discriminator = networks["generator"], networks["discriminator"]
    augment = diff_augment if args.augment == "full" else lambda images: images

    def step(images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if args.augment != "none":
            images = flip(images)
        real_images = common.to_symmetric(images)
        latents = common.randn(len(images), args.latent_size, device=compute.device)
        with compute.autocast():
            fake_images = generator(latents)
            # One batch each: batch norm must not mix the statistics of real and generated images.
            real_logits = discriminator(augment(real_images)).float()
            fake_logits = discriminator(augment(fake_images.detach())).float()
        loss_of_discriminator = discriminator_loss(real_logits, fake_logits)
        common.descend(loss_of_discriminator, optimizers["discriminator"])

        with compute.autocast():
            fake_logits = discriminator(augment(fake_images)).float()
        loss_of_generator = generator_loss(fake_logits)
        common.descend(loss_of_generator, optimizers["generator"])
        if args.ema:
            networks["average"].update(generator, args.ema)
        return {"discriminator loss [nats]": loss_of_discriminator, "generator loss [nats]": loss_of_generator}

    return step


def train(args: Namespace) -> None:
    compute = common.choose_compute(args)
    data = common.load_data(args.dataset, args.data_dir, size=args.image_size)
    common.seed_everything(args.seed)
    networks = {name: common.distribute(network.to(compute.device)) for name, network in build(args).items()}
    optimizers = make_optimizers(args, networks)
    fixed_latents = torch.randn(64, args.latent_size).to(compute.device)

    run = common.Run(args, compute, data, networks, optimizers)
    step = run.capture(make_step(args, compute, networks, optimizers))
    for _ in run.epochs():
        for images, labels in run.batches():
            run.record(step(images, labels))
        run.save_samples(generate(networks, fixed_latents))
    run.finish()


@torch.no_grad()
def generate(networks: dict[str, nn.Module], latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, latent_size) to images (N, C, H, W) in [0, 1], from the averaged generator where there is one.

    In eval mode, so that an image does not depend on the others of its batch.
    """
    generator = networks.get("average", networks["generator"])
    return common.symmetric_to_unit(generator.eval()(latents))


def load_sampler(checkpoint: dict, device: torch.device) -> common.Sampler:
    """What `--sample` and compare.py draw from: a trained run, rebuilt from its checkpoint alone."""
    args = Namespace(**checkpoint["options"])
    networks = common.restore_networks(build(args), checkpoint, device)
    players = (networks["generator"], networks["discriminator"])
    parameters = sum(parameter.numel() for network in players for parameter in network.parameters())
    return common.Sampler(args.latent_size, lambda latents, labels=None: generate(networks, latents), parameters)


def sample(args: Namespace) -> None:
    common.sample(args, load_sampler)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.make_parser("dcgan", __doc__, PRESETS, (*common.LABELLED, "anime", "folder"))
    group = parser.add_argument_group("DCGAN")
    group.add_argument("--image-size", type=int, choices=[32, 64, 128], help="side of a folder's images in pixels (64)")
    group.add_argument(
        "--augment", choices=["none", "flip", "full"],
        help="flip mirrors half of the images (folders); full also varies colour, place and cutout (digits: none)",
    )  # fmt: skip
    group.add_argument(
        "--ema", type=common.number(float, 0, 0.99999), metavar="DECAY",
        help="draw from the generator's moving average of this decay a step, such as 0.999 (0: off)",
    )  # fmt: skip
    args = common.parse(parser, PRESETS, argv)
    if args.dataset in common.LABELLED and "image_size" in args.given:
        parser.error(f"--image-size is for folders of images: {args.dataset} is 28x28")
    if args.dataset not in common.LABELLED and args.preset == "banerjee":
        parser.error("--preset banerjee is a network for 28x28 images: folders of images take --preset guo")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    common.run_command(train if args.sample is None else sample, args)


if __name__ == "__main__":
    main()
