"""CVAE-GAN: encoder, generator, discriminator and classifier that together draw any class in any style.

    python cvaegan.py                               # MNIST, the report's numbers: 200 epochs
    python cvaegan.py --weights paper               # the paper's loss weights, made for faces of 128x128
    python cvaegan.py --dataset digits              # nothing to download
    python cvaegan.py --sample 1000 --to folder     # the classes in turn, a sub-folder each
    python cvaegan.py --sample 64 --label 7         # sevens

The algorithm is that of Bao et al. 2017 (arXiv 1703.10155). x_r is a real image of class c; x_f = G(E(x_r, c), c)
its reconstruction; x_p = G(z_p, c), z_p ~ N(0, I), a sample of the prior. f_D and f_C are the inputs of the last
layer of discriminator D and classifier C. Losses are sums over dimensions and means over the batch.

    loss                                                   trains       weight: paper    ours
    L_D    -log D(x_r) - log(1 - D(x_f)) - log(1 - D(x_p)) D                    1        1
    L_C    -log P(c | x_r)                                 C                    1        1
    L_KL   KL(q(z | x_r, c) || N(0, I))                    E                    3        1
    L_G    1/2 (|x_r - x_f|^2 + |f_D(x_r) - f_D(x_f)|^2
                + |f_C(x_r) - f_C(x_f)|^2)                 E and G              1        1
    L_GD   1/2 |mean f_D(x_r) - mean f_D(x_p)|^2           G                    1e-3     1e-3
    L_GC   1/2 sum_c |mean_c f_C(x_r) - mean_c f_C(x_p)|^2 G                    1e-3     1e-3
    L'_GD  -log D(x_p)                                     G                    0        1
    L'_GC  -log P(c | x_p)                                 G                    0        5

D and C minimise cross entropy; nothing that E and G minimise moves them: the paper's asymmetric training. The paper's
weights balance the 49,152 numbers of a face, ours the 784 of a digit. assets/study.md tells what each change does.
After 200 epochs of MNIST 99.6 % of the samples show the asked class (one seed, 178 minutes on one core of an AMD EPYC,
Zen 3, torch 2.14.1, float32).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common  # common.py, which lies beside this file

CLASSES = 10
FEATURES = 128  # inputs of the last layer of the discriminator and of the classifier
WEIGHTS = {
    "paper": dict(kl=3.0, mean=1e-3, class_mean=1e-3, adversarial=0.0, label=0.0),
    "ours": dict(kl=1.0, mean=1e-3, class_mean=1e-3, adversarial=1.0, label=5.0),
}
PRESETS = {
    "guo": dict(
        epochs=200, batch_size=128, lr=1e-4, seed=88, latent_size=100,
        weights="ours", loss_weights=WEIGHTS["ours"],
    )
}  # fmt: skip
DECAY = 0.9  # of the moving averages in L_GC: a batch holds about 13 images of a class, the averages about 130


class Encoder(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] and their classes (N, 10) to mean and log variance of q(z | x, c)."""

    def __init__(self, latent_size: int):
        super().__init__()
        self.layers = linear_layers(784 + CLASSES, 512, 256)
        self.last = nn.Linear(256, 2 * latent_size)

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([images.flatten(1), 5 * classes], dim=1)  # (N, 794); scaled up to count among 784 pixels
        mu, logvar = self.last(self.layers(inputs)).float().chunk(2, dim=1)
        return mu, logvar  # each (N, latent_size)


class Generator(nn.Module):
    """Latents (N, latent_size) and classes (N, 10), one-hot or mixed, to images (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_size + CLASSES, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 32 * 7 * 7), nn.Unflatten(1, (32, 7, 7)), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),  # (N, 16, 14, 14)
            nn.ConvTranspose2d(16, 1, 4, 2, padding=1), nn.Tanh(),  # (N, 1, 28, 28)
        )  # fmt: skip

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        # The length of the latents is about 10: a class of length 1 would be lost among them for many epochs.
        return self.layers(torch.cat([latents, 10 * classes], dim=1)).float()


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] to the last layer's inputs (N, 128) and logits (N, 1) of being real."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, padding=1), nn.LeakyReLU(0.2),  # (N, 16, 14, 14)
            nn.Conv2d(16, 32, 4, 2, padding=1), nn.LeakyReLU(0.2),  # (N, 32, 7, 7)
            nn.Flatten(), nn.Linear(32 * 7 * 7, FEATURES), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.last = nn.Linear(FEATURES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images)
        return features.float(), self.last(features).float()


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] to the last layer's inputs (N, 128) and logits (N, 10) of the classes."""

    def __init__(self):
        super().__init__()
        self.layers = linear_layers(784, 512, 256, FEATURES)
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images.flatten(1))
        return features.float(), self.last(features).float()


