"""dcgan.py: networks, initial weights, augmentation, the average, batch norm when sampling."""

import copy
import math
from argparse import Namespace
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import nn

import common
import dcgan
from tests.conftest import BF16, CPU, FP32


def options(dataset: str = "digits", preset: str = "guo", **changes) -> Namespace:
    numbers = dict(dcgan.PRESETS[preset])
    folder = numbers.pop("folder", {})
    return Namespace(preset=preset, dataset=dataset, **numbers | ({} if dataset == "digits" else folder) | changes)


def trained(steps: int = 0, batch: int = 4, autocast: torch.autocast = FP32, **changes):
    """Options, networks, optimizers and the step, after some steps on noise."""
    torch.manual_seed(0)
    args = options(**changes)
    networks = dcgan.build(args)
    optimizers = dcgan.make_optimizers(args, networks)
    step = dcgan.make_step(args, CPU, autocast, networks, optimizers)
    if args.ema:
        networks["average"] = copy.deepcopy(networks["generator"])
    for i in range(1, steps + 1):
        losses = step(noise(batch, args))
        assert all(loss.isfinite() for loss in losses.values())
        if args.ema:
            dcgan.update_average(networks["average"], networks["generator"], i, args.ema)
    return args, networks, optimizers, step


def noise(count: int, args: Namespace) -> torch.Tensor:
    channels = 1 if args.dataset == "digits" else 3
    return torch.randint(0, 256, (count, channels, args.image_size, args.image_size), dtype=torch.uint8)


@pytest.mark.parametrize(("dataset", "size"), [("digits", 28), ("faces", 32), ("faces", 64), ("faces", 128)])
def test_networks_have_a_layer_for_each_doubling_and_a_logit_that_sees_every_pixel(dataset, size):
    args = options(dataset, image_size=size, features=8)
    networks = dcgan.build(args)
    images = networks["generator"](torch.randn(2, 100))
    assert images.shape == (2, 3 if dataset == "faces" else 1, size, size) and images.abs().max() <= 1
    assert networks["discriminator"](images).shape == (2,)
    for network, kind in (("generator", nn.ConvTranspose2d), ("discriminator", nn.Conv2d)):
        layers = [layer for layer in networks[network] if isinstance(layer, kind)]
        count = {28: 4, 32: 4, 64: 5, 128: 6}[size]
        widths = [8 * 2**i for i in range(count - 1)]
        expected = (
            [*widths, *[128] * (size == 28), 1] if network == "discriminator" else [*widths[::-1], len(images[0])]
        )
        assert [layer.out_channels for layer in layers] == expected
    images = torch.randn(1, *images.shape[1:], requires_grad=True)
    (gradient,) = torch.autograd.grad(networks["discriminator"].eval()(images).sum(), images)
    assert (gradient != 0).all()


def test_the_network_for_digits_follows_the_reports_rules():
    kinds = {name: [type(layer).__name__ for layer in network] for name, network in dcgan.build(options()).items()}
    block = ["ConvTranspose2d", "BatchNorm2d", "ReLU"]
    assert kinds["generator"] == ["Unflatten", *block * 3, "ConvTranspose2d", "Tanh"]
    block = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds["discriminator"] == ["Conv2d", "LeakyReLU", *block * 2, "Conv2d", "LeakyReLU", "Conv2d", "Flatten"]


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("dataset", "preset", "generator", "discriminator"),
    [
        # 100-128 4x4, 128-64 3x3, 64-32 and 32-1 4x4, batch norm two numbers a channel; biases where none follows
        (
            "digits",
            "guo",
            (100 * 128 * 16 + 2 * 128) + (128 * 64 * 9 + 2 * 64) + (64 * 32 * 16 + 2 * 32) + (32 * 16 + 1),
            # 1-32-64-128 5x5, 128-128 4x4, 128-1 1x1
            (25 * 32 + 32) + (32 * 64 * 25 + 2 * 64) + (64 * 128 * 25 + 2 * 128) + (128 * 128 * 16 + 128) + 129,
        ),
        # PyTorch's own DCGAN example has 3,576,704 and 2,765,568: it leaves out the biases next to image and logit
        ("faces", "guo", 3_576_704 + 3, 2_765_568 + 64 + 1),
        (
            "digits",
            "banerjee",
            101 * 12544 + (256 * 128 * 9 + 128) + (128 * 64 * 9 + 64) + (64 * 32 * 9 + 32) + (32 * 9 + 1),
            (9 * 32 + 32) + (32 * 64 * 9 + 64) + (64 * 128 * 9 + 128) + (128 * 256 * 9 + 256) + 12544 + 1,
        ),
    ],
)
def test_parameter_counts(dataset, preset, generator, discriminator):
    networks = dcgan.build(options(dataset, preset))
    assert [parameters_of(network) for network in networks.values()] == [generator, discriminator]


