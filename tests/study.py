"""The whole study: the nine trainings at the reports' own lengths, one after the other, then the comparison.

    python tests/study.py --data-dir data --out-dir runs                # resumes whatever was stopped
    python tests/study.py --data-dir data --out-dir runs --epochs 2     # a rehearsal
    python tests/study.py --figure runs/gan runs/vae --to figure.png    # samples of trained runs, side by side

Prints seconds and images per second of each training from its log, and ends with compare.py's table of all of them.
"""

import argparse
import csv
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import compare  # noqa: E402
from tests.bench import TRAININGS  # noqa: E402


def draw_figure(folders: list[str]) -> Image.Image:
    """A grid of samples of each run, all of about one size, under the names of the models."""
    panels = []
    for folder in folders:
        sampler = compare.load_run(folder, compare.parse_args([folder]), torch.device("cpu")).sampler
        images = common.to_unit(torch.cat([images for images, _ in common.draw(sampler, 64, 0, "cpu")]))
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))
        columns = 466 // (images.shape[-1] + 2)  # eight of digits, seven of faces
        script = common.load_checkpoint(folder)["script"]
        name = importlib.import_module(script).__doc__.partition(":")[0]
        panels.append((name, common.to_picture(common.grid(images[: columns**2], columns))))
    return common.label_panels(panels, columns=len(panels))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"trainings to run, of {', '.join(TRAININGS)} (all)")
    parser.add_argument("--data-dir", default="data", help="folder with MNIST and anime (data)")
    parser.add_argument("--out-dir", default="runs", help="folder of the run folders (runs)")
    parser.add_argument("--epochs", type=common.number(int, 1), help="epochs of each (the reports')")
    parser.add_argument("--figure", nargs="+", metavar="RUN", help="train nothing: draw samples of these runs")
    parser.add_argument("--to", default="figure.png", help="picture that --figure writes (figure.png)")
    options = parser.parse_args(argv)
    if options.figure:
        common.write_picture(options.to, draw_figure(options.figure))
        return
    if unknown := set(options.names) - set(TRAININGS):
        parser.error(f"no training named {', '.join(sorted(unknown))}: there are {', '.join(TRAININGS)}")

    folders = {name: Path(options.out_dir, name) for name in options.names or TRAININGS}
    for name, folder in folders.items():
        training = TRAININGS[name]
        command = [*training.options.split(), "--data-dir", options.data_dir, "--out-dir", str(folder)]
        command += ["--epochs", str(options.epochs)] if options.epochs else []
        command += ["--resume"] if (folder / "checkpoint.pt").exists() else []
        importlib.import_module(training.script).main(command)
    print(f"{'training':24}{'epochs':>8}{'seconds':>10}{'images/s':>10}")
    for name, folder in folders.items():
        with open(folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        seconds = sum(float(row["seconds"]) for row in rows)
        rate = sorted(float(row["images per second"]) for row in rows)[len(rows) // 2]
        print(f"{name:24}{len(rows):>8}{seconds:>10,.1f}{rate:>10,.0f}")
    compare.main([*map(str, folders.values()), "--data-dir", options.data_dir])


if __name__ == "__main__":
    main()