def linear_layers(*sizes: int) -> nn.Sequential:
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class ClassMeans(nn.Module):
    """Moving averages of the mean features of every class, of real and of generated images: each (10, 128).

    Both start at zero, so that the two are equally far from their true values at any time.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("real", torch.zeros(CLASSES, FEATURES))
        self.register_buffer("prior", torch.zeros(CLASSES, FEATURES))

    def forward(self, name: str, features: Tensor, classes: Tensor) -> Tensor:
        """Update with a batch, features (N, 128) and classes (N, 10).

        Gradients flow through the batch alone, which is a tenth of the new mean: L_GC's weight, also the paper's, acts
        as a tenth of itself.
        """
        counts = sum_over_processes(classes.sum(0)[:, None])  # (10, 1)
        batch_means = sum_over_processes(classes.T @ features) / counts.clamp(min=1)
        means = getattr(self, name)
        updated = torch.where(counts > 0, DECAY * means + (1 - DECAY) * batch_means, means)
        means.copy_(updated.detach())
        return updated


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum. Its gradient reaches this process's part, weighed for apply_gradients' average."""
    if not dist.is_initialized():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + common.processes() * (values - values.detach())


def build(args: Namespace) -> dict[str, nn.Module]:
    """The four networks and the moving averages of L_GC."""
    return dict(
        encoder=Encoder(args.latent_size),
        generator=Generator(args.latent_size),
        discriminator=Discriminator(),
        classifier=Classifier(),
        class_means=ClassMeans(),
    )


def discriminator_loss(real_logits: Tensor, reconstructed_logits: Tensor, prior_logits: Tensor) -> Tensor:
    """L_D, mean over the batch, in nats (Bao et al., section 3.1). Of three images one is real: a discriminator that
    can't tell says 1/3, and has log 3 + 2 log 3/2 = 1.910."""
    return (F.softplus(-real_logits) + F.softplus(reconstructed_logits) + F.softplus(prior_logits)).mean()


def classifier_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_C, mean over the batch, in nats: logits (N, 10), labels (N,) (Bao et al., section 3.2)."""
    return F.cross_entropy(logits, labels)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """L_KL, mean over the batch, in nats (Bao et al., section 3.3; Kingma and Welling 2013, appendix B)."""
    return (mu.square() + logvar.exp() - logvar - 1).sum(1).mean() / 2


def pairwise_loss(real: Tensor, reconstructed: Tensor) -> Tensor:
    """One term of L_G, of pairs (N, ...): half their squared distance, mean over the batch (section 3.3)."""
    return (real - reconstructed).square().flatten(1).sum(1).mean() / 2


def mean_loss(real_means: Tensor, prior_means: Tensor) -> Tensor:
    """L_GD of mean features (F,), L_GC of the means of all classes (10, F) (sections 3.1 and 3.2)."""
    return (real_means - prior_means).square().sum() / 2


def adversarial_loss(logits: Tensor) -> Tensor:
    """L'_GD = -log D(x_p), mean over the batch, in nats: the loss that the paper's L_GD replaces."""
    return F.softplus(-logits).mean()


def reparameterize(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Latents of q(z | x, c). The paper prints exp(logvar) for the deviation, but its KL takes exp(logvar / 2)."""
    return mu + (logvar / 2).exp() * noise


