"""Measure finished runs side by side; the figures replace visual comparison. No trained network is downloaded.

    python compare.py assets/trained/*               # the trained models that come with these scripts
    python compare.py runs/*                         # a table of all runs, and comparison.{md,csv,json,png}
    python compare.py assets/trained/* my/samples    # beside them a folder of pictures, whatever drew them
    python compare.py --grid gan.py --lr 1e-4 2e-4 3e-4 --batch-size 64 128 --epochs 5     # a grid search
    python compare.py --grid vae.py --epochs 5 --repeat 3               # mean and deviation over three seeds

Each run draws 10,000 samples, rounded to bytes as the data are. They are measured against the test images. A folder has
no test images: a random half of it is measured against. In the row "real images" training images (of a folder the other
half) take the place of samples. A perfect model would get that row's figures. NAME, NAME-seed1, NAME-seed2 ... are one
row, of means and deviations (n - 1). Pictures are 28x28, at least 1,000; with fewer than 10,000 Frechet is larger.

    parameters     weights of all networks
    epochs         of the training; "40 of 100" if it has not reached the number it was asked for
    seeds          runs of which the row holds means
    minutes        of the training; images/s is the median of its epochs
    Frechet        distance of the features of samples and real images, in percent of the real features' variance: 0 is
                   perfect, 100 is a model that repeats one image with average features (Heusel et al. 2017)
    precision      share of the samples that lie among real images: quality (Kynkäänniemi et al. 2019, of 5,000 each)
    recall         share of the real images that lie among samples: variety. An image lies among others if it is nearer
                   to one of them than that one's third neighbour is.
    classes        classes that get at least a tenth of their real share of the samples
    KL [nats]      divergence of the samples' shares of the classes from the real ones: 0 is perfect
    Wasserstein    sliced distance of 7x7 patches at every scale, times 1,000; folders only (Karras et al. 2018)
    sharpness      slope of the edges, over that of real images: below 1 is blurred
    noise          size of pixels brighter or darker than all around, over that of real images: above 1 is speckled
    walk           evenness of 16 steps between two latents, in features: 1 if all are equal, 1/16 for one jump
    agreement      share of the samples in which the judge sees the class that was asked for; models with labels
    ELBO [nats]    lower bound on log p(x), mean over the test images; models with a likelihood
    bound [nats]   importance-weighted lower bound, a tighter one: the ELBO plus the gap between both on 250 test images

Features are those of the judge, a small network. MNIST's is assets/judge-mnist.pt, so that everybody's figures compare.
Other images' is trained once, on the training images, and kept in the data folder: about two minutes on 2 cores.
With labels it classifies images, sound and badly drawn: 99.4 % of MNIST's test images right. Without labels it learns
to know an image by any crop of it (Chen et al. 2020), at 32x32 pixels: it sees poses, colours and layouts, and no fine
detail. Wasserstein and sharpness see fine detail and no layout. Figures of two judges, or of two data sets, can't be
compared.

--grid trains every combination of the values, each in a folder of its own under grids/, and ranks them by Frechet
distance. The same command goes on with an interrupted grid.

A script joins by its function `load_sampler(checkpoint, device) -> common.Sampler` and by nothing else. In reading
order: the judge, the measures, the table of a data set, a run's folder, what is written, grids, the command line.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import argparse
import contextlib
import csv
import glob
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common  # common.py, which lies beside this file

SAMPLES = 10_000
NEIGHBOURHOODS = 5_000  # images of each side for precision and recall
WALKS, STEPS = 200, 16
BOUND_IMAGES = 250  # test images on which the gap between both bounds is measured: 500 decodings each
MNIST_JUDGE = Path(__file__).with_name("assets") / "judge-mnist.pt"  # the same on every machine
LEAST_STEPS, MOST_STEPS = 250, 1200  # of the judge: five epochs of MNIST, more of smaller sets
JUDGE = dict(version=1, batch_size=256, lr=5e-3, widths=[32, 64, 128], features=128, shift=2, temperature=0.2)
COLUMNS = {  # figure: digits after the point
    "parameters": 0, "epochs": 0, "seeds": 0, "minutes": 1, "images/s": 0, "Frechet": 2, "precision": 3, "recall": 3,
    "classes": 0, "KL [nats]": 3, "Wasserstein": 1, "sharpness": 2, "noise": 2, "walk": 3, "agreement": 4,
    "ELBO [nats]": 1, "bound [nats]": 1,
}  # fmt: skip


def build_judge(data: common.Data) -> nn.Sequential:
    """Images (N, C, H, W) in [0, 1], shrunk to 32x32, to ten logits or, without labels, 64 numbers."""
    size, features = min(data.images.shape[-1], 32), JUDGE["features"]
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(size)]
    for inputs, outputs in itertools.pairwise([data.images.shape[1], *JUDGE["widths"]]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(outputs * (size // 8) ** 2, features, bias=False), nn.BatchNorm1d(features)]
    layers += [nn.ReLU(), nn.Linear(features, 64 if data.labels is None else 10)]
    return nn.Sequential(*layers)


@torch.no_grad()
def judge_images(judge: nn.Sequential, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) to the last layer's inputs, float64 (N, 128), and classes (N,), on the CPU."""
    features = torch.cat([judge[:-1](common.to_unit(chunk.to(device))) for chunk in images.split(500)])
    return features.cpu().double(), judge[-1](features).argmax(1).cpu()


