"""Fitting a flow translator: it learns style without copying it; what it minimises is the formula."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run
from gen_invariance.translator.fit import fit_objective, fit_translator
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.flow.objective import FlowObjective, FlowSettings, scramble
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.samples import fill_bank, find_class_members
from gen_invariance.translator.settings import FitSettings


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def made(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return FlowTranslator(1, **{"width": 8, "bank_size": 16, **options})


def bars(count=96, size=8, classes=3):
    """A bar of one direction for each class, at a random place, on a random ground, in an ink apart from it."""
    generator = seeded(5)
    labels = torch.arange(count) % classes
    ground, gap = torch.rand(count, generator=generator), 0.3 + 0.4 * torch.rand(count, generator=generator)
    ink = torch.where(ground < 0.5, ground + gap, ground - gap).clamp(0, 1)
    place = torch.randint(1, size - 2, (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = torch.stack([y.expand(count, -1, -1), x.expand(count, -1, -1), (x + y).expand(count, -1, -1) // 2])
    on = (along[labels, torch.arange(count)] - place.view(-1, 1, 1)).abs() < 1
    images = torch.where(on, ink.view(-1, 1, 1), ground.view(-1, 1, 1))[:, None]
    return ImageData(to_uint8(images), labels, tuple("abc")[:classes]), ground


def loop(**changes):
    few = {"steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "sample_every": 6, "head_from": 10}
    return FitSettings(**{**few, **changes})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Fitted for a few seconds."""
    data, ground = bars(400, classes=2)
    run = Run(tmp_path_factory.mktemp("fit") / "run", kind="fit", seed=1)
    settings = loop(steps=150, batch_size=32, sample_every=150, checkpoint_every=150, log_every=50)
    options = FlowSettings(code_noise=0.1, learning_rate=5e-3)
    objective = FlowObjective(made(patch=1, bank_size=128), options)
    return fit_objective(objective, data, settings, run=run, progress=False), data, ground, run


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_the_ground_is_drawn_and_not_copied_and_the_shape_stays(fitted):
    translator, data, ground, _ = fitted
    images = data.float_images(torch.arange(64))
    # Styles of known images, so that it is known what they ask for.
    source = torch.randperm(len(data), generator=seeded())[:64]
    with torch.no_grad():
        translator.bank[:64] = translator.style(data.float_images(source))
        draw = {**translator.sample(images.shape, generator=seeded()), "style": torch.arange(64)}
        moved = translator.apply(images, draw)
    level = moved.flatten(1).median(1).values  # most pixels are ground
    assert correlation(level, ground[source]) > 0.9
    assert abs(correlation(level, ground[:64])) < 0.3
    bars_of = [(x - x.flatten(1).median(1).values.view(-1, 1, 1, 1)).abs().flatten(1) for x in (images, moved)]
    alike = torch.nn.functional.cosine_similarity(*(each - each.mean(1, keepdim=True) for each in bars_of))
    assert alike.median() > 0.8


def test_the_sign_of_the_contrast_is_drawn(fitted):
    translator, data, _, _ = fitted
    images = data.float_images(torch.arange(2).repeat_interleave(100))
    with torch.no_grad():
        moved = translator.apply(images, translator.sample(images.shape, generator=seeded()))
    lighter = moved.mean((1, 2, 3)) > moved.flatten(1).median(1).values
    for own in lighter.split(100):
        assert 0.2 < own.float().mean() < 0.8


def test_losses_are_logged_and_fall(fitted):
    _, _, _, run = fitted
    rows = run.metrics()
    assert [row["step"] for row in rows] == [50, 100, 150]
    assert set(rows[0]) == {"step", "end", "code"}
    assert rows[-1]["end"] < 0.5 * rows[0]["end"]
    assert (run.path / "samples" / "step-00000150.png").is_file()


def test_what_is_saved_is_what_is_returned_the_average_of_the_weights(fitted):
    translator, _, _, run = fitted
    saved = load_translator(run.path).state_dict()
    state = translator.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in state.items() if name != "bank")
    last = run.load_latest()
    raw, average = last["translator"], last["average"]
    names = [name for name, _ in translator.named_parameters()]
    assert all(torch.equal(state[name], average[f"module.{name}"]) for name in names)
    assert not all(torch.equal(state[name], raw[name]) for name in names)


def test_the_average_rises_as_that_of_diffusers():
    average = EMAModel([torch.zeros(1)], decay=0.9, use_ema_warmup=True, power=2 / 3)
    objective = FlowObjective(made(), FlowSettings(average=0.9))
    for updates in (1, 2, 10, 1000):
        assert objective.average_decay(updates) == pytest.approx(average.get_decay(updates + 1))


