"""DCGAN: the adversarial pair of gan.py as convolutional networks, for digits and for faces.

    python dcgan.py                                 # MNIST, the first report's numbers: 100 epochs
    python dcgan.py --dataset anime                 # the images in data/anime at 64x64: 50 epochs
    python dcgan.py --dataset path/to/images        # any folder of images, flat or nested
    python dcgan.py --preset banerjee               # the second report's network
    python dcgan.py --dataset digits --epochs 10    # nothing to download, a minute or two
    python dcgan.py --sample 64 --to grid.png       # draw from the trained run

Strided convolutions shrink an image to one logit. Transposed ones grow a latent to an image. Batch norm in both keeps
the game balanced; there is no pooling and no fully connected layer (Radford et al. 2015, arXiv 1511.06434). The first
report's text states these rules. The second report's networks have a linear layer at one end and no batch norm. Where
the reports are silent we use Gaussian latents, Adam's beta1 of 0.5 (Radford et al., section 4), and one batch of
generated images a step, which serves both players.

assets/study.md tells how the digits' networks were chosen and what --augment and --ema do. For faces use --ema 0.999:
Frechet distance 4.2 instead of 19.7 after the 50 epochs (16,036 faces, one seed, 116 minutes on 2 cores of an AMD EPYC,
Zen 4, torch 2.14.1, bfloat16).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import copy
import os
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common  # common.py, which lies beside this file

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


MAPS = {  # of an image's side: the sides of the feature maps, smallest first, and their channels over `features`
    28: ((4, 7, 14), (4, 2, 1)),
    32: ((4, 8, 16), (4, 2, 1)),
    64: ((4, 8, 16, 32), (8, 4, 2, 1)),
    128: ((4, 8, 16, 32, 64), (16, 8, 4, 2, 1)),
}


class Generator(nn.Sequential):
    """Latents (N, latent_size) to images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, latent_size: int, image_size: int, channels: int, features: int):
        sides, widths = MAPS[image_size]
        widths = [features * width for width in widths]
        layers = [nn.Unflatten(1, (latent_size, 1, 1))]
        layers += [nn.ConvTranspose2d(latent_size, widths[0], sides[0], bias=False)]  # (N, width, side, side)
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        for i in range(1, len(sides)):
            kernel = 4 if sides[i] == 2 * sides[i - 1] else 3  # 3: from 4 to 7
            layers += [nn.ConvTranspose2d(widths[i - 1], widths[i], kernel, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(widths[i]), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1), nn.Tanh())


class Discriminator(nn.Sequential):
    """Images (N, channels, image_size, image_size) in [-1, 1] to logits (N,) of being real.

    Of digits it sees more: kernels of 5, as in Radford et al.'s code, and a layer of 128 features of the whole image
    before the logit. With kernels of 4 and no such layer a digit's shape counts only as the sum of its sixteen parts.
    """

    def __init__(self, image_size: int, channels: int, features: int):
        sides, widths = (part[::-1] for part in MAPS[image_size])
        widths = [channels, *(features * width for width in widths)]
        kernel, padding = (5, 2) if image_size == 28 else (4, 1)
        layers = []
        for i in range(len(sides)):
            layers += [nn.Conv2d(widths[i], widths[i + 1], kernel, stride=2, padding=padding, bias=i == 0)]
            layers += [nn.BatchNorm2d(widths[i + 1])] if i > 0 else []
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        if image_size == 28:
            layers += [nn.Conv2d(widths[-1], 128, sides[-1]), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(128, 1, 1)]
        else:
            layers += [nn.Conv2d(widths[-1], 1, sides[-1])]
        super().__init__(*layers, nn.Flatten(0))  # (N, 1, 1, 1), then (N,)


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


def build(args: Namespace) -> dict[str, nn.Module]:
    if args.preset == "banerjee":
        networks = dict(generator=BanerjeeGenerator(args.latent_size), discriminator=BanerjeeDiscriminator())
    else:
        channels = 1 if args.dataset in common.LABELLED else 3
        networks = dict(
            generator=Generator(args.latent_size, args.image_size, channels, args.features).apply(initialise),
            discriminator=Discriminator(args.image_size, channels, args.features).apply(initialise),
        )
    return networks


