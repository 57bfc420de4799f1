"""gan.py: networks, losses, which step moves what; what training and sampling leave behind."""

import math
import shutil
from argparse import Namespace

import pytest
import torch
from PIL import Image
from torch.distributions import Bernoulli

import common
import gan
from tests.conftest import CPU, FP32


@pytest.mark.parametrize(
    ("preset", "generator", "discriminator"),
    [
        ("guo", 64 * 256 + 256 + 256 * 256 + 256 + 256 * 784 + 784, 784 * 256 + 256 + 256 * 256 + 256 + 256 + 1),
        ("banerjee", 101 * 128 + 129 * 256 + 257 * 512 + 513 * 784, 785 * 512 + 513 * 256 + 257 * 128 + 129),
    ],
)
def test_networks_are_the_reports(preset, generator, discriminator):
    networks = gan.build(Namespace(**gan.PRESETS[preset]))
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert count == {"generator": generator, "discriminator": discriminator}
    images = networks["generator"](torch.randn(5, gan.PRESETS[preset]["latent_size"]))
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    assert networks["discriminator"](images).shape == (5,)


def test_dropout_follows_each_hidden_layer_of_banerjee():
    layers = [type(layer).__name__ for layer in gan.build(Namespace(**gan.PRESETS["banerjee"]))["discriminator"]]
    assert layers == ["Flatten", *["Linear", "LeakyReLU", "Dropout"] * 3, "Linear", "Flatten"]


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


def trained_pair(**changes):
    args = Namespace(**gan.PRESETS["guo"] | changes)
    networks = gan.build(args)
    return args, networks, gan.make_optimizers(args, networks)


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_each_loss_moves_its_own_player_alone(player):
    args, networks, optimizers = trained_pair()
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    logits = networks["discriminator"](networks["generator"](torch.randn(8, args.latent_size)))
    common.descend(gan.generator_loss(logits), optimizers[player])
    for name, network in networks.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[name], network.parameters())]
        assert all(moved) if name == player else not any(moved)
        assert name == player or all(p.grad is None for p in network.parameters())


def test_step_equals_the_textbook_step():
    """The step's shortcuts (one joint pass through D, gradients of one player only) change nothing."""
    args, networks, optimizers = trained_pair()
    generator, discriminator = gan.build(args).values()
    generator.load_state_dict(networks["generator"].state_dict())
    discriminator.load_state_dict(networks["discriminator"].state_dict())
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)

    common.seed_everything(3)
    losses = gan.make_step(args, CPU, FP32, networks, optimizers)(images)

    torch.testing.assert_close(losses["D(x)"], discriminator(images / 127.5 - 1).sigmoid().mean())
    common.seed_everything(3)
    fake = generator(torch.randn(6, args.latent_size))
    torch.testing.assert_close(losses["D(G(z))"], discriminator(fake).sigmoid().mean())
    criterion = torch.nn.BCEWithLogitsLoss()
    for network, loss_of in (
        (
            discriminator,
            lambda: (
                criterion(discriminator(images / 127.5 - 1), torch.ones(6))
                + criterion(discriminator(fake.detach()), torch.zeros(6))
            ),
        ),
        (generator, lambda: criterion(discriminator(fake), torch.ones(6))),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
        loss = loss_of()
        network.zero_grad()
        loss.backward()
        optimizer.step()
        name = "discriminator" if network is discriminator else "generator"
        torch.testing.assert_close(losses[f"{name} loss [nats]"], loss)
        for ours, theirs in zip(networks[name].parameters(), network.parameters()):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_training_leaves_a_whole_folder(trainings):
    run = trainings.finished("gan-guo")
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    pictures = {"losses.png", "real.png", "progress.png", "progress.gif"}
    assert names == {
        "checkpoint.pt",
        "log.csv",
        ".lock",
        ".made",
        "samples/epoch-0001.png",
        "samples/epoch-0002.png",
        *pictures,
    }
    log = (run / "log.csv").read_text().splitlines()
    assert log[0] == "epoch,discriminator loss [nats],generator loss [nats],D(x),D(G(z)),seconds,images per second"
    assert [line.split(",")[0] for line in log[1:]] == ["1", "2"]
    for name in ("real.png", "samples/epoch-0001.png"):
        assert Image.open(run / name).size == (8 * 30 + 2, (5 if name == "real.png" else 8) * 30 + 2)
    assert Image.open(run / "progress.gif").n_frames == 2


def test_a_new_run_spares_the_old(trainings, tmp_path, capsys):
    for seed in (0, 1, 2):
        trainings.train("gan-guo", tmp_path / "run", "--epochs", 1, "--seed", seed)
    assert f"the run that was in {tmp_path}/run is now {tmp_path}/run-2" in capsys.readouterr().out
    seeds = {path.name: common.load_checkpoint(path)["options"]["seed"] for path in tmp_path.iterdir()}
    assert seeds == {"run-1": 0, "run-2": 1, "run": 2}


def test_sampling_to_a_grid_or_a_folder(trainings, tmp_path):
    shutil.copytree(trainings.finished("gan-guo"), tmp_path / "run")
    run = ["--out-dir", str(tmp_path / "run"), "--sample"]
    gan.main([*run, "10"])
    assert Image.open(tmp_path / "run/sample.png").size == (4 * 30 + 2, 3 * 30 + 2)
    for name in ("a", "b"):
        gan.main([*run, "503", "--to", str(tmp_path / name), "--seed", "7"])  # more than are drawn at once
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"{i:05}.png" for i in range(503)]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files[::50])
    picture = Image.open(tmp_path / "a/00000.png")
    assert picture.size == (28, 28) and picture.mode == "L"
    gan.main([*run, "5", "--to", str(tmp_path / "c"), "--seed", "8"])
    assert (tmp_path / "c/00000.png").read_bytes() != (tmp_path / "a/00000.png").read_bytes()


def test_sampler_gives_pictures_in_range_and_repeats_itself(trainings):
    sampler = gan.load_sampler(common.load_checkpoint(trainings.finished("gan-banerjee"), "gan"), CPU)
    latents = torch.randn(4, sampler.latent_size)
    images = sampler.generate(latents)
    assert images.shape == (4, 1, 28, 28) and 0 <= images.min() <= images.max() <= 1 and not images.requires_grad
    torch.testing.assert_close(sampler.generate(latents[:1]), images[:1])
    networks = gan.build(Namespace(**gan.PRESETS["banerjee"]))
    assert sampler.parameters == sum(p.numel() for network in networks.values() for p in network.parameters())


@pytest.mark.full
def test_it_learns_the_brightness_of_mnist(real_data, tmp_path):
    gan.main(["--data-dir", str(real_data), "--out-dir", str(tmp_path), "--epochs", "1"])
    sampler = gan.load_sampler(common.load_checkpoint(tmp_path), CPU)
    mean = sampler.generate(torch.randn(500, sampler.latent_size)).mean()
    assert 0.03 < mean < 0.3  # MNIST's mean is 0.1307; an untrained generator's is 0.5
