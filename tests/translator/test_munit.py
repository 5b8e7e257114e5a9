"""MUNIT: sizes of the paper, loss terms against a plain re-computation, and the laws of a nuisance."""

import json

import pytest
import torch
import torch.nn.functional as F

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.fit import fit_objective
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.munit.model import (
    AdaptiveResidualBlock,
    MunitObjective,
    MunitSettings,
    MunitTranslator,
    MunitWeights,
    UpsampleBlock,
)
from gen_invariance.translator.objective import convolution
from gen_invariance.translator.settings import FitSettings


def build(**options):
    """A small translator whose weights do not depend on the global stream, and do not disturb it."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "translator").get_state())
        return MunitTranslator(**{"width": 4, "residual_blocks": 2, "mlp_width": 16, **options})


def objective(translator=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "objective").get_state())
        return MunitObjective(translator or build(), MunitSettings(**options))


def some_images(count=5, channels=1, height=16, width=16):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(3))


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ---- sizes of the paper's networks


def test_parameter_counts_of_the_published_networks():
    """Measured on the reference code at 28 x 28 x 1; ours leaves out biases that a normalisation removes."""
    full = objective(MunitTranslator(channels=1))
    parts = full.translator
    assert size(parts) == pytest.approx(15.01e6, rel=0.01)
    assert size(parts.style_encoder) == pytest.approx(2.76e6, rel=0.01)
    assert size(parts.content_encoder) == pytest.approx(5.38e6, rel=0.01)
    assert size(parts.decoder) - size(parts.decoder.style) == pytest.approx(5.75e6, rel=0.01)
    assert size(parts.decoder.style) == pytest.approx(1.12e6, rel=0.01)
    assert size(full.discriminator) == pytest.approx(2.76e6, rel=0.01)
    assert size(MunitTranslator(channels=3)) == pytest.approx(15.03e6, rel=0.01)


def test_content_and_style_shapes_of_the_paper():
    translator = MunitTranslator(channels=1)
    images = some_images(2, 1, 28, 28)
    with torch.no_grad():
        assert translator.content(images).shape == (2, 256, 7, 7)
        assert translator.style(images).shape == (2, 8)


# ---- layers


def test_convolutions_reflect_their_borders():
    layer = convolution(2, 3, 5)
    x = torch.rand(1, 2, 9, 9)
    expected = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert convolution(2, 3, 4, stride=2)(torch.rand(1, 2, 8, 6)).shape == (1, 3, 4, 3)
    assert convolution(2, 3, 7)(torch.rand(1, 2, 8, 6)).shape == (1, 3, 8, 6)


def test_adaptive_block_sets_mean_and_deviation_of_each_channel():
    """With both convolutions made the identity the formula of AdaIN shows: the branch has the given scale and shift."""
    block = AdaptiveResidualBlock(3)
    for layer in (block.first, block.second):
        layer.weight.data.zero_()
        layer.weight.data[range(3), range(3), 1, 1] = 1
    x, style = torch.randn(2, 3, 8, 8), torch.rand(2, 4, 3) + 0.5
    style[:, 1] = 10.0  # so far up that relu changes nothing
    branch = block(x, style) - x
    torch.testing.assert_close(branch.mean((2, 3)), style[:, 3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(branch.std((2, 3), correction=0), style[:, 2], atol=1e-3, rtol=1e-3)


def test_upsample_block_by_hand():
    block = UpsampleBlock(2, 3)
    block.scale.data.uniform_(0.5, 2)
    block.shift.data.uniform_(-1, 1)
    x = torch.rand(2, 2, 4, 4)
    for row in range(2):
        wide = block.convolution(x[row : row + 1].repeat_interleave(2, 2).repeat_interleave(2, 3))[0]
        normal = (wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt()
        expected = (normal * block.scale + block.shift).clamp(min=0)
        torch.testing.assert_close(block(x)[row], expected, atol=1e-5, rtol=1e-4)


# ---- a nuisance like any other


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 28, 28), (1, 30, 30), (1, 16, 16), (3, 32, 32), (3, 29, 19), (1, 17, 30)]
)
def test_laws_of_a_nuisance_at_any_size(channels, height, width):
    translator, images = build(channels=channels).eval(), some_images(3, channels, height, width)
    assert isinstance(translator, Nuisance)
    before, state = images.clone(), torch.random.get_rng_state()
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = translator.apply(images, draw)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(translator.apply(images, draw), out)
        other = translator.apply(images, translator.sample(images.shape, generator=torch.Generator().manual_seed(2)))
    assert (out - other).abs().mean() > 1e-4, "another style must give another image"


def test_rows_do_not_depend_on_their_batch():
    translator, images = build().eval(), some_images(9)
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([7, 0, 3])
    with torch.no_grad():
        whole, alone = translator.apply(images, draw), translator.apply(images[rows], select_rows(draw, rows))
    torch.testing.assert_close(alone, whole[rows], atol=1e-5, rtol=0)


def test_sizes_between_are_padded_at_the_far_ends_and_cut_back():
    """30 x 27 is what 32 x 28 gives, cut: the picture may not shift."""
    translator, images = build().eval(), some_images(2, 1, 30, 27)
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = translator.apply(F.pad(images, (0, 1, 0, 2), mode="reflect"), draw)
        torch.testing.assert_close(translator.apply(images, draw), whole[..., :30, :27])


def test_draws_are_standard_normal_and_repeatable():
    draws = [build().sample((4000, 1, 8, 8), generator=torch.Generator().manual_seed(1))["style"] for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (4000, 8)
    assert abs(draws[0].mean()) < 5 / 32000**0.5
    assert abs(draws[0].std() - 1) < 0.02


@pytest.mark.parametrize("count", [0, 1])
def test_batches_of_none_and_one(count):
    images = some_images(count)
    translator = build()
    draw = translator.sample(images.shape, generator=torch.Generator())
    assert translator.apply(images, draw).shape == images.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back(dtype):
    images, translator = some_images(2), build().eval()
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(0))
    assert translator.apply(images.to(dtype), draw).dtype == dtype
    assert translator.to(torch.bfloat16).apply(images.to(dtype), draw).dtype == dtype


@pytest.mark.parametrize("images", [some_images(2, 3), some_images(2)[0], (some_images(2) * 255).byte()])
def test_wrong_images_are_named(images):
    with pytest.raises(ShapeError, match="MUNIT translator"):
        build().apply(images, {"style": torch.zeros(2, 8)})


@pytest.mark.parametrize("side", [1, 4, 8, 12])
def test_images_too_small_for_the_networks_are_named(side):
    """Reflected borders need two pixels at every level; torch's own words would not say what to change."""
    whole = objective()
    images = some_images(2, 1, side, side)
    with pytest.raises(ShapeError, match=r"at least \d+ pixels a side, got"):
        whole.forward(images, whole.sample(images.shape, generator=torch.Generator()))