def update_average(average: nn.Module, generator: nn.Module, steps: int, decay: float) -> None:
    """Move the average of a generator's weights and batch statistics towards their values after so many steps.

    First fast, so that the initial weights are soon forgotten, later at 1 - decay a step. Waits for no device.
    """
    states = (network.state_dict().values() for network in (average, generator))
    means, values = ([tensor for tensor in state if tensor.is_floating_point()] for state in states)
    torch._foreach_lerp_(means, values, max(10 / (9 + steps), 1 - decay))


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
    colour, place, hole = torch.rand(count, 7, 1, 1, 1, device=images.device).split([3, 2, 2], dim=1)
    brightness, saturation, contrast = colour.unbind(1)  # each (N, 1, 1, 1)
    images = images + brightness - 0.5
    images = images.mean(1, keepdim=True).lerp(images, 2 * saturation)
    images = images.mean((1, 2, 3), keepdim=True).lerp(images, contrast + 0.5)

    places, reach = torch.arange(size, device=images.device), size // 8
    down, across = (place * (2 * reach + 1)).floor().sub(reach).view(count, 2, 1, 1).unbind(1)  # each (N, 1, 1)
    # A shift by products with 0-1 matrices (N, 1, H, H): row i of the result is row i - down, or zeros outside.
    rows, columns = ((places[:, None] - places == shift)[:, None].to(images.dtype) for shift in (down, across))
    images = rows @ images @ columns.transpose(2, 3)

    top, left = (hole * size).floor().sub(size // 4).view(count, 2, 1).unbind(1)  # each (N, 1)
    rows, columns = ((places >= start) & (places < start + size // 2) for start in (top, left))  # each (N, size)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


def make_optimizers(args: Namespace, networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    players = ("generator", "discriminator")
    return {name: common.adam(networks[name].parameters(), args.lr, args.beta1) for name in players}


def make_step(args: Namespace, device: torch.device, autocast: torch.autocast, networks: dict, optimizers: dict):
    """A function from a batch, uint8 (N, C, H, W), to the losses of one step of both players."""
    generator, discriminator = networks["generator"], networks["discriminator"]
    augment = diff_augment if args.augment == "full" else lambda images: images
    mirror = args.augment == "flip" or (args.augment == "full" and args.dataset not in common.LABELLED)

    def step(images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if mirror:
            images = flip(images)
        real_images = common.to_symmetric(images)
        latents = torch.randn(len(images), args.latent_size, device=device)
        with autocast:
            fake_images = generator(latents)
            # One batch each: batch norm must not mix the statistics of real and generated images.
            real_logits = discriminator(augment(real_images)).float()
            fake_logits = discriminator(augment(fake_images.detach())).float()
        loss_of_discriminator = discriminator_loss(real_logits, fake_logits)
        # The discriminator's mean probability of "real", for real and for generated images.
        probabilities = {
            "D(x)": real_logits.detach().sigmoid().mean(),
            "D(G(z))": fake_logits.detach().sigmoid().mean(),
        }
        common.descend(loss_of_discriminator, optimizers["discriminator"])  # gradients and Adam, for this player alone

        with autocast:
            fake_logits = discriminator(augment(fake_images)).float()
        loss_of_generator = generator_loss(fake_logits)
        common.descend(loss_of_generator, optimizers["generator"])
        losses = {"discriminator loss [nats]": loss_of_discriminator, "generator loss [nats]": loss_of_generator}
        return losses | probabilities

    return step


def train(args: Namespace) -> None:
    device = common.choose_device(args)
    autocast = common.choose_autocast(args, device)
    data = common.load_data(args.dataset, args.data_dir, size=args.image_size).to(device)  # images uint8 (N, C, H, W)

    common.seed_everything(args.seed)
    networks = {name: common.to_device(network, device, autocast) for name, network in build(args).items()}
    optimizers = make_optimizers(args, networks)
    fixed_latents = common.first_latents(args.seed, args.latent_size).to(device)
    if args.init and args.checkpoint is None:
        common.restore(networks, common.load_checkpoint(args.init, "dcgan")["networks"])
    if args.ema:
        networks["average"] = copy.deepcopy(networks["generator"])
    if args.resume:
        common.restore(networks, args.checkpoint["networks"])
        common.restore(optimizers, args.checkpoint["optimizers"])

    with common.record(args, data) as run:  # its folder and log; `history` has the epochs of a resumed run
        step = common.capture(make_step(args, device, autocast, networks, optimizers), device)
        for epoch in range(len(run.history) + 1, args.epochs + 1):
            common.seed_everything(args.seed, epoch)  # of (seed, epoch) alone: a resumed run is the unbroken one
            for network in networks.values():
                network.train()  # drawing samples leaves the generator in eval mode
            done = (epoch - 1) * run.steps
            for i, (images, _) in enumerate(common.batches(data, args.batch_size, device), start=1):
                run.log(step(images))
                if args.ema:
                    update_average(networks["average"], networks["generator"], done + i, args.ema)
            run.end_epoch()
            run.save_samples(generate(networks.get("average", networks["generator"]), fixed_latents))
            run.save(networks, optimizers)
        run.finish()


@torch.no_grad()
def generate(generator: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, latent_size) to images (N, C, H, W) in [0, 1].

    In eval mode, so that an image does not depend on the others of its batch.
    """
    return common.symmetric_to_unit(generator.eval()(latents))


def load_sampler(checkpoint: dict, device: torch.device | str = "cpu") -> common.Sampler:
    """What `--sample`, compare.py and your own code draw from: a run, rebuilt from its checkpoint alone."""
    args = Namespace(**checkpoint["options"])
    networks = build(args)
    parameters, generator = common.count_parameters(networks), networks["generator"]
    common.restore({"average" if args.ema else "generator": generator}, checkpoint["networks"])
    common.to_device(generator, device)
    return common.Sampler(args.latent_size, lambda latents, labels: generate(generator, latents), parameters)


def sample(args: Namespace) -> None:
    device = common.choose_device(args)
    common.sample(args, load_sampler(args.checkpoint, device), device)


def name_or_folder(dataset: str) -> str:
    return dataset if dataset in (*common.LABELLED, "anime") else common.absolute_path(dataset)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.Parser("dcgan.py", __doc__)
    whole, positive = common.number(int, 1), common.number(float, 1e-9)
    natural = common.number(int, 0)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="guo", help="the report whose numbers are the defaults (guo)")
    names = f"{', '.join(common.LABELLED)}, anime (DATA_DIR/anime) or a folder of images (mnist)"
    add("--dataset", metavar="NAME", type=name_or_folder, default="mnist", help=names)
    add("--data-dir", metavar="DIR", type=common.absolute_path, default="data", help="folder of the data sets (data)")
    add("--out-dir", metavar="DIR", type=os.path.expanduser, help="folder of the run (runs/SCRIPT-PRESET-DATASET)")
    add("--epochs", metavar="N", type=whole, help="passes over the images (guo 100, folders 50, banerjee 100)")
    add("--batch-size", metavar="N", type=whole, help="images a step (guo 128, banerjee 128)")
    add("--lr", metavar="RATE", type=positive, help="learning rate (guo 3e-4, folders 2e-4, banerjee 2e-4)")
    add("--seed", metavar="N", type=natural, default=0, help="of all that is random (0, folders 999)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: an accelerator, if any (auto)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is native (auto)")
    add("--resume", action="store_true", help="go on from the run's checkpoint, or start where there is none")
    add("--sample", metavar="N", type=whole, help="draw N images from the run's checkpoint and end")
    add("--walk", metavar="N", type=whole, help="draw N steps between each two of eight samples, and end")
    add("--to", metavar="PATH", type=os.path.expanduser, help="of --sample, --walk: NAME.png, NAME.gif or a folder")
    add = parser.add_argument_group("DCGAN").add_argument
    add("--image-size", type=int, choices=[32, 64, 128], help="side of a folder's images in pixels (folders 64)")
    augment = "flip mirrors half; full varies colour, place and cutout, and mirrors all but digits (none, folders flip)"
    add("--augment", choices=["none", "flip", "full"], help=augment)
    start = "start from the networks of another run's folder, to go on with other images"
    add("--init", metavar="RUN", type=os.path.expanduser, help=start)
    average = "draw from the generator's moving average, of this decay a step, such as 0.999 (0: off)"
    add("--ema", metavar="DECAY", type=common.number(float, 0, 0.99999), help=average)
    args = common.parse(parser, PRESETS, argv)
    if args.dataset in common.LABELLED and args.image_size != 28:
        parser.error(f"--image-size is for folders of images: {args.dataset} is 28x28")
    if args.dataset not in common.LABELLED and args.preset == "banerjee":
        parser.error("--preset banerjee is a network for 28x28 images: folders of images take --preset guo")
    if args.dataset not in common.LABELLED:
        images, out_dir = Path(args.data_dir, args.dataset).resolve(), Path(args.out_dir).resolve()
        if images.is_relative_to(out_dir) or out_dir.is_relative_to(images):
            parser.error(f"--out-dir {args.out_dir} and the images' folder {images} overlap: name another one")
    return args


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors("dcgan.py"):
        args = parse_args(argv)
        if args.sample is None and args.walk is None:
            train(args)
        else:
            sample(args)


if __name__ == "__main__":
    main()