def contrastive_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Every projection (N, d) must find its partner among 2N - 1, in nats (Chen et al. 2020, 2002.05709, eq. 1)."""
    both = F.normalize(torch.cat([one, other]))  # (2N, d)
    logits = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(both), device=both.device).roll(len(one)))


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` whole pixels either way, zeros moving in: (N, C, H, W) to the same."""
    height, width = images.shape[-2:]
    places = F.pad(images, (most,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2 most + 1, ..., H, W)
    down, right = torch.randint(0, 2 * most + 1, (2, len(images)), device=images.device)
    return places[torch.arange(len(images), device=images.device), :, down, right]


def worsened(images: Tensor) -> Tensor:
    """Images (N, C, H, W) blurred, dimmed and speckled, each half of the time, by random amounts."""
    blur, dimness, speckle = (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1).clamp(min=0)
    blurred = F.avg_pool2d(F.avg_pool2d(images, 3, 1, 1), 3, 1, 1)
    dimmed = images.lerp(blurred, blur) * (1 - 0.7 * dimness)
    return dimmed + 0.3 * speckle * torch.randn_like(images)


def cropped(images: Tensor) -> Tensor:
    """A random crop of each image, half to all of its side, perhaps mirrored, its channels 20 % more or less."""
    n, channels, device = *images.shape[:2], images.device
    sides = torch.empty(n, 1, device=device).uniform_(0.5, 1)
    corners = torch.empty(n, 2, device=device).uniform_(-1, 1) * (1 - sides)
    flips = torch.randint(0, 2, (n, 1), device=device) * 2 - 1
    scales = torch.cat([sides * flips, sides], dim=1).diag_embed()  # (N, 2, 2)
    places = F.affine_grid(torch.cat([scales, corners[..., None]], dim=2), images.shape, align_corners=False)
    crops = F.grid_sample(images, places, align_corners=False)
    return crops * torch.empty(n, channels, 1, 1, device=device).uniform_(0.8, 1.2)


def train_judge(data: common.Data, device: torch.device, autocast: torch.autocast, steps: int) -> nn.Sequential:
    """A classifier of worsened images, or without labels a network that knows an image by any crop of it."""
    common.seed_everything(0)
    judge = common.to_device(build_judge(data), device, autocast)
    optimizer = torch.optim.AdamW(judge.parameters(), JUDGE["lr"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, JUDGE["lr"], total_steps=steps)
    progress = common.Progress(steps, "steps of the judge")
    for step in range(steps):
        picked = torch.randperm(len(data.images))[: JUDGE["batch_size"]]
        images = data.images[picked].to(device)
        images = judge[0](common.to_unit(images))  # at most 32x32
        with autocast:
            if data.labels is None:
                projections = judge(torch.cat([cropped(images), cropped(images)])).float()
                loss = contrastive_loss(*projections.chunk(2), JUDGE["temperature"])
            else:
                logits = judge(worsened(shifted(images, JUDGE["shift"]))).float()
                loss = F.cross_entropy(logits, data.labels[picked].to(device))
        common.descend(loss, optimizer)
        schedule.step()
        progress.update(step + 1)
    return common.to_device(judge, device).eval()


def load_judge(path: Path, data: common.Data, device: torch.device, autocast: torch.autocast) -> tuple:
    """The judge of these images and its file's SHA-256: MNIST's own, or one kept as `path`, else trained and kept."""
    steps = min(MOST_STEPS, max(LEAST_STEPS, len(data.images) // 50))
    settings = JUDGE | dict(images=data.digest(), steps=steps)
    for kept_as in (MNIST_JUDGE, path):
        with contextlib.suppress(Exception):  # absent, or damaged in any way: it can always be made again
            content = kept_as.read_bytes()
            kept = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            if kept["settings"] == settings:
                judge = common.to_device(build_judge(data), device)
                common.restore({"judge": judge}, kept["networks"])
                return judge.eval(), hashlib.sha256(content).hexdigest()
    print(f"training the judge, once: it is kept as {path}", flush=True)
    judge = train_judge(data, device, autocast, steps)
    torch.save(dict(settings=settings, networks={"judge": judge.state_dict()}), buffer := io.BytesIO())
    try:
        with common.replacing(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except common.UserError as error:  # a shared data folder may be read-only
        print(f"compare: the judge is not kept: {error}")
    return judge, hashlib.sha256(buffer.getbuffer()).hexdigest()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, d), (M, d) (Heusel et al. 2017, 1706.08500 eq. 6)."""
    one, other = one.double(), other.double()
    covariance, other_covariance = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C1 C2 has the eigenvalues of this symmetric product; the sum of their roots is the last trace.
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    squares = (one.mean(0) - other.mean(0)).square().sum()
    return (squares + covariance.trace() + other_covariance.trace() - 2 * cross).item()


def share_among(points: Tensor, others: Tensor, k: int = 3) -> float:
    """Share of points (N, d) that are nearer to one of others (M, d) than is that one's own k-th neighbour.

    Precision is that of samples among real images, recall the reverse (Kynkäänniemi et al. 2019, 1904.06991, eq. 2).
    """
    # The nearest of all is the point itself.
    reach = torch.cat([torch.cdist(chunk, others).kthvalue(k + 1).values for chunk in others.split(1000)])
    inside = torch.cat([(torch.cdist(chunk, others) <= reach).any(1) for chunk in points.split(1000)])
    return inside.double().mean().item()


def class_figures(shares: Tensor, real_shares: Tensor) -> tuple[int, float]:
    """Shares (classes,): classes with a tenth of their real share or more; KL(shares || real shares) in nats."""
    covered = (shares >= real_shares / 10) & (shares > 0)
    return int(covered.sum()), torch.special.xlogy(shares, shares / real_shares).sum().item()


def split_speckle(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) as calm + speckle: calm has every pixel within the range of the eight around it."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    moved = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    around = torch.stack(moved[:4] + moved[5:])  # (8, N, C, H, W)
    calm = images.clamp(around.amin(0), around.amax(0))
    return calm, images - calm


def texture(images: Tensor) -> tuple[float, float]:
    """Slope of the edges [brightness a pixel] and size of the speckle [brightness, 0 to 1] of uint8 (N, C, H, W).

    The slope is sum g^3 / sum g^2 over the gradients g of the calm images: an edge of height h over w pixels counts
    as h / w, however many there are, and faint ripples hardly count. The size is the root of the mean square.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in images.split(250):
        calm, speckle = split_speckle(common.to_unit(chunk))
        squares = calm.diff(dim=3)[..., :-1, :].square() + calm.diff(dim=2)[..., :-1].square()
        sums += torch.stack([squares.pow(1.5).sum(), squares.sum(), speckle.square().sum()]).double()
    cubes, squares, speckle = sums
    return (cubes / squares.clamp(min=1e-12)).item(), (speckle / images.numel()).sqrt().item()


def evenness(features: Tensor) -> float:
    """(sum d)^2 / (n sum d^2) of the n steps d of each walk (W, n + 1, f), mean: 1 if equal, 1/n for one jump."""
    steps = features.diff(dim=1).norm(dim=2).double()  # (W, n)
    return (steps.sum(1).square() / (steps.shape[1] * steps.square().sum(1)).clamp(min=1e-12)).mean().item()


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Images (N, C, H, W): what each halving of the size loses, down to at least 16 pixels, then what is left."""
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = (taps[:, None] * taps).expand(images.shape[1], 1, 5, 5)
    levels = []
    while images.shape[-1] >= 32:
        smaller = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=images.shape[1])
        levels.append(images - F.interpolate(smaller, images.shape[-2:], mode="bilinear", align_corners=False))
        images = smaller
    return [*levels, images]


def sliced_distance(one: Tensor, other: Tensor, directions: int = 256) -> float:
    """Sliced Wasserstein-1 distance of two sets of N points (N, d): the mean over random directions."""
    lines = F.normalize(torch.randn(one.shape[1], directions, generator=torch.Generator().manual_seed(0)), dim=0)
    return ((one @ lines).sort(dim=0).values - (other @ lines).sort(dim=0).values).abs().mean().item()


def random_patches(images: Tensor, per_image: int, generator: torch.Generator) -> Tensor:
    """7x7 patches at random places of images (N, C, H, W), channels last: (N * per_image, 7, 7, C)."""
    which = torch.arange(len(images)).repeat_interleave(per_image)
    down, right = (torch.randint(side - 6, which.shape, generator=generator) for side in images.shape[-2:])
    return images.unfold(2, 7, 1).unfold(3, 7, 1)[which, :, down, right].permute(0, 2, 3, 1)


def sliced_wasserstein(real: Tensor, fake: Tensor, per_image: int = 16) -> float:
    """Distance of random 7x7 patches of uint8 images (N, C, H, W), mean over the pyramid's levels, times 1,000.

    Both sides are standardised by the real patches' mean and deviation of each channel. Karras et al. (2018,
    arXiv 1710.10196, section 5) standardise each by its own, which forgives a lack of contrast in details: blur.
    """
    count = min(len(real), len(fake), NEIGHBOURHOODS)
    generator, distances = torch.Generator().manual_seed(0), []
    pyramids = [laplacian_pyramid(common.to_unit(images[:count])) for images in (real, fake)]
    for levels in zip(*pyramids):
        one, other = (random_patches(level, per_image, generator) for level in levels)
        mean, deviation = one.mean((0, 1, 2)), one.std((0, 1, 2)).clamp(min=1e-8)
        one, other = (one - mean) / deviation, (other - mean) / deviation
        distances.append(sliced_distance(one.flatten(1), other.flatten(1)))
    return 1000 * statistics.fmean(distances)


class Table:
    """A data set's judge and real images, and a row of figures for each run. The row of real images is the first."""

    def __init__(self, dataset: str, size: int | None, data_dir: str, device: torch.device, autocast: torch.autocast):
        self.name, self.device = Path(dataset).name + (f"-{size}" if size else ""), device
        train = test = common.load_data(dataset, data_dir, size=size)
        if len(train.images) < 20:
            raise common.UserError(f"{dataset} has {len(train.images)} images: too few to compare with")
        self.digest = train.digest()
        kept_as = Path(data_dir, f"judge-{self.name}.pt")
        self.judge, self.judge_hash = load_judge(kept_as, train, device, autocast)
        generator = torch.Generator().manual_seed(0)
        train_order = torch.randperm(len(train.images), generator=generator)
        if train.labels is None:
            half = len(train_order) // 2
            test_order, train_order = train_order[:half], train_order[half:]
        else:
            test = common.load_data(dataset, data_dir, train=False)
            test_order = torch.randperm(len(test.images), generator=generator)
        test_order, train_order = test_order[:SAMPLES], train_order[:SAMPLES]
        self.images = test.images[test_order]  # uint8 (N, C, H, W)
        self.features, classes = judge_images(self.judge, self.images, device)  # (N, 128), (N,)
        self.slope, self.speckle = texture(self.images)
        labels, self.shares, self.accuracy, kind = None, None, None, "images"
        if train.labels is not None:
            labels = train.labels[train_order]
            self.shares = classes.bincount(minlength=10).clamp(min=1) / len(classes)  # as the judge sees them
            self.accuracy = (classes == test.labels[test_order]).double().mean().item()
            kind = f"test images, {self.accuracy:.2%} known to the judge"
        kind += f"; SHA-256 of the judge {self.judge_hash[:12]}"
        self.title = f"{self.name}: measured against {len(self.images):,} {kind}"
        images = train.images[train_order]
        pictures = images[torch.arange(20) % len(images)]
        self.rows = [{"run": "real images", "pictures": pictures} | self.measure(images, labels)]

    def measure(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """The figures of samples, uint8 (N, C, H, W), that need no model; labels (N,) are the classes asked for."""
        features, classes = judge_images(self.judge, images, self.device)
        count = min(len(features), len(self.features), NEIGHBOURHOODS)
        real, fake = self.features[:count].float(), features[:count].float()
        variance = self.features.var(0).sum().item()
        figures = {"Frechet": 100 * frechet_distance(self.features, features) / variance}
        figures |= {"precision": share_among(fake, real), "recall": share_among(real, fake)}
        if self.shares is None:
            figures["Wasserstein"] = sliced_wasserstein(self.images, images)
        else:
            shares = classes.bincount(minlength=10) / len(classes)
            figures["classes"], figures["KL [nats]"] = class_figures(shares, self.shares)
        slope, speckle = texture(images)
        figures |= {"sharpness": slope / max(self.slope, 1e-12), "noise": speckle / max(self.speckle, 1e-12)}
        if labels is not None:
            figures["agreement"] = (classes == labels).double().mean().item()
        return figures

    def add_pictures(self, pictures: Tensor, row: dict, count: int) -> None:
        """The row of `count` pictures at most, uint8 (N, 1, 28, 28), in random order."""
        self.rows.append(row | self.measure(pictures[:count], None) | {"pictures": pictures[:20]})

    def add(self, sampler: common.Sampler, row: dict, count: int) -> None:
        """The row of a run: figures of `count` samples, and as pictures twelve of them, then a walk in eight."""
        chunks, labels = zip(*common.draw(sampler, count, 0, self.device))
        images = torch.cat(chunks)
        row |= self.measure(images, torch.cat(labels) if sampler.classes else None)
        start, end = torch.randn(2, WALKS, sampler.latent_size, generator=torch.Generator().manual_seed(1))
        walks = []
        for i, latents in enumerate(common.interpolate(start, end, STEPS + 1).to(self.device)):
            label = torch.full((STEPS + 1,), i % sampler.classes, device=self.device) if sampler.classes else None
            walks.append(common.to_bytes(sampler.generate(latents, label)))
        features, _ = judge_images(self.judge, torch.cat(walks), self.device)
        row["walk"] = evenness(features.view(WALKS, STEPS + 1, -1))
        row["pictures"] = torch.cat([images[:12], walks[1][torch.linspace(0, STEPS, 8).long()]])
        if sampler.evaluate is not None:
            common.seed_everything(0)
            row["ELBO [nats]"], _ = sampler.evaluate(self.images, 1).values()
            elbo, bound = sampler.evaluate(self.images[:BOUND_IMAGES]).values()
            row["bound [nats]"] = row["ELBO [nats]"] + bound - elbo
        self.rows.append(row)


def scripts() -> set[str]:
    """The models here: the Python files beside this one that define load_sampler."""
    files = Path(__file__).parent.glob("*.py")
    return {file.stem for file in files if b"\ndef load_sampler(" in file.read_bytes()}


class Measurable(NamedTuple):
    """A run, or a folder of pictures, that can be measured."""

    origin: tuple[str, int | None, str]  # of the real images: data set, side in pixels if a folder's, data folder
    digest: str  # of the real images
    row: dict
    sampler: common.Sampler | None = None
    pictures: Tensor | None = None


def load_pictures(folder: Path, args: Namespace) -> Measurable:
    """A folder of at least 1,000 pictures of 28x28, grey or RGB, whatever drew them, in random order."""
    if args.dataset and args.dataset not in common.LABELLED:
        raise common.UserError(f"--dataset {args.dataset}: pictures are measured by {', '.join(common.LABELLED)}")
    names, pixels = common.list_pictures(folder), bytearray()
    if len(names) < 1000:
        raise common.UserError(f"{folder} holds no run and {len(names):,} pictures: at least 1,000 can be measured")
    for name in names:
        try:
            picture = common.open_picture(folder / name).convert("L")
        except ValueError as error:
            raise common.UserError(f"{folder / name} can't be read: {error}") from error
        if picture.size != (28, 28):
            raise common.UserError(f"{folder / name} has {picture.width}x{picture.height} pixels, not 28x28")
        pixels += picture.tobytes()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))  # files may be sorted by class
    pictures = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28)[order]
    origin = (args.dataset or "mnist", None, args.data_dir or "data")
    count = min(len(pictures), args.samples)
    row = {"run": f"{folder.resolve().name} ({count:,} pictures)"}
    return Measurable(origin, common.load_data(origin[0], origin[2]).digest(), row, pictures=pictures)


def load_run(folder: Path, args: Namespace, device: torch.device) -> Measurable:
    """A run's images, sampler and row so far, or a folder of pictures. UserError if it can't be read."""
    if folder.name == "checkpoint.pt":
        folder = folder.parent
    if not folder.is_dir():
        raise common.UserError(f"there is no folder {folder}")
    if not (folder / "checkpoint.pt").is_file():
        if any(folder.glob("*/checkpoint.pt")):
            raise common.UserError(f"{folder} holds runs and is none: name {folder}/*")
        return load_pictures(folder, args)
    checkpoint = common.load_checkpoint(folder)
    script, options, history = checkpoint["script"], checkpoint["options"], checkpoint["history"]
    # The checkpoint may be anybody's: it may name no code but the scripts beside this one.
    if script not in scripts():
        raise common.UserError(f"{folder} is a run of {script!r}: there is no such script here")
    try:
        sampler = importlib.import_module(script).load_sampler(checkpoint, device)
        row = {"run": folder.resolve().name, "parameters": sampler.parameters, "epochs": len(history)}
        row["minutes"] = sum(epoch["seconds"] for epoch in history) / 60
        row["images/s"] = statistics.median(epoch["images per second"] for epoch in history)
        row["arithmetic"] = checkpoint.get("arithmetic", [])  # earlier versions kept none
        if len(history) < options["epochs"]:
            row["epochs asked"] = options["epochs"]
        size = None if options["dataset"] in common.LABELLED else options["image_size"]
        dataset = common.absolute_path(args.dataset) if args.dataset and size else options["dataset"]
        own = options.get("data_dir", "data")
        data_dir = args.data_dir or (own if Path(own).is_dir() else "data")  # the run's may be of another machine
        return Measurable((dataset, size, data_dir), checkpoint["data"], row, sampler)
    except Exception as error:  # a damaged checkpoint raises whatever its contents lead to
        why = f"{type(error).__name__}: {error}"
        raise common.UserError(f"{folder}: the checkpoint is damaged or of another version ({why})") from error


def compare(folders: list, args: Namespace, device: torch.device, autocast: torch.autocast) -> list[Table]:
    """Measure the runs in these folders: a table for each data set among them. What can't be measured is told."""
    tables, names = {}, [Path(folder).resolve().name for folder in folders]
    for i, (folder, name) in enumerate(zip(folders, names), start=1):
        try:
            run = load_run(Path(folder), args, device)
            table = tables.get(run.digest) or Table(*run.origin, device, autocast)
            if table.digest != run.digest:
                way_out = "name the place of its own with --data-dir or --dataset"
                raise common.UserError(f"{folder} was trained on other images than {run.origin[0]}: {way_out}")
        except common.UserError as error:
            if len(folders) == 1:
                raise
            print(f"compare: left out: {error}", flush=True)
            continue
        tables[run.digest] = table
        if names.count(name) > 1:
            run.row["run"] = str(folder)
        print(f"compare: measuring {run.row['run']}, {i} of {len(folders)}", flush=True)
        if run.sampler:
            table.add(run.sampler, run.row, args.samples)
        else:
            table.add_pictures(run.pictures, run.row, args.samples)
    if not tables:
        raise common.UserError("there is nothing to measure in these folders")
    return list(tables.values())


def cell(row: dict, name: str) -> str:
    """A figure as the tables show it: with its deviation, or the epochs that a run still under way was asked for."""
    if name not in row:
        return ""
    digits, deviation, asked = COLUMNS[name], row.get(f"{name} deviation"), row.get(f"{name} asked")
    if deviation:
        digits = max(digits, 1)
        return f"{row[name]:,.{digits}f} ± {deviation:,.{digits}f}"
    figure = f"{row[name]:,.{digits}f}"
    return f"{figure} of {asked:,}" if asked else figure


def lay_out(rows: list[dict]) -> str:
    """A Markdown table in aligned columns, without those that no run fills."""
    names = [name for name in COLUMNS if any(name in row for row in rows[1:])]
    lines = [["run", *names], ["---", *["--:"] * len(names)]]
    lines += [[row["run"], *(cell(row, name) for name in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def panel(row: dict) -> tuple[str, Image.Image]:
    """A row's name and main figures, and its pictures, taken out of it: twelve samples and a walk, or real images."""
    shown = ("Frechet", "precision", "recall", "classes", "sharpness", "noise", "walk")
    caption = "    ".join([row["run"], *(f"{name} {cell(row, name)}" for name in shown if name in row)])
    tiles = common.to_unit(row.pop("pictures"))
    tiles = F.interpolate(tiles, scale_factor=max(1, 64 // tiles.shape[-1]))
    between = torch.ones_like(tiles[:1])  # a white tile
    return caption.replace("±", "+-"), common.grid(torch.cat([tiles[:12], between, tiles[12:]]), 21)


def differences(rows: list[dict]) -> str:
    """What rows were not all trained with, for a note: torch's version, device, precision."""
    parts, told = [part for row in rows for part in row.get("arithmetic", [])], []
    for name in ("torch", "device", "precision", "processes", "threads"):
        if len(found := dict.fromkeys(str(part.get(name)) for part in parts)) > 1:
            told.append(f"{name} ({', '.join(found)})")
    return "; ".join(told)


def report(tables: list[Table], args: Namespace) -> None:
    """Print the tables and write them, with the picture, to PREFIX.md, .csv, .json and .png."""
    text = "\n".join(f"{table.title}\n\n{lay_out(table.rows)}\n" for table in tables)
    print(f"\n{text}")
    for table in tables:
        if told := differences(table.rows):
            print(f"compare: note: the runs on {table.name} were not all trained with the same {told}")
    rows = [{"dataset": table.name} | row for table in tables for row in table.rows]
    common.write_picture(f"{args.to}.png", common.label_panels([panel(row) for row in rows], columns=1))
    judges = {table.name: dict(sha256=table.judge_hash, accuracy=table.accuracy) for table in tables}
    results = dict(samples=args.samples, measured_with=args.arithmetic, judges=judges, rows=rows)
    names = dict.fromkeys(["dataset", "run", *COLUMNS, *itertools.chain(*rows)])
    names.pop("arithmetic", None)  # JSON alone
    writer = csv.DictWriter(sheet := io.StringIO(), names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    contents = {"md": text, "csv": sheet.getvalue(), "json": json.dumps(results, indent=1) + "\n"}
    for suffix, content in contents.items():
        with common.replacing(f"{args.to}.{suffix}") as path:
            path.write_bytes(content.encode(errors="backslashreplace"))
    print(f"compare: written to {args.to}.md, .csv, .json and .png: look at {args.to}.png")


def list_trials(script: str, args: Namespace) -> dict[Path, tuple[str, list[str]]]:
    """A grid's runs by folder: the values that vary, but for the seed, and all the script's options."""
    options, name = {"--dataset": [args.dataset]} if args.dataset else {}, ""
    for word in args.words:
        if word.startswith("--"):
            name, *values = word.split("=", 1)
            options[name] = values
        else:
            options.setdefault(name, []).append(word)
    own = [name for name in ("--out-dir", "--resume", "--sample", "--evaluate") if name in options]
    if misplaced := options.get("", []) + own:
        rule = "it trains whole runs of its own on one data set: name no others; options must follow the script"
        raise common.UserError(f"{misplaced[0]!r} has no place in a grid: {rule}")
    seeds = options.pop("--seed", ["0"])
    if args.repeat > 1:
        if len(seeds) != 1 or not seeds[0].isdigit():
            raise common.UserError("--repeat counts seeds up from one --seed: give a single whole number")
        seeds = [str(int(seeds[0]) + i) for i in range(args.repeat)]
    varied = [name for name, values in options.items() if len(values) > 1]
    options["--seed"] = seeds  # the last, so that the seeds of a combination follow each other
    where = ["--data-dir", args.data_dir] if args.data_dir else []  # the same run elsewhere
    where += [] if args.device == "auto" else ["--device", args.device]
    trials = {}
    for values in itertools.product(*(values or [""] for values in options.values())):
        chosen = dict(zip(options, values))
        label = ", ".join(f"{name[2:]} {chosen[name]}" for name in varied) or script
        parts = [f"{name[2:]}={Path(value).name}".strip("=") for name, value in chosen.items()]
        words = [word for pair in chosen.items() for word in pair if word]
        trials[Path("grids", "_".join([script, *parts]))] = label, words + where
    return trials


def train_trials(script: str, trials: dict[Path, tuple[str, list[str]]]) -> None:
    """Train what is not trained yet, one run after the other; takes out the runs that failed."""
    module, commands = importlib.import_module(script), {}
    for folder, (_, words) in trials.items():
        asked = module.parse_args(words)  # a bad option ends it here
        commands[folder] = [sys.executable, module.__file__, *words, "--out-dir", str(folder)]
        if (folder / "checkpoint.pt").exists():
            commands[folder].append("--resume")
            checkpoint = common.load_checkpoint(folder, script)
            if checkpoint["options"]["dataset"] != asked.dataset:
                raise common.UserError(f"{folder} is a run on {checkpoint['options']['dataset']}: move it away")
            if checkpoint["epoch"] >= asked.epochs:
                del commands[folder]
    print(f"compare: a grid of {len(trials)} runs in grids/; interrupted, the same command goes on", flush=True)
    progress = common.Progress(len(commands), "runs")
    for i, (folder, command) in enumerate(commands.items()):
        left = f", {progress.time_left(i)} left for all" if i else ""
        print(f"\ncompare: run {i + 1} of {len(commands)}{left}: {folder.name}", flush=True)
        if subprocess.run(command).returncode:
            print(f"compare: {folder.name} failed, and is left out")
            del trials[folder]
    if not trials:
        raise common.UserError("no run of the grid ended well")


def merge(rows: list[dict], labels: list[str]) -> list[dict]:
    """A row a label, with means and deviations (n - 1) over its runs."""
    merged = []
    for label in dict.fromkeys(labels):
        seeds = [row for row, own in zip(rows, labels) if own == label]
        row = seeds[0] | {"run": label}
        if len(seeds) > 1:
            row |= {"seeds": len(seeds), "arithmetic": [part for seed in seeds for part in seed["arithmetic"]]}
            for name in COLUMNS:
                values = [seed[name] for seed in seeds if name in seed]
                if len(set(values)) > 1:
                    row |= {name: statistics.fmean(values), f"{name} deviation": statistics.stdev(values)}
        merged.append(row)
    return merged


def run(args: Namespace) -> None:
    """Measure the runs that were named, or train a grid's, rank them and print the command of the best."""
    device = common.choose_device(args)
    autocast = common.choose_autocast(args, device)
    if args.grid is None:  # not all shells expand runs/*
        folders = [folder for name in args.words for folder in sorted(glob.glob(name)) or [name]]
        tables = compare(folders, args, device, autocast)
        for table in tables:
            table.rows[1:] = merge(table.rows[1:], [re.sub(r"-seed\d+$", "", row["run"]) for row in table.rows[1:]])
        report(tables, args)
        return
    script = Path(__file__).with_name(args.grid.removesuffix(".py") + ".py")
    trials = list_trials(script.stem, args)
    train_trials(script.stem, trials)
    tables = compare(list(trials), args, device, autocast)
    by_name = {folder.name: trial for folder, trial in trials.items()}
    best = []
    for table in tables:  # several, if the size of the images varies
        labels = [by_name[row["run"]][0] for row in table.rows[1:]]
        table.rows[1:] = sorted(merge(table.rows[1:], labels), key=lambda row: row["Frechet"])
        best.append(next(words for label, words in trials.values() if label == table.rows[1]["run"]))
    report(tables, args)
    for table, words in zip(tables, best):
        command = ["python", script.name if script.parent == Path.cwd() else str(script), *words]
        print(f"compare: best on {table.name} by Frechet distance: {shlex.join(command)}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Our options, and as `words` all others in order: folders, or what follows --grid SCRIPT."""
    usage = "compare.py [options] RUN ... | compare.py [options] --grid SCRIPT [its options, with several values]"
    parser = common.Parser("compare.py", __doc__, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = (__doc__ or "").partition("\n\n")[2]  # it explains the columns
    add = parser.add_argument
    add("--grid", nargs="?", const="", metavar="SCRIPT", help="train all combinations of SCRIPT's options; rank them")
    add("--repeat", type=common.number(int, 1), default=1, metavar="N", help="seeds of each combination (1)")
    add("--samples", type=common.number(int, 100), default=SAMPLES, metavar="N", help="drawn of each run (10,000)")
    prefix = "writes PREFIX.md, .csv, .json and .png (comparison)"
    add("--to", type=os.path.expanduser, default="comparison", metavar="PREFIX", help=prefix)
    add("--data-dir", type=common.absolute_path, metavar="DIR", help="folder of data sets and judges (each run's)")
    moved = "pictures: of which data set (mnist); a run on a folder: where its images are now"
    add("--dataset", metavar="NAME", help=moved)
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes an accelerator if any")
    parser.set_defaults(script="compare", precision="auto", arithmetic={})
    args, args.words = parser.parse_known_args(argv)
    if args.grid is None and (args.repeat > 1 or not args.words):
        parser.error("name the folders of the runs to compare, as runs/*, or with --grid SCRIPT what to train")
    if args.grid is not None and args.grid.removesuffix(".py") not in scripts():
        parser.error(f"--grid takes one of {', '.join(sorted(f'{name}.py' for name in scripts()))}")
    return args


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors("compare.py"):
        try:
            run(parse_args(argv))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted: the same command goes on with a grid, else starts anew") from None


if __name__ == "__main__":
    main()