# ---- what is minimised


def slow_terms(translator, discriminator, images, drawn, weights):
    """The losses of Huang et al. 2018 one image at a time, in the paper's pixel range [-1, 1]."""
    sums = dict.fromkeys(("discriminator", "adversarial", "image", "style", "content"), 0.0)
    for x, style in zip(images, drawn, strict=True):
        x, style = x[None], style[None]
        content, own = translator.content_encoder(x * 2 - 1), translator.style_encoder(x * 2 - 1)
        same, fake = translator.decoder(content, own), translator.decoder(content, style)
        real_score, fake_score = discriminator(x), discriminator((fake + 1) / 2)
        sums["discriminator"] += ((real_score - 1) ** 2).mean() + (fake_score**2).mean()
        sums["adversarial"] += weights.adversarial * ((fake_score - 1) ** 2).mean()
        sums["image"] += weights.image * (same - (x * 2 - 1)).abs().mean()
        sums["style"] += weights.style * (translator.style_encoder(fake) - style).abs().mean()
        sums["content"] += weights.content * (translator.content_encoder(fake) - content).abs().mean()
    return {name: value / len(images) for name, value in sums.items()}


@pytest.mark.parametrize("weights", [MunitWeights(), MunitWeights(0.5, 2.0, 3.0, 4.0)])
def test_loss_terms_equal_the_plain_computation(weights):
    whole, images = objective(weights=weights), some_images()
    for layer in (*whole.discriminator.layers, whole.discriminator.judge):
        layer.weight.data *= 10  # at its initial scale it scores every picture 0
    draw = whole.sample(images.shape, generator=torch.Generator().manual_seed(1))
    out = whole.forward(images, draw)
    got = {**whole.discriminator_terms(out), **whole.translator_terms(out)}
    expected = slow_terms(whole.translator, whole.discriminator, images, draw["style"], weights)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("side", [16, 30])
def test_the_adversary_judges_exactly_what_inference_gives(side):
    """Flaw 5 of the reference: its adversarial loss never saw the path that is used later."""
    whole, images = objective(), some_images(4, 1, side, side)
    draw = whole.sample(images.shape, generator=torch.Generator().manual_seed(1))
    fake = whole.forward(images, draw)["fake"]
    torch.testing.assert_close(fake, whole.translator.eval().apply(images, draw), atol=1e-5, rtol=0)


