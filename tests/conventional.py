"""The nine trainings the conventional way, as the reports' notebooks and most public scripts have them, for bench.py.

Each function takes a script's options and a device, and yields once after every step, data path included. They share no
code with the scripts but the networks' shapes: torchvision transforms through a DataLoader, Sigmoid and BCELoss, fresh
noise for each player, gradients of the discriminator computed in the generator's step too, `.item()` every step, plain
Adam, float32.
"""

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def batches(data: datasets.VisionDataset, args: Namespace, device: torch.device, workers: int = 0) -> Iterator:
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, num_workers=workers)
    while True:
        for images, labels in loader:
            yield images.to(device), labels.to(device)


def mnist(args: Namespace, device: torch.device, symmetric: bool = True) -> Iterator:
    """MNIST batches in [-1, 1], or [0, 1]."""
    steps = [transforms.ToTensor()] + ([transforms.Normalize(0.5, 0.5)] if symmetric else [])
    return batches(datasets.MNIST(args.data_dir, transform=transforms.Compose(steps)), args, device)


def gan(args: Namespace, device: torch.device) -> Iterator[None]:
    import gan as script

    networks = {name: network.to(device) for name, network in script.build(args).items()}
    generator, discriminator = networks["generator"], nn.Sequential(networks["discriminator"], nn.Sigmoid())
    criterion, shape = nn.BCELoss(), (args.batch_size, args.latent_size)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.lr)
    for images, _ in mnist(args, device):
        real, fake = torch.ones(len(images), device=device), torch.zeros(len(images), device=device)
        real_loss = criterion(discriminator(images), real)
        fake_loss = criterion(discriminator(generator(torch.randn(shape, device=device)).detach()), fake)
        discriminator_loss = real_loss + fake_loss
        discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        discriminator_optimizer.step()

        generator_loss = criterion(discriminator(generator(torch.randn(shape, device=device))), real)
        generator_optimizer.zero_grad()
        generator_loss.backward()
        generator_optimizer.step()
        discriminator_loss.item(), generator_loss.item()
        yield


def vae(args: Namespace, device: torch.device) -> Iterator[None]:
    import vae as script

    encoder, decoder = (n.to(device) for n in script.build(args).values())
    decoder = nn.Sequential(decoder, nn.Sigmoid())
    criterion = nn.BCELoss(reduction="sum")
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=args.lr)
    for images, _ in mnist(args, device, symmetric=False):
        mu, logvar = encoder(images).chunk(2, dim=1)
        latents = mu + torch.exp(0.5 * logvar) * torch.randn_like(logvar)
        divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss = (criterion(decoder(latents), images) + divergence) / len(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield


def faces(args: Namespace, device: torch.device) -> Iterator:
    """The images of <data_dir>/anime in [-1, 1], decoded anew every epoch by two processes."""
    steps = [transforms.Resize(args.image_size), transforms.CenterCrop(args.image_size)]
    steps += [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    data = datasets.ImageFolder(args.data_dir, transforms.Compose(steps), allow_empty=True)
    return batches(data, args, device, workers=2)


def dcgan(args: Namespace, device: torch.device) -> Iterator[None]:
    """For faces as in PyTorch's own DCGAN example, where one batch of generated images serves both players too."""
    import dcgan as script

    networks = {name: n.to(device) for name, n in script.build(args).items()}
    generator, discriminator = networks["generator"], nn.Sequential(networks["discriminator"], nn.Sigmoid())
    criterion, shape = nn.BCELoss(), (args.batch_size, args.latent_size)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(args.beta1, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.lr, betas=(args.beta1, 0.999))
    for images, _ in (faces if args.dataset == "anime" else mnist)(args, device):
        real, fake = torch.ones(len(images), device=device), torch.zeros(len(images), device=device)
        discriminator_optimizer.zero_grad()
        real_loss = criterion(discriminator(images), real)
        real_loss.backward()
        fake_images = generator(torch.randn(shape, device=device))
        fake_loss = criterion(discriminator(fake_images.detach()), fake)
        fake_loss.backward()
        discriminator_optimizer.step()

        if args.dataset != "anime":
            fake_images = generator(torch.randn(shape, device=device))
        generator_optimizer.zero_grad()
        generator_loss = criterion(discriminator(fake_images), real)
        generator_loss.backward()
        generator_optimizer.step()
        real_loss.item(), fake_loss.item(), generator_loss.item()
        yield


def cvaegan(args: Namespace, device: torch.device) -> Iterator[None]:
    """Every network's update with forward passes of its own, one after another, as public CVAE-GANs do it."""
    import cvaegan as script

    networks = {name: n.to(device) for name, n in script.build(args).items()}
    encoder, generator, discriminator, classifier, class_means = networks.values()
    weights, sigmoid = args.loss_weights, nn.Sigmoid()
    bce, cross_entropy, squares = nn.BCELoss(), nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")
    adam = {
        name: torch.optim.Adam(networks[name].parameters(), lr=args.lr, betas=(0.5, 0.999))
        for name in ("encoder", "generator", "discriminator", "classifier")
    }

    def reconstruct(images, classes):
        mu, logvar = encoder(images, classes)
        divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(images)
        return generator(mu + torch.exp(0.5 * logvar) * torch.randn_like(logvar), classes), divergence

    def draw(classes):
        return generator(torch.randn(len(classes), args.latent_size, device=device), classes)

    def pairwise(images, drawn):
        features = [network(images)[0].detach() for network in (discriminator, classifier)]
        drawn_features = [network(drawn)[0] for network in (discriminator, classifier)]
        parts = [squares(drawn, images)] + [squares(*pair) for pair in zip(drawn_features, features)]
        return sum(parts) / 2 / len(images)

    def update(name, loss):
        adam[name].zero_grad()
        loss.backward()
        adam[name].step()
        loss.item()

    for images, labels in mnist(args, device):
        classes = torch.eye(10, device=device)[labels]
        real, fake = torch.ones(len(images), 1, device=device), torch.zeros(len(images), 1, device=device)
        update("classifier", cross_entropy(classifier(images)[1], labels))

        loss = bce(sigmoid(discriminator(images)[1]), real)
        loss = loss + bce(sigmoid(discriminator(reconstruct(images, classes)[0].detach())[1]), fake)
        update("discriminator", loss + bce(sigmoid(discriminator(draw(classes).detach())[1]), fake))

        loss = pairwise(images, reconstruct(images, classes)[0])
        difference = discriminator(images)[0].detach().mean(0) - discriminator(draw(classes))[0].mean(0)
        loss = loss + weights["mean"] * difference.pow(2).sum() / 2
        real_means = class_means("real", classifier(images)[0].detach(), classes)
        difference = real_means - class_means("prior", classifier(draw(classes))[0], classes)
        loss = loss + weights["class_mean"] * difference.pow(2).sum() / 2
        loss = loss + weights["adversarial"] * bce(sigmoid(discriminator(draw(classes))[1]), real)
        update("generator", loss + weights["label"] * cross_entropy(classifier(draw(classes))[1], labels))

        drawn, divergence = reconstruct(images, classes)
        update("encoder", weights["kl"] * divergence + pairwise(images, drawn))
        yield
