"""The whole study: all rows of its table trained at the reports' lengths, kept, compared, and what they claim.

    python tests/study.py --data-dir data --out-dir runs                # all; resumes whatever was stopped
    python tests/study.py --data-dir data gan-guo-mnist                 # some
    python tests/study.py --data-dir data --epochs 2                    # a rehearsal
    python tests/study.py --keep runs/*-mnist                           # into assets/trained, 16 bits a weight
    python tests/study.py --figure runs/gan runs/vae --to figure.png    # samples of trained runs, side by side
    python tests/study.py --claims runs/*-mnist                         # what the reports say and no table column shows

Names are the table's; NAME-seed1 and NAME-seed2 are two more seeds of the rows that cost less than three core-hours.
The conventional rows are the loops of conventional.py, as the reports' notebooks have them: what is reproduced.

--claims prints a line a run on a data set with classes, by the judge of compare.py:

    unsure   share of 10,000 samples whose class has less than 0.9 of the judge's trust, that of real test images,
             and the commonest pairs of classes among those samples
    kept     share of the 64 fixed latents whose pictures show the same class after both epochs named
    last     the last epoch's row of the log
    losses   VAE: of 10,000 training and of all test images, in nats, both without dropout
    morphs   CVAE-GAN: evenness of the way from each class to the next, latent and label together (compare.py's walk),
             and the shares of its change, in features, that fall in each quarter of the way
    styles   CVAE-GAN: test images' latents under the nine other labels: share in which the judge sees that label, and
             how much stays of an image's ink and slant (correlation over images of one class under one label)
"""

import argparse
import collections
import functools
import importlib
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import compare  # noqa: E402
import cvaegan  # noqa: E402
import vae  # noqa: E402
from tests import conventional  # noqa: E402

ROWS = {  # of the study's table: script and options
    "gan-guo-mnist": "gan",
    "gan-banerjee-mnist": "gan --preset banerjee",
    "dcgan-guo-mnist": "dcgan",
    "dcgan-banerjee-mnist": "dcgan --preset banerjee",
    "vae-guo-mnist": "vae",
    "vae-guo-mnist-lr1e-3": "vae --lr 1e-3",
    "vae-banerjee-linear-mnist": "vae --preset banerjee-linear",
    "vae-banerjee-linear-mnist-beta0.5": "vae --preset banerjee-linear --beta 0.5",
    "vae-banerjee-linear-mnist-beta4": "vae --preset banerjee-linear --beta 4",
    "vae-banerjee-conv-mnist": "vae --preset banerjee-conv",
    "cvaegan-guo-mnist": "cvaegan",
}
SINGLE = ("dcgan-banerjee-mnist", "vae-banerjee-conv-mnist")  # of one seed: they cost more than three core-hours
for name in [name for name in ROWS if name not in SINGLE]:
    first = 88 if name.startswith("cvaegan") else 0
    ROWS |= {f"{name}-seed{i}": f"{ROWS[name]} --seed {first + i}" for i in (1, 2)}
for name in ("gan-guo-mnist", "gan-banerjee-mnist", "vae-banerjee-linear-mnist"):
    ROWS[f"{name}-conventional"] = ROWS[name]
ROWS["dcgan-guo-anime"] = "dcgan --dataset anime --ema 0.999"


def draw_figure(folders: list[str]) -> Image.Image:
    """A grid of samples of each run, all of about one size, under the names of the models."""
    panels = []
    for folder in folders:
        sampler = compare.load_run(Path(folder), compare.parse_args([folder]), torch.device("cpu")).sampler
        images = torch.cat([images for images, _ in common.draw(sampler, 64, 0, "cpu")])
        script = common.load_checkpoint(folder)["script"]
        name = (importlib.import_module(script).__doc__ or script).partition(":")[0]
        panels.append((name, common.grid(images)))
    return common.label_panels(panels, columns=len(panels))