def make_optimizers(args: Namespace, networks: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    """Adam for each network. Encoder and generator share one, as it treats every weight by itself."""
    drawing = [*networks["encoder"].parameters(), *networks["generator"].parameters()]
    return dict(
        encoder_and_generator=common.adam(drawing, args.lr, beta1=0.5),
        discriminator=common.adam(networks["discriminator"].parameters(), args.lr, beta1=0.5),
        classifier=common.adam(networks["classifier"].parameters(), args.lr, beta1=0.5),
    )


def make_step(args: Namespace, device: torch.device, autocast: torch.autocast, networks: dict, optimizers: dict):
    """A function from a batch, uint8 (N, 1, 28, 28) and labels (N,), to the losses of one step of all networks."""
    encoder, generator, discriminator, classifier, class_means = networks.values()
    weights = args.loss_weights

    def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        real = common.to_symmetric(images)  # x_r
        classes = F.one_hot(labels, CLASSES).float()  # (N, 10)
        noise, prior_latents = torch.randn(len(images), 2, args.latent_size, device=device).unbind(1)
        with autocast:
            mu, logvar = encoder(real, classes)
            # Two batches, so that batch norm lets no loss of x_p reach the encoder. The prior's classes are those of
            # the real images: random too, and L_GC then finds each class as often on both sides.
            reconstructed = generator(reparameterize(mu, logvar, noise), classes)  # x_f (N, 1, 28, 28)
            drawn = torch.cat([reconstructed, generator(prior_latents, classes)])  # x_f and x_p (2N, 1, 28, 28)
            real_features, real_logits = discriminator(real)
            drawn_features, drawn_logits = discriminator(drawn)
            real_class_features, real_class_logits = classifier(real)
            drawn_class_features, drawn_class_logits = classifier(drawn)
        reconstructed_features, prior_features = drawn_features.chunk(2)
        reconstructed_logits, prior_logits = drawn_logits.chunk(2)
        reconstructed_class_features, prior_class_features = drawn_class_features.chunk(2)
        _, prior_class_logits = drawn_class_logits.chunk(2)

        loss_d = discriminator_loss(real_logits, reconstructed_logits, prior_logits)
        loss_c = classifier_loss(real_class_logits, labels)
        loss_kl = kl_divergence(mu, logvar)
        # Features of real images are targets, to which E and G have no way back.
        real_features, real_class_features = real_features.detach(), real_class_features.detach()
        loss_g = (
            pairwise_loss(real, reconstructed)
            + pairwise_loss(real_features, reconstructed_features)
            + pairwise_loss(real_class_features, reconstructed_class_features)
        )
        both = real_features, prior_features
        means = [sum_over_processes(features.mean(0)) / common.processes() for features in both]
        loss_gd = mean_loss(*means)
        loss_gc = mean_loss(
            class_means("real", real_class_features, classes), class_means("prior", prior_class_features, classes)
        )
        loss_adversarial = adversarial_loss(prior_logits)
        loss_label = classifier_loss(prior_class_logits, labels)

        # x_p does not depend on E, and L_KL not on G. So one backward pass through the sum gives each what the table
        # says: E L_KL and L_G alone, G all but L_KL.
        loss_of_both = (
            weights["kl"] * loss_kl
            + loss_g
            + weights["mean"] * loss_gd
            + weights["class_mean"] * loss_gc
            + weights["adversarial"] * loss_adversarial
            + weights["label"] * loss_label
        )
        objectives = dict(discriminator=loss_d, classifier=loss_c, encoder_and_generator=loss_of_both)
        # All gradients first: they belong to the weights of before the step.
        gradients = {name: common.gradients(loss, optimizers[name], retain=True) for name, loss in objectives.items()}
        for name in objectives:
            common.apply_gradients(gradients[name], optimizers[name])
        return {
            "L_D [nats]": loss_d,
            "L_C [nats]": loss_c,
            "L_KL [nats]": loss_kl,
            "L_G [squares]": loss_g,
            "L_GD [squares]": loss_gd,
            "L_GC [squares]": loss_gc,
            "L'_GD [nats]": loss_adversarial,
            "L'_GC [nats]": loss_label,
        }

    return step


def train(args: Namespace) -> None:
    if args.batch_size < 2 * common.processes():
        raise common.UserError(f"--batch-size {args.batch_size}: batch norm needs two images in every process")
    device = common.choose_device(args)
    autocast = common.choose_autocast(args, device)
    data = common.load_data(args.dataset, args.data_dir).to(device)  # images uint8 (N, 1, 28, 28), labels (N,)

    common.seed_everything(args.seed)
    networks = {name: common.to_device(network, device, autocast) for name, network in build(args).items()}
    optimizers = make_optimizers(args, networks)
    fixed_latents = common.first_latents(args.seed, args.latent_size).to(device)
    fixed_classes = F.one_hot(torch.arange(64, device=device) % CLASSES, CLASSES).float()  # in turn
    if args.resume:
        common.restore(networks, args.checkpoint["networks"])
        common.restore(optimizers, args.checkpoint["optimizers"])

    with common.record(args, data) as run:  # its folder and log; `history` has the epochs of a resumed run
        step = common.capture(make_step(args, device, autocast, networks, optimizers), device)
        for epoch in range(len(run.history) + 1, args.epochs + 1):
            common.seed_everything(args.seed, epoch)  # of (seed, epoch) alone: a resumed run is the unbroken one
            for network in networks.values():
                network.train()  # drawing samples leaves the generator in eval mode
            for images, labels in common.batches(data, args.batch_size, device):
                run.log(step(images, labels))
            run.end_epoch()
            run.save_samples(generate(networks["generator"], fixed_latents, fixed_classes), columns=CLASSES)
            run.save(networks, optimizers)
        run.finish(*save_pictures(args, networks, run.save_picture))


@torch.no_grad()
def generate(generator: nn.Module, latents: Tensor, classes: Tensor) -> Tensor:
    """Latents (N, latent_size) and classes (N, 10) to images (N, 1, 28, 28) in [0, 1]."""
    return common.symmetric_to_unit(generator.eval()(latents, classes))


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Images uint8 (N, 1, 28, 28) and their classes (N, 10) to the mean latents (N, latent_size)."""
    return encoder.eval()(common.to_symmetric(images), classes)[0]


def draw_classes(networks: dict[str, nn.Module], args: Namespace, columns: int) -> Tensor:
    """A row a class, a column a latent, the same all through a run: (10 * columns, 1, 28, 28) in [0, 1]."""
    device = next(networks["generator"].parameters()).device
    latents = common.first_latents(args.seed, args.latent_size, columns).to(device)
    classes = torch.eye(CLASSES, device=device).repeat_interleave(columns, dim=0)
    return generate(networks["generator"], latents.repeat(CLASSES, 1), classes)


def draw_morphs(networks: dict[str, nn.Module], images: Tensor, steps: int) -> Tensor:
    """From each image k, uint8, of class k, to the next, in latent and class: (10, steps, 1, 28, 28) in [0, 1]."""
    eye = torch.eye(CLASSES, device=images.device)
    latents = encode(networks["encoder"], images, eye)
    way = torch.linspace(0, 1, steps, device=images.device)[:, None]  # (steps, 1)
    latents, classes = (torch.lerp(start[:, None], start.roll(-1, 0)[:, None], way) for start in (latents, eye))
    return generate(networks["generator"], latents.flatten(0, 1), classes.flatten(0, 1)).view(CLASSES, steps, 1, 28, 28)


def draw_styles(networks: dict[str, nn.Module], images: Tensor) -> Tensor:
    """The latent of each image k, uint8, of class k, under every label: (10, 10, 1, 28, 28) in [0, 1]."""
    eye = torch.eye(CLASSES, device=images.device)
    latents = encode(networks["encoder"], images, eye).repeat_interleave(CLASSES, dim=0)
    return generate(networks["generator"], latents, eye.repeat(CLASSES, 1)).view(CLASSES, CLASSES, 1, 28, 28)


def load_test_images(args: Namespace) -> Tensor:
    """The first real test image of each class in turn, uint8 (10, 1, 28, 28)."""
    images, labels = common.load_data(args.dataset, args.data_dir, train=False)
    if len(labels.unique()) < CLASSES:
        raise common.UserError("they lack a class")
    return images[torch.stack([(labels == label).nonzero()[0, 0] for label in range(CLASSES)])]


def save_pictures(args: Namespace, networks: dict[str, nn.Module], save: Callable) -> list[str]:
    """classes.png; and, where real test images are at hand, morph.png, styles.png and morph.gif. Their names.

    `save` takes a picture's name, what is in it, and what writes it if that is not common.write_picture.
    """

    def save_titled(name: str, title: str, images: Tensor, columns: int) -> None:
        save(name, common.label_panels([(title, common.grid(images, columns))]))

    title = "a row a class, 0 to 9; a column a latent"
    save_titled("classes.png", title, draw_classes(networks, args, columns=10), 10)
    try:
        images = load_test_images(args).to(next(networks["generator"].parameters()).device)
    except common.UserError as error:
        common.show_line(f"{args.script}: no morph and styles, which start from real test images: {error}")
        return ["classes.png"]
    real = common.to_unit(images)[:, None]  # (10, 1, 1, 28, 28)
    morphs = torch.cat([real, draw_morphs(networks, images, 8), real.roll(-1, 0)], dim=1)
    title = "left and right: test images; between them: drawn"
    save_titled("morph.png", title, morphs.flatten(0, 1), 10)
    styles = torch.cat([real, draw_styles(networks, images)], dim=1)
    title = "left: test images; then their latents, labelled 0 to 9"
    save_titled("styles.png", title, styles.flatten(0, 1), CLASSES + 1)
    frames = [common.grid(row, columns=5) for row in draw_morphs(networks, images, 16).unbind(1)]
    save("morph.gif", frames, common.write_gif)
    return ["classes.png", "morph.png", "styles.png"]


def load_networks(checkpoint: dict, device: torch.device) -> dict[str, nn.Module]:
    """All networks; encoder and generator with the run's weights, which is all that drawing needs."""
    networks = build(Namespace(**checkpoint["options"]))
    common.restore({name: networks[name] for name in ("encoder", "generator")}, checkpoint["networks"])
    return {name: common.to_device(network, device) for name, network in networks.items()}


def load_sampler(checkpoint: dict, device: torch.device | str = "cpu") -> common.Sampler:
    """What `--sample`, compare.py and your own code draw from: a run, rebuilt from its checkpoint alone."""
    networks = load_networks(checkpoint, device)
    return common.Sampler(
        checkpoint["options"]["latent_size"],
        lambda latents, labels: generate(networks["generator"], latents, F.one_hot(labels, CLASSES).float()),
        common.count_parameters(networks),
        classes=CLASSES,
    )


def sample(args: Namespace) -> None:
    device = common.choose_device(args)
    common.sample(args, load_sampler(args.checkpoint, device), device)
    stored = Namespace(**vars(args) | {"seed": args.checkpoint["options"]["seed"]})

    def save(name: str, picture, write: Callable = common.write_picture) -> None:
        write(Path(args.out_dir, name), picture)

    save_pictures(stored, load_networks(args.checkpoint, device), save)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.Parser("cvaegan.py", __doc__)
    whole, positive = common.number(int, 1), common.number(float, 1e-9)
    natural = common.number(int, 0)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="guo", help="the report whose numbers are the defaults (guo)")
    names = "MNIST, Fashion-MNIST, or digits drawn in a font, which need no download (mnist)"
    add("--dataset", choices=common.LABELLED, default="mnist", help=names)
    add("--data-dir", metavar="DIR", type=common.absolute_path, default="data", help="folder of the data sets (data)")
    add("--out-dir", metavar="DIR", type=os.path.expanduser, help="folder of the run (runs/SCRIPT-PRESET-DATASET)")
    add("--epochs", metavar="N", type=whole, help="passes over the images (guo 200)")
    add("--batch-size", metavar="N", type=whole, help="images a step (guo 128)")
    add("--lr", metavar="RATE", type=positive, help="learning rate (guo 1e-4)")
    add("--seed", metavar="N", type=natural, default=0, help="of all that is random (guo 88)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: an accelerator, if any (auto)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is native (auto)")
    add("--resume", action="store_true", help="go on from the run's checkpoint, or start where there is none")
    add("--sample", metavar="N", type=whole, help="draw N images from the run's checkpoint and end")
    add("--walk", metavar="N", type=whole, help="draw N steps between each two of eight samples, and end")
    add("--to", metavar="PATH", type=os.path.expanduser, help="of --sample, --walk: NAME.png, NAME.gif or a folder")
    add = parser.add_argument_group("CVAE-GAN").add_argument
    add("--weights", choices=list(WEIGHTS), help="of the losses: ours for 28x28, or the paper's for 128x128 (guo ours)")
    add("--label", metavar="K", type=common.number(int, 0, CLASSES - 1), help="--sample only class K, 0 to 9")
    args = common.parse(parser, PRESETS, argv)
    if args.checkpoint is None:  # which keeps the numbers, too: a resumed run goes on with its own
        args.loss_weights = WEIGHTS[args.weights]
    if args.label is not None and args.sample is None and args.walk is None:
        parser.error("--label says which class --sample or --walk draws: give one of them, too")
    return args


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors("cvaegan.py"):
        args = parse_args(argv)
        if args.sample is None and args.walk is None:
            train(args)
        else:
            sample(args)


if __name__ == "__main__":
    main()
