"""gan.py: networks, losses, which step moves what; what training and sampling leave behind."""

import copy
import math
from argparse import Namespace

import pytest
import torch
from PIL import Image
from torch.distributions import Bernoulli

import common
import gan
from tests.conftest import CPU, FP32


def make(preset="guo"):
    """Options, networks and optimizers of a preset."""
    args = Namespace(**gan.PRESETS[preset])
    networks = gan.build(args)
    return args, networks, gan.make_optimizers(args, networks)


@pytest.mark.parametrize(
    ("preset", "generator", "discriminator"),
    [
        ("guo", 64 * 256 + 256 + 256 * 256 + 256 + 256 * 784 + 784, 784 * 256 + 256 + 256 * 256 + 256 + 256 + 1),
        ("banerjee", 101 * 128 + 129 * 256 + 257 * 512 + 513 * 784, 785 * 512 + 513 * 256 + 257 * 128 + 129),
    ],
)
def test_networks_are_the_reports(preset, generator, discriminator):
    args, networks, _ = make(preset)
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert count == {"generator": generator, "discriminator": discriminator}
    images = networks["generator"](torch.randn(5, args.latent_size))
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    assert networks["discriminator"](images).shape == (5,)
    layers = [type(layer).__name__ for layer in networks["discriminator"]]
    hidden = ["Linear", "LeakyReLU"] * 2 if preset == "guo" else ["Linear", "LeakyReLU", "Dropout"] * 3
    assert layers == ["Flatten", *hidden, "Linear", "Flatten"]


def test_dropout_drops_its_share_and_keeps_the_mean():
    dropout, ones = gan.Dropout(0.4), torch.ones(200_000)
    dropped = dropout(ones)
    assert abs((dropped == 0).float().mean() - 0.4) < 0.01
    torch.testing.assert_close(dropped.max(), torch.tensor(1 / 0.6))
    assert torch.equal(dropout.eval()(ones), ones)


def test_losses_are_the_cross_entropies_of_the_paper():
    real, fake = torch.tensor([0.3, -1.2, 4.0]), torch.tensor([-0.5, 2.0, 0.1])
    expected = -Bernoulli(logits=real).log_prob(torch.ones(3)) - Bernoulli(logits=fake).log_prob(torch.zeros(3))
    torch.testing.assert_close(gan.discriminator_loss(real, fake), expected.mean())
    torch.testing.assert_close(gan.generator_loss(fake), -Bernoulli(logits=fake).log_prob(torch.ones(3)).mean())
    torch.testing.assert_close(gan.discriminator_loss(torch.zeros(2), torch.zeros(2)), torch.tensor(2 * math.log(2)))
    assert gan.generator_loss(torch.tensor([-1000.0])) == 1000  # no overflow, and a gradient where D is sure


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_step_moves_its_own_player_alone(player):
    args, networks, optimizers = make()
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    logits = networks["discriminator"](networks["generator"](torch.randn(8, args.latent_size)))
    common.descend(gan.generator_loss(logits), optimizers[player])
    for name, network in networks.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[name], network.parameters())]
        assert all(moved) if name == player else not any(moved)
        assert name == player or all(p.grad is None for p in network.parameters())