def test_banerjees_networks_have_dropout_of_channels_and_no_batch_norm():
    networks = dcgan.build(options(preset="banerjee"))
    kinds = [type(layer).__name__ for layer in networks["discriminator"]]
    assert kinds == ["Conv2d", "LeakyReLU", "Dropout2d"] * 4 + ["Flatten", "Linear", "Flatten"]
    assert [layer.stride[0] for layer in networks["discriminator"] if isinstance(layer, nn.Conv2d)] == [2, 1, 1, 2]
    transposed = [layer for layer in networks["generator"] if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.stride[0] for layer in transposed] == [2, 1, 1, 2]
    images = networks["generator"](torch.randn(2, 100))
    assert images.shape == (2, 1, 28, 28) and networks["discriminator"](images).shape == (2,)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_initial_weights_are_gaussians_of_deviation_0_02(name):
    torch.manual_seed(0)
    for layer in dcgan.build(options("faces"))[name]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            mean = 1 if isinstance(layer, nn.BatchNorm2d) else 0
            error = 5 / math.sqrt(layer.weight.numel())
            assert abs(layer.weight.mean() - mean) < 0.02 * error and abs(layer.weight.std() / 0.02 - 1) < error
            assert not mean or layer.bias.abs().max() == 0


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_each_loss_moves_its_own_player_alone(player):
    _, networks, optimizers, _ = trained()
    assert optimizers[player].param_groups[0]["betas"] == (0.5, 0.999)
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    logits = networks["discriminator"](networks["generator"](torch.randn(4, 100)))
    common.descend(dcgan.generator_loss(logits), optimizers[player])
    for name, network in networks.items():
        same = [torch.equal(a, b) for a, b in zip(before[name], network.parameters())]
        assert not all(same) if name == player else all(same)
        assert name == player or all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("autocast", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("augment", ["none", "flip", "full"])
def test_steps_of_every_kind_stay_finite_and_move_all_weights(augment, autocast):
    args, networks, _, step = trained(augment=augment, autocast=autocast)
    before = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in networks.items()}
    for _ in range(3):
        step(noise(4, args))
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert value.isfinite().all() and value.dtype in (torch.float32, torch.int64)
            assert not torch.equal(value, before[name][key]), f"{name} {key}"


def test_bfloat16_agrees_with_float32_to_its_rounding():
    found = []
    for autocast in (FP32, BF16):
        args, _, _, step = trained(autocast=autocast, batch=32)
        torch.manual_seed(1)
        found.append(torch.stack(list(step(noise(32, args)).values())))
    torch.testing.assert_close(found[0], found[1], atol=0.02, rtol=0.02)


def test_the_discriminator_sees_real_and_generated_images_in_batches_of_their_own():
    args, networks, _, step = trained()
    seen = []
    networks["discriminator"].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].detach()))
    images = noise(4, args)
    step(images)
    assert len(seen) == 3 and torch.equal(seen[0], common.to_symmetric(images))
    assert torch.equal(seen[1], seen[2])  # one generator pass serves both players


# ---------------------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize(
    "dataset, augment, mirrored", [("digits", "full", 0), ("digits", "flip", 1), ("faces", "full", 1)]
)
def test_digits_are_mirrored_only_when_asked_to(dataset, augment, mirrored, monkeypatch):
    args, _, _, step = trained(dataset=dataset, augment=augment, image_size=28 if dataset == "digits" else 32)
    flips = mock.Mock(side_effect=lambda images: images)
    monkeypatch.setattr(dcgan, "flip", flips)
    step(noise(4, args))
    assert flips.call_count == mirrored


def test_flips_mirror_half_of_the_images():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8)
    flipped = dcgan.flip(images)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all() and 150 < mirrored.sum() < 250


