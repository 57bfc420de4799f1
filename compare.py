"""Compare finished runs by figures: what the reports judged by eye, measured, with nothing to download.

    python compare.py runs/*                         # the table of all runs, and comparison.{md,csv,json,png}
    python compare.py runs/* --to assets/results     # the same as assets/results.{md,csv,json,png}
    python compare.py --grid gan.py --lr 1e-4 2e-4 3e-4 --batch-size 64 128 --epochs 5     # a grid search
    python compare.py --grid vae.py --epochs 5 --repeat 3               # mean and deviation over three seeds

10,000 samples of each run, rounded to bytes as a file would hold them, meet the test images. The row "real
images" puts real training images in the samples' place (of a folder, one half of it meets the other): the
floor of every column.

    parameters     weights of all networks; epochs, minutes and images/s are from the run's own log
    Frechet        Frechet distance of the features of real images and samples, in percent of the real ones' variance:
                   100 is the score of a model that repeats one image with average features (Heusel et al. 2017)
    precision      share of the samples that lie among real images: quality (Kynkäänniemi et al. 2019)
    recall         share of the real images that lie among samples: variety; both with k = 3 and 5,000 images
    classes        how many of the classes get at least a tenth of their real share of the samples
    KL [nats]      divergence of the samples' shares of the classes from the real ones: 0 is perfect
    sharpness      slope of the edges, over that of real images; below 1 is blurred
    noise          size of lone pixels, brighter or darker than all eight around, over that of real images;
                   above 1 is speckled
    walk           evenness of 16 steps between two latents, in features: 1 when all are equal, 1/16 for one jump
    agreement      share of the samples in which the judge sees the class that was asked for
    ELBO, bound    bounds on log p(x) of the test images, in nats; the importance-weighted one is measured by its
                   gap above the ELBO on 250 of them
    Wasserstein    sliced Wasserstein distance of 7x7 patches at every scale, times 1,000 (Karras et al. 2018)

Features are those of the judge, a small network trained once on the training images, kept as judge-NAME.pt
in the data folder. With labels it classifies (99.4 % of MNIST's test images right), badly drawn images too,
so that blur and speckle are not taken for another class. A folder of images has no labels: there the judge
learns to know an image by any crop of it (Chen et al. 2020). It looks at 32x32 pixels, so that it can tell
whether poses, colours and layouts are real and varied, but not whether fine detail is right: Wasserstein and
sharpness can, and these know nothing of layout. Figures of two judges, or of two data sets, don't compare.
On two cores the judge takes 105 seconds, once, and each run of linear layers five to ten.

A script joins by its function `load_sampler(checkpoint, device) -> common.Sampler` and by nothing else.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

import csv
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common

SAMPLES = 10_000
NEIGHBOURHOODS = 5_000  # images of each side for precision and recall, whose values depend on it
WALKS, STEPS = 200, 16
BOUND_IMAGES = 250  # test images on which the gap between both bounds is measured: 500 decodings each
JUDGE = dict(version=1, batch_size=256, lr=5e-3, widths=[32, 64, 128], features=128, shift=2, temperature=0.2)

# figure: digits after the point
COLUMNS = {
    "parameters": 0, "epochs": 0, "minutes": 1, "images/s": 0, "Frechet": 2, "precision": 3, "recall": 3, "classes": 0,
    "KL [nats]": 3, "Wasserstein": 1, "sharpness": 2, "noise": 2, "walk": 3, "agreement": 4, "ELBO [nats]": 1,
    "bound [nats]": 1,
}  # fmt: skip

# -------------------------------------------------------------------------------------------------- the judge


class Judge(nn.Module):
    """Images (N, C, H, W) in [0, 1] to features (N, 128); these to logits of ten classes, or to 64 numbers."""

    def __init__(self, data: common.Data):
        super().__init__()
        inputs, self.size = data.images.shape[1], min(data.images.shape[-1], 32)
        layers: list[nn.Module] = []
        for width in JUDGE["widths"]:
            convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = width
        side, features = self.size // 8, JUDGE["features"]
        layers += [nn.Flatten(), nn.Linear(inputs * side * side, features, bias=False)]
        self.trunk = nn.Sequential(*layers, nn.BatchNorm1d(features), nn.ReLU())
        self.head = nn.Linear(features, 64 if data.labels is None else 10)
        self.to(memory_format=torch.channels_last)

    def shrink(self, images: Tensor) -> Tensor:
        """uint8 of any size to floats in [0, 1] of at most 32x32."""
        images = common.to_unit(images)
        return images if images.shape[-1] == self.size else F.adaptive_avg_pool2d(images, self.size)

    @torch.no_grad()
    def look(self, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """uint8 (N, C, H, W) to features float64 (N, 128) and the class, or largest output, (N,): on the CPU."""
        self.eval()
        features, classes = [], []
        for chunk in images.split(500):
            found = self.trunk(self.shrink(chunk.to(device)))
            features.append(found.cpu().double())
            classes.append(self.head(found).argmax(1).cpu())
        return torch.cat(features), torch.cat(classes)


def contrastive_loss(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Every projection (N, d) must find its partner among 2N - 1, in nats (Chen et al. 2020, 2002.05709, eq. 1)."""
    both = F.normalize(torch.cat([one, other]))  # (2N, d)
    logits = both @ both.T / temperature
    logits = logits.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(both), device=both.device).roll(len(one)))


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` whole pixels either way, zeros moving in: (N, C, H, W) to the same."""
    n, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4).permute(0, 2, 3, 1)  # (N, H + 2 most, W + 2 most, C)
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1, 1), device=images.device)
    rows = down + torch.arange(height, device=images.device)[:, None]
    columns = right + torch.arange(width, device=images.device)
    return padded[torch.arange(n, device=images.device)[:, None, None], rows, columns].permute(0, 3, 1, 2)


def worsened(images: Tensor) -> Tensor:
    """Images (N, C, H, W) blurred, dimmed and speckled, each half of the time, by random amounts.

    A badly drawn eight is an eight to the eye; to a classifier of clean images it is a one.
    """
    much = (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1).clamp(min=0)
    blurred = F.avg_pool2d(F.avg_pool2d(images, 3, 1, 1), 3, 1, 1)
    dimmed = images.lerp(blurred, much[0]) * (1 - 0.7 * much[1])
    return dimmed + 0.3 * much[2] * torch.randn_like(images)


def cropped(images: Tensor) -> Tensor:
    """A random crop of each image, half to all of its side, perhaps mirrored, its channels 20 % more or less."""
    n, channels = images.shape[:2]
    sides = torch.empty(n, 1, device=images.device).uniform_(0.5, 1)
    corners = torch.empty(n, 2, device=images.device).uniform_(-1, 1) * (1 - sides)
    maps = torch.zeros(n, 2, 3, device=images.device)
    maps[:, 0, 0] = sides[:, 0] * (torch.randint(0, 2, (n,), device=images.device) * 2 - 1)
    maps[:, 1, 1], maps[:, :, 2] = sides[:, 0], corners
    crops = F.grid_sample(images, F.affine_grid(maps, images.shape, align_corners=False), align_corners=False)
    return crops * torch.empty(n, channels, 1, 1, device=images.device).uniform_(0.8, 1.2)


def train_judge(data: common.Data, compute: common.Compute, steps: int) -> Judge:
    """A classifier of shifted images, or without labels a network that knows an image by any crop of it."""
    common.seed_everything(0)
    judge = Judge(data).to(compute.device)
    optimizer = torch.optim.AdamW(judge.parameters(), JUDGE["lr"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, JUDGE["lr"], total_steps=steps)
    progress = common.Progress(steps, "steps of the judge")
    for step in range(steps):
        picked = torch.randperm(len(data.images))[: JUDGE["batch_size"]]
        images = judge.shrink(data.images[picked].to(compute.device)).contiguous(memory_format=torch.channels_last)
        with compute.autocast():
            if data.labels is None:
                views = torch.cat([cropped(images), cropped(images)])
                outputs = judge.head(judge.trunk(views)).float()
                loss = contrastive_loss(*outputs.chunk(2), JUDGE["temperature"])
            else:
                logits = judge.head(judge.trunk(worsened(shifted(images, JUDGE["shift"])))).float()
                loss = F.cross_entropy(logits, data.labels[picked].to(compute.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1)
    return judge.eval()


def load_judge(name: str, data: common.Data, data_dir: str, compute: common.Compute) -> Judge:
    """The judge of a data set, kept in the data folder; trained anew when its settings or the images change."""
    path = Path(data_dir, f"judge-{name}.pt")
    some = data.images[:: math.ceil(len(data.images) / 1000)].contiguous()
    images = f"{list(data.images.shape)} {hashlib.sha256(some.numpy().tobytes()).hexdigest()}"
    settings = JUDGE | dict(images=images, steps=judge_steps(data))
    judge = Judge(data).to(compute.device)
    try:
        kept = torch.load(path, map_location=compute.device, weights_only=True)
        if kept["settings"] == settings:
            judge.load_state_dict(kept["weights"])
            return judge.eval()
    except Exception:  # absent, or damaged in any way: it can always be made again
        pass
    print(f"training the judge of {name}, once: it is kept as {path}", flush=True)
    judge = train_judge(data, compute, settings["steps"])
    buffer = io.BytesIO()
    torch.save(dict(settings=settings, weights=judge.state_dict()), buffer)
    try:
        with common.replacing(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except common.UserError as error:  # a shared data folder may be read-only
        print(f"compare: the judge is not kept: {error}")
    return judge


def judge_steps(data: common.Data) -> int:
    """Five epochs of MNIST; more of smaller sets."""
    return min(1200, max(250, len(data.images) // 50))


# ----------------------------------------------------------------------------------------------- the measures


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, d), (M, d) (Heusel et al. 2017, 1706.08500, eq. 6).

    C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2); the sum of their roots is the last trace.
    """
    one, other = one.double(), other.double()
    covariance, covariance2 = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    squares = (one.mean(0) - other.mean(0)).square().sum()
    return (squares + covariance.trace() + covariance2.trace() - 2 * cross).item()


def lies_among(points: Tensor, others: Tensor, k: int = 3) -> float:
    """Share of points (N, d) nearer to one of others (M, d) than is its own k-th neighbour among the others."""
    # The nearest of all is the point itself.
    reach = torch.cat([torch.cdist(chunk, others).kthvalue(k + 1).values for chunk in others.split(1000)])
    inside = [(torch.cdist(chunk, others) <= reach).any(1) for chunk in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def precision_and_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Of features (N, d), share of fake among real and the reverse (Kynkäänniemi et al. 2019, 1904.06991, eq. 2)."""
    return lies_among(fake, real), lies_among(real, fake)


def class_figures(shares: Tensor, real_shares: Tensor) -> tuple[int, float]:
    """Shares (classes,): classes with a tenth of their real share or more; KL(shares || real shares) in nats."""
    covered = (shares >= real_shares / 10) & (shares > 0)
    return int(covered.sum()), torch.special.xlogy(shares, shares / real_shares).sum().item()


def split_speckle(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) as calm + speckle: calm has every pixel within the range of the eight around it."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    places = [place for place in itertools.product(range(3), range(3)) if place != (1, 1)]
    around = torch.stack([padded[..., y : y + height, x : x + width] for y, x in places])  # (8, N, C, H, W)
    calm = images.clamp(around.amin(0), around.amax(0))
    return calm, images - calm


def texture(images: Tensor) -> tuple[float, float]:
    """Slope of the edges [brightness a pixel] and size of the speckle [brightness, 0 to 1] of uint8 (N, C, H, W).

    The slope is sum g^3 / sum g^2 over the gradients g of the images without speckle: an edge of height h that
    takes w pixels counts as h / w, however many edges there are, and faint ripples hardly count. The size of
    the speckle is the root of its mean square.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in images.split(250):
        calm, speckle = split_speckle(common.to_unit(chunk))
        across, down = calm.diff(dim=3)[..., :-1, :], calm.diff(dim=2)[..., :-1]
        squares = across.square() + down.square()
        sums += torch.stack([squares.pow(1.5).sum(), squares.sum(), speckle.square().sum()]).double()
    return (sums[0] / sums[1].clamp(min=1e-12)).item(), (sums[2] / images.numel()).sqrt().item()


def evenness(features: Tensor) -> float:
    """(sum d)^2 / (n sum d^2) of the n steps d of each walk (W, n + 1, f), mean: 1 if equal, 1/n for one jump."""
    steps = features.diff(dim=1).norm(dim=2).double()  # (W, n)
    return (steps.sum(1).square() / (steps.shape[1] * steps.square().sum(1)).clamp(min=1e-12)).mean().item()


def interpolate(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Latents (W, d) to (W, count, d) on the arc between them: a chord would leave the likely lengths (White 2016)."""
    along = torch.linspace(0, 1, count)[:, None]
    angle = F.cosine_similarity(start, end).clamp(-0.9999, 0.9999).acos()[:, None, None]
    start, end = start[:, None], end[:, None]
    return (((1 - along) * angle).sin() * start + (along * angle).sin() * end) / angle.sin()


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Images (N, C, H, W): what each halving of the size loses, down to at least 16 pixels, then what is left."""
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = (taps[:, None] * taps).expand(images.shape[1], 1, 5, 5)
    levels = []
    while images.shape[-1] >= 32:
        padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
        smaller = F.conv2d(padded, kernel, stride=2, groups=images.shape[1])
        levels.append(images - F.interpolate(smaller, images.shape[-2:], mode="bilinear", align_corners=False))
        images = smaller
    return [*levels, images]


def patches(images: Tensor, per_image: int, generator: torch.Generator) -> Tensor:
    """Random 7x7 patches of (N, C, H, W): (N * per_image, 7, 7, C)."""
    n, _, height, width = images.shape
    which = torch.arange(n).repeat_interleave(per_image)[:, None, None]
    rows = torch.randint(height - 6, (len(which), 1, 1), generator=generator) + torch.arange(7)[:, None]
    columns = torch.randint(width - 6, (len(which), 1, 1), generator=generator) + torch.arange(7)
    return images.permute(0, 2, 3, 1)[which, rows, columns]


def sliced_distance(one: Tensor, other: Tensor, directions: int = 256) -> float:
    """Sliced Wasserstein-1 distance of two sets of N points (N, d): the mean over random directions."""
    lines = F.normalize(torch.randn(one.shape[1], directions, generator=torch.Generator().manual_seed(0)), dim=0)
    distances = [
        ((one @ some).sort(dim=0).values - (other @ some).sort(dim=0).values).abs().mean(0)
        for some in lines.split(32, dim=1)
    ]
    return torch.cat(distances).mean().item()


def sliced_wasserstein(real: Tensor, fake: Tensor, per_image: int = 16) -> float:
    """Sliced Wasserstein distance of uint8 images (N, C, H, W), mean over the levels of the pyramid, times 1,000.

    Both sides are standardised by the real patches' mean and deviation of each channel. Karras et al. (2018,
    arXiv 1710.10196, section 5) standardise each by its own, which forgives a lack of contrast in details: blur.
    """
    count = min(len(real), len(fake), NEIGHBOURHOODS)
    generator, distances = torch.Generator().manual_seed(0), []
    pyramids = [laplacian_pyramid(common.to_unit(images[:count])) for images in (real, fake)]
    for levels in zip(*pyramids):
        one, other = (patches(level, per_image, generator) for level in levels)
        mean, deviation = one.mean((0, 1, 2)), one.std((0, 1, 2)).clamp(min=1e-8)
        distances.append(sliced_distance(*(((side - mean) / deviation).flatten(1) for side in (one, other))))
    return 1000 * statistics.fmean(distances)


# ------------------------------------------------------------------------------------- the reals and the runs


class Reals(NamedTuple):
    """What the samples of one data set are measured against."""

    name: str
    images: Tensor  # test images uint8 (N, C, H, W) in random order; of a folder, one half of the images
    floor: common.Data  # training images in random order, at most SAMPLES; of a folder, the other half
    judge: Judge
    features: Tensor  # of the images, float64 (N, 128), scaled to a total variance of 100
    scale: float  # of the judge's features to these
    shares: Tensor | None  # of the classes, as the judge sees them
    accuracy: float | None  # of the judge on the test images
    texture: tuple[float, float]  # slope and speckle of the images


def load_reals(dataset: str, size: int | None, data_dir: str, compute: common.Compute) -> Reals:
    """Test images, floor and judge of a data set. Raises UserError when the data is absent or has under 20 images."""
    name = Path(dataset).name + (f"-{size}" if size else "")
    data = common.load_data(dataset, data_dir, size=size)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.images), generator=generator)
    if len(order) < 20:
        raise common.UserError(f"{dataset} has {len(order)} images: too few to compare with")
    if data.labels is None:
        images, order = data.images[order[: len(order) // 2][:SAMPLES]], order[len(order) // 2 :]
    else:
        test = common.load_data(dataset, data_dir, train=False)
        shuffle = torch.randperm(len(test.images), generator=generator)[:SAMPLES]
        images, labels = test.images[shuffle], test.labels[shuffle]
    picked = order[:SAMPLES]
    floor = common.Data(data.images[picked], None if data.labels is None else data.labels[picked])
    judge = load_judge(name, data, data_dir, compute)
    features, classes = judge.look(images, compute.device)
    scale = 10 / features.var(0).sum().sqrt().item()
    shares = accuracy = None
    if data.labels is not None:
        shares = classes.bincount(minlength=10).clamp(min=1) / len(classes)
        accuracy = (classes == labels).double().mean().item()
    return Reals(name, images, floor, judge, features * scale, scale, shares, accuracy, texture(images))


class Run(NamedTuple):
    name: str
    dataset: str
    size: int | None
    sampler: common.Sampler
    figures: dict[str, float]  # what is known without measuring


def load_run(folder: str | Path, device: torch.device) -> Run:
    """A run from its folder. UserError when it has no checkpoint, or one that is damaged or of no script here."""
    folder = Path(folder)
    if not (folder / "checkpoint.pt").is_file():
        raise common.UserError(f"{folder} holds no run: there is no checkpoint.pt in it")
    checkpoint = common.load_checkpoint(folder)
    script, options = checkpoint["script"], checkpoint["options"]
    # The checkpoint may be anybody's: it may name no code but the scripts beside this one.
    if not isinstance(script, str) or script not in scripts():
        raise common.UserError(f"{folder} is a run of {script!r}: there is no such script here")
    try:
        sampler = importlib.import_module(script).load_sampler(checkpoint, device)
        history, dataset = checkpoint["history"], str(options["dataset"])
        figures = {
            "parameters": sampler.parameters,
            "epochs": len(history),
            "minutes": sum(row["seconds"] for row in history) / 60,
            "images/s": statistics.median(row["images per second"] for row in history),
        }
        if len(history) < options["epochs"]:
            figures["epochs asked"] = options["epochs"]
        size = None if dataset in common.LABELLED else options["image_size"]
        return Run(folder.resolve().name, dataset, size, sampler, figures)
    except common.UserError as error:
        raise common.UserError(f"{folder}: {error}") from error
    except Exception as error:  # a damaged checkpoint raises whatever its contents lead to
        raise common.UserError(f"{folder}: the checkpoint is damaged ({type(error).__name__}: {error})") from error


def scripts() -> set[str]:
    """The models here: the Python files beside this one that define load_sampler."""
    files = Path(__file__).parent.glob("*.py")
    return {file.stem for file in files if "\ndef load_sampler(" in file.read_text(encoding="utf-8")}


def measure(images: Tensor, labels: Tensor | None, reals: Reals, device: torch.device) -> dict[str, float]:
    """All figures of samples, uint8 (N, C, H, W), that need nothing but them; labels (N,) are the classes asked for."""
    features, classes = reals.judge.look(images, device)
    features = features * reals.scale
    few = min(len(features), len(reals.features), NEIGHBOURHOODS)
    figures = {"Frechet": frechet_distance(reals.features, features)}
    figures["precision"], figures["recall"] = precision_and_recall(reals.features[:few].float(), features[:few].float())
    if reals.shares is not None:
        shares = classes.bincount(minlength=len(reals.shares)) / len(classes)
        figures["classes"], figures["KL [nats]"] = class_figures(shares, reals.shares)
    else:
        figures["Wasserstein"] = sliced_wasserstein(reals.images, images)
    slope, speckle = texture(images)
    figures["sharpness"], figures["noise"] = slope / reals.texture[0], speckle / max(reals.texture[1], 1e-12)
    if labels is not None:
        figures["agreement"] = (classes == labels).double().mean().item()
    return figures


def walk(sampler: common.Sampler, count: int, steps: int, device: torch.device) -> Tensor:
    """Images on `count` walks between random latents, of one class each: uint8 (count, steps + 1, C, H, W)."""
    start, end = torch.randn(2, count, sampler.latent_size, generator=torch.Generator().manual_seed(1))
    latents = interpolate(start, end, steps + 1)  # (count, steps + 1, latent_size)
    pictures = []
    for i, path in enumerate(latents):
        labels = torch.full((steps + 1,), i % sampler.classes, device=device) if sampler.classes else None
        pictures.append(common.to_bytes(sampler.generate(path.to(device), labels)))
    return torch.stack(pictures)


def measure_run(run: Run, reals: Reals, count: int, device: torch.device) -> tuple[dict, list[Tensor]]:
    """All figures of a run, and the pictures that show it: twelve samples, then a walk in eight."""
    chunks, progress = [], common.Progress(count, f"samples of {run.name}")
    for chunk in common.draw(run.sampler, count, 0, device):
        chunks.append(chunk)
        progress.update(sum(len(images) for images, _ in chunks))
    images = torch.cat([images for images, _ in chunks])
    labels = torch.cat([labels for _, labels in chunks]) if run.sampler.classes else None
    figures = run.figures | measure(images, labels, reals, device)
    walks = walk(run.sampler, WALKS, STEPS, device)
    features, _ = reals.judge.look(walks.flatten(0, 1), device)
    figures["walk"] = evenness(features.view(WALKS, STEPS + 1, -1))
    if run.sampler.evaluate is not None:
        common.seed_everything(0)
        figures |= bounds(run.sampler.evaluate, reals.images)
    return figures, [*images[:12], *walks[1, torch.linspace(0, STEPS, 8).long()]]


def bounds(evaluate: Callable, images: Tensor) -> dict[str, float]:
    """ELBO of all images in one sample each; the bound is that plus its mean gap above the ELBO on a few images."""
    elbo = next(iter(evaluate(images, 1).values()))
    few_elbo, few_bound = evaluate(images[:BOUND_IMAGES]).values()
    return {"ELBO [nats]": elbo, "bound [nats]": elbo + few_bound - few_elbo}


# ------------------------------------------------------------------------------------------------- the report


class Table(NamedTuple):
    """One data set's rows, the floor first: "run" and the figures, and "FIGURE deviation" over several seeds."""

    reals: Reals
    rows: list[dict]
    pictures: list[list[Tensor]]  # of each row: uint8 (C, H, W)


def compare(runs: list[Run], args: Namespace, compute: common.Compute) -> list[Table]:
    """Measure runs: a table for each data set among them."""
    groups: dict = {}
    for run in runs:
        groups.setdefault((run.dataset, run.size), []).append(run)
    tables, done = [], 0
    for (dataset, size), members in groups.items():
        reals = load_reals(dataset, size, args.data_dir, compute)
        floor = measure(reals.floor.images, reals.floor.labels, reals, compute.device)
        table = Table(reals, [{"run": "real images"} | floor], [list(reals.floor.images[:20])])
        for run in members:
            done += 1
            print(f"compare: measuring {run.name}, {done} of {len(runs)}", flush=True)
            figures, pictures = measure_run(run, reals, args.samples, compute.device)
            table.rows.append({"run": run.name} | figures)
            table.pictures.append(pictures)
        tables.append(table)
    return tables


def title(table: Table) -> str:
    reals = table.reals
    if reals.accuracy is None:
        return f"{reals.name}: measured against {len(reals.images):,} images"
    return f"{reals.name}: measured against {len(reals.images):,} test images, {reals.accuracy:.2%} known to the judge"


def cell(row: dict, name: str) -> str:
    """A figure as the tables show it: empty where there is none, with its deviation where there is one."""
    if name not in row:
        return ""
    if name == "epochs" and "epochs asked" in row:
        return f"{row[name]:.0f} of {row['epochs asked']:.0f}"
    deviation = row.get(f"{name} deviation")
    digits = COLUMNS[name] if not deviation else max(1, COLUMNS[name])
    return f"{row[name]:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if deviation else "")


def lay_out(table: Table, markdown: bool) -> str:
    """The table in aligned columns, without those that no run fills."""
    names = [name for name in COLUMNS if any(name in row for row in table.rows[1:])]
    lines = [["run", *names], *([row["run"], *(cell(row, name) for name in names)] for row in table.rows)]
    if markdown:
        lines.insert(1, ["---", *["--:"] * len(names)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" if markdown else "  ".join(line) for line in padded)


def draw_rows(tables: list[Table]) -> Image.Image:
    """Each row's pictures under its name and main figures: twelve samples and a walk, or twenty real images."""
    panels = []
    for table in tables:
        for row, pictures in zip(table.rows, table.pictures):
            shown = ("Frechet", "precision", "recall", "classes", "sharpness", "noise", "walk")
            caption = "    ".join([row["run"], *(f"{name} {cell(row, name)}" for name in shown if name in row)])
            tiles = common.to_unit(torch.stack(pictures))
            tiles = F.interpolate(tiles, scale_factor=max(1, 64 // tiles.shape[-1]), mode="nearest")
            samples, walked = common.grid(tiles[:12], 12), common.grid(tiles[12:], 8)
            gap = torch.ones(*samples.shape[:2], 12)
            panels.append((caption.replace("±", "+-"), common.to_picture(torch.cat([samples, gap, walked], dim=2))))
    return common.label_panels(panels, columns=1)


def report(tables: list[Table], args: Namespace) -> None:
    """Print the tables and write them, with the picture, to PREFIX.md, .csv, .json and .png."""
    for table in tables:
        print(f"\n{title(table)}\n{lay_out(table, markdown=False)}")
    rows = [{"dataset": table.reals.name} | row for table in tables for row in table.rows]
    with common.replacing(f"{args.to}.md") as path:
        text = "\n".join(f"{title(table)}\n\n{lay_out(table, markdown=True)}\n" for table in tables)
        path.write_text(text, encoding="utf-8")
    with common.replacing(f"{args.to}.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        names = {name: None for row in rows for name in row}
        writer = csv.DictWriter(file, sorted(names, key=["dataset", "run", *COLUMNS, *names].index))
        writer.writeheader()
        writer.writerows(rows)
    judges = {table.reals.name: table.reals.accuracy for table in tables}
    results = dict(samples=args.samples, torch=torch.__version__, judge_accuracy=judges, rows=rows)
    with common.replacing(f"{args.to}.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    common.write_picture(f"{args.to}.png", draw_rows(tables))
    print(f"\ncompare: written to {args.to}.md, .csv, .json and .png: look at {args.to}.png")


# ---------------------------------------------------------------------------------------------- grid searches


class Trial(NamedTuple):
    """One combination of a grid, with one seed."""

    label: str  # the values that vary, but the seed
    words: list[str]  # the script's options, but seed and folder
    seed: list[str]
    folder: Path


def list_trials(script: str, options: dict[str, list[str]], repeat: int) -> list[Trial]:
    """Every combination of the options' values, `repeat` seeds each. Options without a value stay as they are."""
    for name in ("--out-dir", "--resume", "--sample", "--evaluate"):
        if name in options:
            raise common.UserError(f"{name} has no place in a grid, whose runs have folders and resume by themselves")
    if len(options.get("--dataset", [])) > 1:
        raise common.UserError("a grid ranks runs on one data set: give --dataset one value")
    seeds = options.get("--seed") or ["0"]
    if repeat > 1:
        if len(seeds) > 1 or not seeds[0].isdigit():
            raise common.UserError("--repeat counts seeds up from one --seed: give a single whole number")
        seeds = [str(int(seeds[0]) + i) for i in range(repeat)]
    axes = {name: values for name, values in options.items() if name != "--seed"}
    trials = []
    for values in itertools.product(*(values or [None] for values in axes.values())):
        pairs = dict(zip(axes, values))
        label = ", ".join(f"{name[2:]} {value}" for name, value in pairs.items() if len(axes[name]) > 1)
        words = [word for pair in pairs.items() for word in pair if word is not None]
        # Where the data lie and what computes do not make another run.
        defining = {name: value for name, value in pairs.items() if name not in ("--data-dir", "--device")}
        for seed in seeds:
            parts = [f"{name[2:]}={Path(value).name}" if value else name[2:] for name, value in defining.items()]
            folder = Path("grids", "_".join([script, *parts, f"seed={seed}"]))
            trials.append(Trial(label or script, words, ["--seed", seed], folder))
    return trials


def train_trials(script: str, trials: list[Trial]) -> list[Trial]:
    """Train what is not trained yet, one run after the other; returns the trials that ended well."""
    module = importlib.import_module(script)
    epochs = [module.parse_args([*trial.words, *trial.seed]).epochs for trial in trials]  # a bad option ends it here
    finished, spent, trained = [], 0.0, 0
    for i, (trial, asked) in enumerate(zip(trials, epochs)):
        begun = (trial.folder / "checkpoint.pt").exists()
        if not begun or common.load_checkpoint(trial.folder, script)["epoch"] < asked:
            left = f", about {common.clock(spent / trained * (len(trials) - i))} left" if trained else ""
            print(f"\ncompare: run {i + 1} of {len(trials)}: {trial.folder.name}{left}", flush=True)
            start = time.monotonic()
            command = [*trial.words, *trial.seed, "--out-dir", str(trial.folder), *(["--resume"] if begun else [])]
            status = subprocess.run([sys.executable, module.__file__, *command]).returncode
            spent, trained = spent + time.monotonic() - start, trained + 1
            if status in (130, -2):
                raise KeyboardInterrupt("interrupted: the same command goes on with the grid")
            if status:
                print(f"compare: {trial.folder.name} failed, and is left out")
                continue
        finished.append(trial)
    if not finished:
        raise common.UserError("no run of the grid ended well")
    return finished


def rank(table: Table, trials: list[Trial]) -> Table:
    """One row a combination, means and deviations over its seeds, the smallest Frechet distance first."""
    ranked = []
    for label in dict.fromkeys(trial.label for trial in trials):
        places = [i for i, trial in enumerate(trials, start=1) if trial.label == label]
        row: dict = {"run": label}
        for name in (name for name in COLUMNS if name in table.rows[places[0]]):
            values = [float(table.rows[i][name]) for i in places]
            row[name] = statistics.fmean(values)
            if len(values) > 1:
                row[f"{name} deviation"] = statistics.stdev(values)
        ranked.append((row, table.pictures[places[0]]))
    ranked.sort(key=lambda pair: pair[0]["Frechet"])
    rows, pictures = zip((table.rows[0], table.pictures[0]), *ranked)
    return Table(table.reals, list(rows), list(pictures))


# ------------------------------------------------------------------------------------------- the command line


def search(args: Namespace) -> None:
    """Train the grid, rank it, and print the command of its best run."""
    compute = common.choose_compute(args)
    trials = train_trials(args.grid, list_trials(args.grid, args.options, args.repeat))
    runs = [load_run(trial.folder, compute.device) for trial in trials]
    tables = [rank(compare(runs, args, compute)[0], trials)]
    report(tables, args)
    best = next(trial for trial in trials if trial.label == tables[0].rows[1]["run"])
    print(f"compare: best by Frechet distance: python {args.grid}.py {' '.join(best.words + best.seed)}")


def study(args: Namespace) -> None:
    """Measure the runs that were named."""
    if not args.runs:
        raise common.UserError("name the folders of the runs to compare: python compare.py runs/*")
    folders = [folder for name in args.runs for folder in sorted(glob.glob(name)) or [name]]  # not all shells do it
    compute = common.choose_compute(args)
    report(compare([load_run(folder, compute.device) for folder in folders], args, compute), args)


def take_grid(argv: list[str]) -> tuple[list[str], str | None, dict[str, list[str]]]:
    """Split a command line into our own words, the script that --grid names, and its options with their values."""
    if "--grid" not in argv:
        return argv, None, {}
    place = argv.index("--grid")
    own, words = argv[:place], argv[place + 2 :]
    script = "".join(argv[place + 1 : place + 2]).removesuffix(".py")
    if script not in scripts():
        raise common.UserError(f"--grid takes one of {', '.join(sorted(f'{name}.py' for name in scripts()))}")
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            options[name] = [value] if value else []
        elif not options:
            raise common.UserError(f"--grid {script}.py: options of {script}.py must follow, not {word!r}")
        else:
            options[list(options)[-1]].append(word)
    for name in ("--to", "--repeat", "--samples", "--data-dir", "--device"):
        own += [name, *options[name]] if name in options else []
    for name in ("--to", "--repeat", "--samples"):
        options.pop(name, None)
    return own, script, options


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = common.Parser("compare.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders of runs, such as runs/*")
    add("--grid", metavar="SCRIPT", help="train SCRIPT with all combinations of the options that follow; rank them")
    add("--repeat", type=common.number(int, 1), default=1, metavar="N", help="seeds of each combination (1)")
    add("--samples", type=common.number(int, 100), default=SAMPLES, metavar="N", help="drawn of each run (10,000)")
    add("--to", default="comparison", metavar="PREFIX", help="writes PREFIX.md, .csv, .json and .png (comparison)")
    add("--data-dir", default="data", metavar="DIR", help="folder of the data sets and judges (data)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto takes an accelerator if any")
    try:
        own, script, options = take_grid(list(sys.argv[1:] if argv is None else argv))
        args = parser.parse_args(own)
        if script and args.runs:
            raise common.UserError("--grid trains its own runs: name no others")
        if args.repeat > 1 and not script:
            raise common.UserError("--repeat trains: give --grid SCRIPT too")
        if script:
            list_trials(script, options, args.repeat)
    except common.UserError as error:
        parser.error(str(error))
    args.grid, args.options, args.script, args.precision = script, options, "compare", "auto"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    common.run_command(search if args.grid else study, args)


if __name__ == "__main__":
    main()