@torch.no_grad()
def trust(judge: torch.nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (N, 1, 28, 28) to the judge's probabilities of the classes (N, 10)."""
    return torch.cat([judge(common.to_unit(chunk)).softmax(1) for chunk in images.split(500)])


@functools.cache
def load_judged(dataset: str, data_dir: str) -> tuple[torch.nn.Sequential, float]:
    """A data set's judge, and the share of its test images of whose class that is unsure."""
    device, autocast = torch.device("cpu"), torch.autocast("cpu", torch.bfloat16, enabled=False)
    train, test = (common.load_data(dataset, data_dir, train=part) for part in (True, False))
    judge, _ = compare.load_judge(Path(data_dir, f"judge-{dataset}.pt"), train, device, autocast)
    return judge, (trust(judge, test.images).amax(1) < 0.9).double().mean().item()


def ink_and_slant(images: torch.Tensor) -> torch.Tensor:
    """Of images (..., 1, 28, 28) in [0, 1]: mean brightness, and columns that a stroke leans a row: (2, ...)."""
    weights = images.squeeze(-3)
    total = weights.sum((-2, -1)).clamp(min=1e-6)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    x, y = (place - ((place * weights).sum((-2, -1)) / total)[..., None, None] for place in (x, y))
    slant = (x * y * weights).sum((-2, -1)) / (y * y * weights).sum((-2, -1)).clamp(min=1e-6)
    return torch.stack([total / 784, slant])


def measure_styles(networks: dict, judge: torch.nn.Sequential, test: common.Data) -> tuple[float, float, float]:
    """Share of the asked labels; correlations of ink and of slant. Of the first hundred test images of each class."""
    eye, each = torch.eye(10), min(100, int(test.labels.bincount(minlength=10).min()))
    real = torch.stack([test.images[test.labels == label][:each] for label in range(10)])  # (10, each, 1, 28, 28)
    latents = cvaegan.encode(networks["encoder"], real.flatten(0, 1), eye.repeat_interleave(each, 0))
    drawn = torch.stack([cvaegan.generate(networks["generator"], latents, row.repeat(len(latents), 1)) for row in eye])
    drawn = drawn.unflatten(1, (10, each))  # by label, then class
    seen = trust(judge, common.to_bytes(drawn.flatten(0, 2))).argmax(1).view(10, 10, each)
    other = eye == 0
    agreement = (seen == torch.arange(10)[:, None, None])[other].double().mean().item()
    before, after = ink_and_slant(common.to_unit(real))[:, None], ink_and_slant(drawn)
    before, after = (part - part.mean(-1, keepdim=True) for part in (before, after))
    kept = F.cosine_similarity(before.expand_as(after)[:, other].flatten(1), after[:, other].flatten(1))
    return agreement, *kept.tolist()


def read_grid(path: Path) -> torch.Tensor:
    """The pictures of a grid of samples, uint8 (N, 1, 28, 28). UserError if the file is none."""
    try:
        with Image.open(path) as picture:
            mode, (width, height), content = picture.mode, picture.size, bytearray(picture.tobytes())
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise common.UserError(f"{path} can't be read ({error}): --claims needs the run's samples/") from error
    if mode != "L" or min(width, height) < 64 or width % 60 != 4 or height % 60 != 4:
        raise common.UserError(f"{path} is no grid of digits: --claims needs the run's own samples/")
    pixels = torch.frombuffer(content, dtype=torch.uint8).view(height, width)[::2, ::2]  # drawn at twice the size
    return pixels[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30).reshape(-1, 1, 28, 28)


def measure_claims(folder: str, options: argparse.Namespace) -> str:
    """The line of a run for --claims."""
    device, args = torch.device("cpu"), compare.parse_args([folder, "--data-dir", options.data_dir])
    run, checkpoint = compare.load_run(Path(folder), args, device), common.load_checkpoint(folder)
    dataset, epochs = checkpoint["options"]["dataset"], len(checkpoint["history"])
    if dataset not in common.LABELLED:
        return f"{run.row['run']}: a data set without classes"
    judge, real_unsure = load_judged(dataset, options.data_dir)
    samples = torch.cat([images for images, _ in common.draw(run.sampler, 10_000, 0, device)])
    most, classes = trust(judge, samples).topk(2)
    unsure = most[:, 0] < 0.9
    pairs = collections.Counter(tuple(sorted(pair)) for pair in classes[unsure].tolist()).most_common(4)
    told = ", ".join(f"{one} or {other}: {count}" for (one, other), count in pairs)
    line = f"unsure {unsure.double().mean():.1%} (real {real_unsure:.1%}; {told})"

    shown = {}
    for epoch in {max(1, epochs // 20), max(1, epochs // 2), max(1, epochs - 1), epochs}:
        shown[epoch] = trust(judge, read_grid(Path(folder, f"samples/epoch-{epoch:04}.png"))).argmax(1)
    if len({len(classes) for classes in shown.values()}) > 1:
        raise common.UserError(f"{folder}: the grids in samples/ differ in size: they are of several runs")
    kept = [f"{epoch}-{epochs}: {(shown[epoch] == shown[epochs]).double().mean():.2f}" for epoch in sorted(shown)[:-1]]
    line += f"; kept {', '.join(kept)}" if kept else ""
    last = {name: value for name, value in checkpoint["history"][-1].items() if "second" not in name}
    line += "; last " + ", ".join(f"{name.partition(' [')[0]} {value:.4g}" for name, value in last.items())

    if checkpoint["script"] == "vae":
        networks = vae.build(argparse.Namespace(**checkpoint["options"]))
        common.restore(networks, checkpoint["networks"])
        for train in (True, False):  # both without dropout
            images = common.load_data(dataset, options.data_dir, train).images[:10_000]
            common.seed_everything(0)
            (loss, *_) = vae.measure(*networks.values(), images).values()
            line += f"; {'train' if train else 'test'} loss {loss:.2f}"
    if checkpoint["script"] == "cvaegan":
        networks = cvaegan.load_networks(checkpoint, device)
        real = cvaegan.load_test_images(argparse.Namespace(dataset=dataset, data_dir=options.data_dir))
        morphs = cvaegan.draw_morphs(networks, real, compare.STEPS + 1).flatten(0, 1)
        features, _ = compare.judge_images(judge, common.to_bytes(morphs), device)
        features = features.view(10, compare.STEPS + 1, -1)
        quarters = torch.stack([part.sum(1) for part in features.diff(dim=1).norm(dim=2).chunk(4, dim=1)])  # (4, 10)
        shares = (quarters / quarters.sum(0)).mean(1).tolist()
        line += f"; morphs {compare.evenness(features):.3f} ({', '.join(f'{share:.0%}' for share in shares)})"
        test = common.load_data(dataset, options.data_dir, train=False)
        agreement, ink, slant = measure_styles(networks, judge, test)
        line += f"; styles {agreement:.1%}, ink {ink:.2f}, slant {slant:.2f}"
    return f"{run.row['run']}: {line}"


def keep(folder: Path, assets: Path) -> Path:
    """What drawing needs of a run, in 16 bits: the checkpoint of the same name under assets/trained."""
    checkpoint = common.load_checkpoint(folder)
    options = checkpoint["options"] | {"data_dir": "data"}  # no path of this machine
    drawing = ("average",) if options.get("ema") else ("generator", "encoder", "decoder")
    networks = {name: state for name, state in checkpoint["networks"].items() if name in drawing}
    for name, state in networks.items():
        networks[name] = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        if not all(value.isfinite().all() for value in networks[name].values()):
            raise common.UserError(f"{folder}: the {name} has weights too large for 16 bits")
    target = assets / "trained" / folder.resolve().name / "checkpoint.pt"
    with common.replacing(target) as temporary:
        torch.save(checkpoint | dict(options=options, networks=networks, optimizers={}), temporary)
    return target


def train_conventionally(name: str, options: list[str], folder: Path) -> None:
    """A whole training by conventional.py, and a checkpoint from which the others' tools can draw. Can't be resumed."""
    script, networks = importlib.import_module(name), {}
    args, build = script.parse_args([*options, "--out-dir", str(folder)]), script.build
    device, data = torch.device("cpu"), common.load_data(args.dataset, args.data_dir)
    steps = len(data.images) // args.batch_size
    common.seed_everything(args.seed)
    with mock.patch.object(script, "build", lambda args: networks.update(build(args)) or networks):
        loop = getattr(conventional, name)(args, device)
        history, progress = [], common.Progress(args.epochs * steps, "steps")
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            for step in range(steps):
                next(loop)
                progress.update((epoch - 1) * steps + step + 1)
            seconds = time.perf_counter() - start
            rate = round(steps * args.batch_size / seconds, 1)
            history.append({"epoch": epoch, "seconds": round(seconds, 3), "images per second": rate})
    args.precision = "fp32"
    common.choose_autocast(args, device)
    kept = dict(format=common.CHECKPOINT_FORMAT, script=name, options=common.run_options(args), epoch=args.epochs)
    kept |= dict(history=history, data=data.digest(), optimizers={})
    kept |= dict(arithmetic=[args.arithmetic | {"from_epoch": 1}])
    with common.replacing(folder / "checkpoint.pt") as temporary:
        torch.save(kept | dict(networks={key: network.state_dict() for key, network in networks.items()}), temporary)


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors("study.py"):
        run(argv)


def run(argv: list[str] | None) -> None:
    parser = common.Parser("study.py", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows to train, of {', '.join(ROWS)} (all)")
    parser.add_argument("--data-dir", default="data", help="folder with MNIST and anime (data)")
    parser.add_argument("--out-dir", default="runs", help="folder of the run folders (runs)")
    parser.add_argument("--epochs", type=common.number(int, 1), help="epochs of each (the reports')")
    parser.add_argument("--keep", nargs="+", metavar="RUN", help="train nothing: keep what drawing needs")
    parser.add_argument("--figure", nargs="+", metavar="RUN", help="train nothing: draw samples of these runs")
    parser.add_argument("--claims", nargs="+", metavar="RUN", help="train nothing: measure claims on these runs")
    parser.add_argument("--to", default="figure.png", help="picture that --figure writes (figure.png)")
    options = parser.parse_args(argv)
    if options.figure:
        common.write_picture(options.to, draw_figure(options.figure))
        return
    if options.keep:
        for folder in options.keep:
            print(keep(Path(folder), Path(__file__).parent.parent / "assets"))
        return
    if options.claims:
        faults = []
        for folder in options.claims:
            try:
                print(measure_claims(folder, options), flush=True)
            except (common.UserError, OSError) as error:  # the other runs are measured all the same
                faults.append(str(error))
        if faults:
            raise common.UserError("; ".join(dict.fromkeys(faults)))
        return
    if unknown := set(options.names) - set(ROWS):
        parser.error(f"no row named {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")

    folders = {name: Path(options.out_dir, name) for name in options.names or ROWS}
    for name, folder in folders.items():
        script, *words = ROWS[name].split()
        words += ["--data-dir", options.data_dir] + (["--epochs", str(options.epochs)] if options.epochs else [])
        if not name.endswith("-conventional"):
            importlib.import_module(script).main([*words, "--out-dir", str(folder), "--resume"])
        elif not (folder / "checkpoint.pt").exists():
            train_conventionally(script, words, folder)
    compare.main([*map(str, folders.values()), "--data-dir", options.data_dir])


if __name__ == "__main__":
    main()