def test_only_the_chosen_classes_are_looked_at(tmp_path):
    data, _ = bars(60)
    small = data.subset(torch.cat([(data.labels < 2).nonzero().squeeze(1), torch.tensor([2, 5])]))
    broken = ImageData(small.images.clone(), small.labels, small.class_names)
    broken.images[small.labels == 2] = 0
    found = []
    for place, one in enumerate((small, broken)):
        run = Run(tmp_path / str(place), kind="fit")
        fitted = fit_objective(FlowObjective(made()), one, loop(steps=2), run=run, progress=False)
        found.append(fitted.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    with pytest.raises(SettingsError, match="no class has 500 images"):
        fit_objective(FlowObjective(made()), data, loop(head_from=500), run=run, progress=False)


def test_the_bank_holds_styles_of_every_class_alike(tmp_path):
    """Each class has one picture only, so its style tells the class."""
    pictures = torch.rand(3, 1, 8, 8, generator=seeded())
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 3)
    data = ImageData(to_uint8(pictures)[labels], labels, tuple("abc"))
    translator = made(bank_size=900).eval()
    fill_bank(translator, data, find_class_members(data, loop(head_from=10)), Run(tmp_path / "run", kind="fit"))
    with torch.no_grad():
        styles = translator.style(data.float_images(torch.tensor([0, 60, 90])))
    of = torch.cdist(translator.bank, styles)
    assert of.min(1).values.max() < 0.1 * torch.pdist(styles).min()
    counts = of.argmin(1).bincount(minlength=3).tolist()
    assert counts[2] == 0
    assert abs(counts[0] - 450) < 4 * 15  # four standard deviations


def test_terms_are_the_formula():
    translator = made(removes=(), view_noise=0.2)
    objective = FlowObjective(translator, FlowSettings(code_weight=0.5, code_noise=0.0))
    images = bars(6)[0].float_images()
    draw = objective.sample(images.shape, generator=seeded())
    seen = {}

    def end(x, time, view, style):
        seen.update(x=x, time=time, view=view, style=style)
        return torch.zeros_like(x)

    translator.end = end
    terms = objective.translator_terms(objective.forward(images, draw))
    torch.testing.assert_close(terms["end"], (2 * images - 1).square().mean())
    torch.testing.assert_close(terms["code"], 0.5 * seen["style"].square().mean())
    time = draw["time"].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["x"], (1 - time) * (2 * images - 1) + time * draw["noise"][:, 0])
    assert torch.equal(seen["time"], draw["time"])
    clean = (images - images.mean((1, 2, 3), keepdim=True)) / images.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["view"] - 0.2 * draw["noise"][:, 1], clean, atol=1e-4, rtol=0)


def test_randomness_of_a_step():
    draw = FlowObjective(made()).sample((400, 1, 8, 8), generator=seeded())
    assert draw["time"].min() > 0
    assert draw["time"].max() <= 1
    assert all(len(value) == 400 for value in draw.values())
    assert draw["shift"].max() == 7


def test_scramble_is_a_mirror_and_a_shift():
    images = torch.rand(8, 3, 5, 5, generator=seeded())
    mirror = torch.tensor([[row & 1, row >> 1 & 1] for row in range(8)], dtype=torch.bool)
    shift = torch.randint(5, (8, 2), generator=seeded(1))
    found = scramble(images, mirror, shift)
    for row in range(8):
        expected = images[row]
        for axis in (0, 1):
            # Position i shows position (shift +- i): shift first, then mirror about the new origin.
            expected = expected.roll(-int(shift[row, axis]), axis + 1)
            if mirror[row, axis]:
                expected = expected.flip(axis + 1).roll(1, axis + 1)
        assert torch.equal(found[row], expected), row


def test_learning_rate_rises_and_falls():
    objective = FlowObjective(made(), FlowSettings(learning_rate=1.0))
    rates = [objective.compute_learning_rates(step, 100)["translator"] for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[-1] < 0.01
    assert objective.compute_learning_rates(0, 1) == {"translator": 1.0}


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"code_noise": -1.0}, {"average": 1.5}, {"code_weight": -0.1}])
def test_bad_settings(bad):
    with pytest.raises(SettingsError, match=f"translator.objective.{next(iter(bad))} must be"):
        FlowSettings(**bad)


def test_by_name(tmp_path):
    data, options = bars()[0], {"width": 8, "bank_size": 16, "levels": None}
    translator = fit_translator(
        "flow",
        data,
        loop(steps=1),
        network=options,
        objective={"code_noise": 0.1},
        out=tmp_path / "run",
        progress=False,
    )
    assert isinstance(translator, FlowTranslator)
    assert translator.config.levels == 2
    assert load_translator(tmp_path / "run").config.width == 8
    for wrong in ({"network": {"blocks": 3}}, {"objective": {"gamma": 1.0}}):
        with pytest.raises(SettingsError, match="translator"):
            fit_translator("flow", data, loop(), **wrong, progress=False)