def test_each_update_reaches_its_own_network_only():
    whole, images = objective(), some_images()
    out = whole.forward(images, whole.sample(images.shape, generator=torch.Generator().manual_seed(1)))
    sum(whole.discriminator_terms(out).values()).backward()
    assert all(parameter.grad is None for parameter in whole.translator.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in whole.discriminator.parameters())
    sum(whole.translator_terms(out).values()).backward()
    for name, parameter in whole.translator.named_parameters():
        assert parameter.grad.abs().sum() > 0, f"{name} learns nothing"


def test_learning_rate_is_halved_at_its_step():
    whole = objective(learning_rate=1e-4, halve_every=100)
    rates = [whole.compute_learning_rates(step, 999)["translator"] for step in (0, 99, 100, 199, 200)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5])
    assert set(whole.compute_learning_rates(0, 999)) == set(whole.optimizers)


def test_optimisers_are_those_of_the_protocol():
    for optimizer in objective().optimizers.values():
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.5, 0.999), 1e-4)


# ---- on disk


def test_save_and_load_is_bit_identical(tmp_path):
    translator, images = build(channels=3).eval(), some_images(2, 3, 30, 30)
    translator.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = MunitTranslator.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert not again.training
    assert dict(again.config)["width"] == 4
    for name, value in translator.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(translator.apply(images, draw), again.apply(images, draw))


# ---- styles of the prior or of a bank


def test_styles_come_from_the_bank_and_are_switched():
    translator = build(styles="bank", bank_size=3)
    translator.bank.copy_(torch.arange(24.0).view(3, 8))
    draws = [translator.sample((900, 1, 8, 8), generator=torch.Generator().manual_seed(1))["style"] for _ in range(2)]
    assert torch.equal(*draws)
    kinds, counts = draws[0].unique(dim=0, return_counts=True)
    assert torch.equal(kinds, translator.bank)
    assert (counts - 300).abs().max() < 5 * 200**0.5
    plain = build().sample((4,), generator=torch.Generator().manual_seed(1))["style"]
    assert translator.draw_from("prior") is translator
    assert torch.equal(translator.sample((4,), generator=torch.Generator().manual_seed(1))["style"], plain)


def test_fitting_draws_from_the_prior_whatever_translations_use():
    whole = objective(build(styles="bank", bank_size=3))
    drawn = whole.sample((4, 1, 16, 16), generator=torch.Generator().manual_seed(1))["style"]
    assert torch.equal(drawn, torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))


def test_a_bank_of_none_is_not_written_and_a_full_one_comes_back(tmp_path):
    """Weights from before there were banks have no such entry, and load."""
    assert "bank" not in build().state_dict()
    translator = build(bank_size=5)
    translator.bank.copy_(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    translator.draw_from("bank").save_pretrained(tmp_path / "full")
    again = load_translator(tmp_path / "full")
    assert again.config.styles == "bank"
    assert torch.equal(again.bank, translator.bank)
    build().save_pretrained(tmp_path / "empty")
    config = tmp_path / "empty" / "config.json"
    old = {name: value for name, value in json.loads(config.read_text()).items() if name not in ("styles", "bank_size")}
    config.write_text(json.dumps(old))
    before = load_translator(tmp_path / "empty")
    assert before.config.bank_size == 0
    with pytest.raises(SettingsError, match="it keeps no bank of styles"):
        before.draw_from("bank")


@pytest.mark.parametrize("options", [{"styles": "bank"}, {"styles": "real"}])
def test_bad_styles_are_named(options):
    with pytest.raises(SettingsError, match=r"MUNIT translator: (styles must be prior or bank|it keeps no bank)"):
        build(**options)


@pytest.mark.parametrize("styles", ["prior", "bank"])
def test_fitting_fills_the_bank_with_styles_of_head_images(styles):
    data = ImageData((some_images(40) * 255).byte(), torch.arange(40) // 30, ("head", "tail"))
    whole = objective(build(styles=styles, bank_size=64))
    loop = FitSettings(steps=2, batch_size=4, head_from=20, sample_every=9, checkpoint_every=9)
    fitted = fit_objective(whole, data, loop, run=Run(None, kind="fit"), progress=False)
    with torch.no_grad():
        own = fitted.style(data.float_images())
        distances = torch.cdist(fitted.bank, own, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(1)
    assert nearest.values.max() < 1e-5
    assert nearest.indices.max() < 30, "no style of a tail image"
    assert len(nearest.indices.unique()) > 15