def test_augmentation_is_the_same_for_real_and_generated_images():
    args, networks, _, step = trained(augment="full", batch=8)
    augmented = []
    networks["discriminator"].register_forward_hook(lambda _, inputs, output: augmented.append(inputs[0].detach()))
    step(torch.full((8, 1, 28, 28), 255, dtype=torch.uint8))
    assert len(augmented) == 3
    for images in augmented:  # each has its square of zeros, of a quarter of the image where it lies wholly within
        assert ((images == 0).flatten(1).sum(1) >= 14 * 14 // 4).all()


def test_each_augmentation_does_what_the_paper_says(monkeypatch):
    images = torch.rand(1, 3, 16, 16) - 0.5

    def with_numbers(brightness, saturation, contrast, down, across, top, left):
        place = [(shift + 2.5) / 5 for shift in (down, across)]  # of [0, 1): -2 to 2, an eighth of the side
        hole = [(start + 4.5) / 16 for start in (top, left)]
        numbers = torch.tensor([brightness, saturation, contrast, *place, *hole]).view(1, 7, 1, 1, 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: numbers)
            return dcgan.diff_augment(images)

    away = dict(top=99, left=99)
    still = dict(brightness=0.5, saturation=0.5, contrast=0.5, down=0, across=0)
    torch.testing.assert_close(with_numbers(**still, **away), images)
    torch.testing.assert_close(with_numbers(**still | dict(brightness=0.7), **away), images + 0.2)
    grey = images.mean(1, keepdim=True).expand_as(images)
    torch.testing.assert_close(with_numbers(**still | dict(saturation=0.0), **away), grey)
    flat = images.mean() + 0.5 * (images - images.mean())
    torch.testing.assert_close(with_numbers(**still | dict(contrast=0.0), **away), flat)
    moved = torch.zeros_like(images)
    moved[:, :, 2:, :-1] = images[:, :, :-2, 1:]
    torch.testing.assert_close(with_numbers(**still | dict(down=2, across=-1), **away), moved)
    cut = images.clone()
    cut[:, :, 3:11, :5] = 0
    torch.testing.assert_close(with_numbers(**still, top=3, left=-3), cut)


# ------------------------------------------------------------------------------------ sampling and averaging
@pytest.mark.parametrize("changes", [{}, dict(ema=0.9), dict(preset="banerjee")])
def test_a_sample_depends_on_its_latent_alone_and_changes_no_network(changes):
    _, networks, _, _ = trained(steps=2, **changes)
    before = {key: value.clone() for key, value in networks["generator"].state_dict().items()}
    latents = torch.randn(16, 100)
    together = dcgan.generate(networks["generator"], latents)
    alone = torch.cat([dcgan.generate(networks["generator"], latent[None]) for latent in latents])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert together.shape == (16, 1, 28, 28) and together.min() >= 0 and together.max() <= 1
    assert all(torch.equal(value, before[key]) for key, value in networks["generator"].state_dict().items())


def test_the_average_follows_weights_and_batch_statistics():
    """To the bit: lerp by max(1 - decay, 10 / (9 + steps)), at first all of the new weights."""
    torch.manual_seed(0)
    generator = dcgan.build(options(features=8))["generator"]
    average = copy.deepcopy(generator)
    expected, weight = {}, None
    for update in range(60):
        with torch.no_grad():
            for value in generator.state_dict().values():
                value += torch.randn_like(value) if value.is_floating_point() else 1
        dcgan.update_average(average, generator, update + 1, decay=0.8)
        weight = max(10 / (10 + update), 1 - 0.8)
        for key, value in generator.state_dict().items():
            new = value.clone()
            if new.is_floating_point():
                expected[key] = expected.get(key, new).lerp(new, weight)
    assert weight == 1 - 0.8
    assert {"2.running_mean", "2.running_var", "1.weight"} <= set(expected)
    for key, value in expected.items():
        assert torch.equal(average.state_dict()[key], value), key
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(average.parameters(), generator.parameters()))


def test_pictures_come_from_the_average_where_there_is_one():
    args, networks, _, _ = trained(steps=3, ema=0.9)
    latents = torch.randn(4, 100)
    states = {name: network.state_dict() for name, network in networks.items()}
    drawn = dcgan.load_sampler(dict(options=vars(args), networks=states)).generate(latents)
    torch.testing.assert_close(drawn, dcgan.generate(networks["average"], latents))  # but for the memory layout
    assert not torch.allclose(drawn, dcgan.generate(networks["generator"], latents))


def test_a_run_on_a_folder_keeps_its_average_and_draws_from_it(trainings, tmp_path):
    checkpoint = common.load_checkpoint(trainings.finished("dcgan-faces"), "dcgan")
    assert set(checkpoint["networks"]) == {"generator", "discriminator", "average"}
    sampler = dcgan.load_sampler(checkpoint, CPU)
    images = sampler.generate(torch.randn(5, sampler.latent_size), None)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32 and not images.requires_grad
    networks = dcgan.build(Namespace(**checkpoint["options"]))
    assert sampler.parameters == sum(map(parameters_of, networks.values()))  # the average is not counted
    trainings.main(
        "dcgan-faces", "--out-dir", trainings.finished("dcgan-faces"), "--sample", 7, "--to", tmp_path / "drawn"
    )
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert len(drawn) == 7 and Image.open(drawn[0]).size == (32, 32) and Image.open(drawn[0]).mode == "RGB"