def test_step_equals_the_textbook_step():
    """The step's shortcuts (one joint pass through D, gradients of one player only) change nothing."""
    args, networks, optimizers = make()
    generator, discriminator = copy.deepcopy(networks).values()
    images, ones = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8), torch.ones(6)
    common.seed_everything(3)
    losses = gan.make_step(args, CPU, FP32, networks, optimizers)(images)

    common.seed_everything(3)
    real, fake = images / 127.5 - 1, generator(torch.randn(6, args.latent_size))
    torch.testing.assert_close(losses["D(x)"], discriminator(real).sigmoid().mean())
    torch.testing.assert_close(losses["D(G(z))"], discriminator(fake).sigmoid().mean())
    adams = [torch.optim.Adam(network.parameters(), lr=args.lr) for network in (generator, discriminator)]
    criterion = torch.nn.BCEWithLogitsLoss()
    loss = criterion(discriminator(real), ones) + criterion(discriminator(fake.detach()), 1 - ones)
    torch.testing.assert_close(losses["discriminator loss [nats]"], loss)
    loss.backward()
    adams[1].step()
    loss = criterion(discriminator(fake), ones)
    torch.testing.assert_close(losses["generator loss [nats]"], loss)
    loss.backward()
    adams[0].step()
    for optimizer, textbook in zip(optimizers.values(), adams):
        for ours, theirs in zip(optimizer.param_groups[0]["params"], textbook.param_groups[0]["params"]):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_training_leaves_a_whole_folder(trainings):
    run = trainings.finished("gan-guo")
    pictures = "losses.png real.png progress.png progress.gif samples/epoch-0001.png samples/epoch-0002.png"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names - {".lock"} == {"checkpoint.pt", "log.csv", *pictures.split()}
    header = "epoch,discriminator loss [nats],generator loss [nats],D(x),D(G(z)),seconds,images per second\n"
    assert (run / "log.csv").read_text().startswith(header)
    assert Image.open(run / "samples/epoch-0001.png").size == (2 * (8 * 30 + 2), 2 * (8 * 30 + 2))
    assert Image.open(run / "progress.gif").n_frames == 2


def test_a_new_run_spares_the_old(trainings, tmp_path, capsys):
    for seed in (0, 1, 2):
        trainings.train("gan-guo", tmp_path / "run", "--epochs", 1, "--seed", seed)
    assert f"{tmp_path}/run is now {tmp_path}/run-2" in capsys.readouterr().out
    seeds = {path.name: common.load_checkpoint(path)["options"]["seed"] for path in tmp_path.iterdir()}
    assert seeds == {"run-1": 0, "run-2": 1, "run": 2}


def test_samples_in_a_grid_or_a_folder(trainings, tmp_path):
    folder = trainings.finished("gan-guo")
    run = ["--out-dir", str(folder), "--sample"]
    gan.main([*run, "10", "--to", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size == (4 * (4 * 30 + 2), 4 * (3 * 30 + 2))
    gan.main([*run, "64", "--to", str(tmp_path / "fixed.png")])
    assert (tmp_path / "fixed.png").read_bytes() == (folder / "samples/epoch-0002.png").read_bytes()
    first, other = (next(common.draw_latents(seed, 4)) for seed in (1, 2**32 + 1))
    assert not torch.equal(first, other)
    for name, count, seed in (("a", 503, 7), ("b", 503, 7), ("c", 5, 8)):  # 500 are drawn at once
        gan.main([*run, str(count), "--to", str(tmp_path / name), "--seed", str(seed)])
    a, b, c = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc")
    assert sorted(a) == [f"{i:05}.png" for i in range(503)] and a == b
    assert len(c) == 5 and c["00000.png"] != a["00000.png"]
    assert Image.open(tmp_path / "a/00000.png").size == (28, 28)
    sampler = gan.load_sampler(common.load_checkpoint(folder), CPU)
    images = sampler.generate(torch.randn(4, sampler.latent_size))
    assert images.shape == (4, 1, 28, 28) and 0 <= images.min() <= images.max() <= 1 and not images.requires_grad
    assert sampler.parameters == sum(p.numel() for network in make()[1].values() for p in network.parameters())


@pytest.mark.full
def test_it_learns_the_brightness_of_mnist(real_data, tmp_path):
    gan.main(["--data-dir", str(real_data), "--out-dir", str(tmp_path), "--epochs", "1"])
    sampler = gan.load_sampler(common.load_checkpoint(tmp_path), CPU)
    mean = sampler.generate(torch.randn(500, 64)).mean()
    assert 0.03 < mean < 0.3  # MNIST's mean is 0.1307; an untrained generator's is 0.5
