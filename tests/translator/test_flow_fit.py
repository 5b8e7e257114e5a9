"""Fitting a flow translator: it learns style without copying it, resumes to the bit, and stops on bad numbers."""

from dataclasses import replace

import pytest
import torch

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import CheckpointError, RunError, SettingsError
from gen_invariance.run import Run
from gen_invariance.translator.fit import FitSettings, class_members
from gen_invariance.translator.flow import fit as module
from gen_invariance.translator.flow.fit import (
    FlowSettings,
    fill_bank,
    fit_flow,
    flow_terms,
    learning_rate_at,
    sample_step,
    scrambled,
)
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.monitor import Watcher
from gen_invariance.translator.registry import fit_by_name


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
    return fit_flow(made(patch=1, bank_size=128), data, settings, options, run=run, progress=False), data, ground, run


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
    raw, shadow = last["translator"], last["average"]["shadow_params"]
    names = [name for name, _ in translator.named_parameters()]
    assert all(torch.equal(state[name], value) for name, value in zip(names, shadow, strict=True))
    assert not all(torch.equal(state[name], raw[name]) for name in names)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 5])
def test_resumed_equals_uninterrupted_to_the_bit(at, tmp_path, monkeypatch):
    data = bars()[0]
    straight = Run(tmp_path / "straight", kind="fit", seed=7)
    fit_flow(made(), data, loop(sample_every=4), FlowSettings(), run=straight, progress=False)

    halted, steps = Run(tmp_path / "halted", kind="fit", seed=7), iter(range(10**6))

    def fails(*arguments):
        if next(steps) == at:
            raise Interrupted
        return flow_terms(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "flow_terms", fails)
        with pytest.raises(Interrupted):
            fit_flow(made(), data, loop(sample_every=4), FlowSettings(), run=halted, progress=False)
    again = Run(tmp_path / "halted", kind="fit", seed=7, resume=True)
    fresh = made(seed=99 if at > 2 else 0)  # every weight must come from the checkpoint, if there is one
    state = torch.random.get_rng_state()
    fit_flow(fresh, data, loop(sample_every=4), FlowSettings(), run=again, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)

    expected, got = (load_translator(run.path).state_dict() for run in (straight, again))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert again.metrics() == straight.metrics()


def test_a_checkpoint_of_other_settings(tmp_path):
    fit_flow(made(), bars()[0], loop(), FlowSettings(), run=Run(tmp_path / "run", kind="fit"), progress=False)
    again = Run(tmp_path / "run", kind="fit", resume=True)
    with pytest.raises(CheckpointError, match="does not fit this translator") as caught:
        fit_flow(made(width=16), bars()[0], loop(steps=8), FlowSettings(), run=again, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("term", ["end", "code"])
def test_a_loss_that_is_not_finite_is_named(term, tmp_path, monkeypatch):
    def broken(*arguments):
        terms = flow_terms(*arguments)
        return {**terms, term: terms[term] * float("nan")}

    monkeypatch.setattr(module, "flow_terms", broken)
    with pytest.raises(RunError, match=f"stopped at step 1: loss term '{term}' is nan"):
        fit_flow(made(), bars()[0], loop(), FlowSettings(), run=Run(tmp_path / "run", kind="fit"), progress=False)
    assert not (tmp_path / "run" / "translator").exists()


def test_weights_that_are_not_finite_do_not_reach_a_checkpoint(tmp_path, monkeypatch):
    def break_weights(module_, optimizer, terms, accelerator):
        with torch.no_grad():
            next(module_.parameters()).view(-1)[0] = float("inf")

    monkeypatch.setattr(module, "update_weights", break_weights)
    with pytest.raises(RunError, match="a weight of the translator is NaN or infinite"):
        fit_flow(made(), bars()[0], loop(), FlowSettings(), run=Run(tmp_path / "run", kind="fit"), progress=False)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_only_the_chosen_classes_are_looked_at(tmp_path):
    data, _ = bars(60)
    small = data.subset(torch.cat([(data.labels < 2).nonzero().squeeze(1), torch.tensor([2, 5])]))
    broken = ImageData(small.images.clone(), small.labels, small.class_names)
    broken.images[small.labels == 2] = 0
    found = []
    for place, one in enumerate((small, broken)):
        run = Run(tmp_path / str(place), kind="fit")
        found.append(fit_flow(made(), one, loop(steps=2), FlowSettings(), run=run, progress=False).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    with pytest.raises(SettingsError, match="no class has 500 images"):
        fit_flow(made(), data, loop(head_from=500), FlowSettings(), run=run, progress=False)


def test_groups_are_held_out_of_a_watched_fit(tmp_path, monkeypatch):
    data, given = replace(bars(60)[0], groups=torch.arange(60) // 6), []
    monkeypatch.setattr(Watcher, "fitted", lambda self, members, groups: given.append(groups) or members)
    fit_flow(made(), data, loop(steps=1), FlowSettings(), run=Run(tmp_path / "run", kind="fit"), progress=False)
    assert torch.equal(given[0], data.groups)


def test_the_bank_holds_styles_of_every_class_alike(tmp_path):
    """Each class has one picture only, so its style tells the class."""
    pictures = torch.rand(3, 1, 8, 8, generator=seeded())
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 3)
    data = ImageData(to_uint8(pictures)[labels], labels, tuple("abc"))
    translator = made(bank_size=900).eval()
    fill_bank(translator, data, class_members(data, loop(head_from=10)), Run(tmp_path / "run", kind="fit"))
    with torch.no_grad():
        styles = translator.style(data.float_images(torch.tensor([0, 60, 90])))
    of = torch.cdist(translator.bank, styles)
    assert of.min(1).values.max() < 0.1 * torch.pdist(styles).min()
    counts = of.argmin(1).bincount(minlength=3).tolist()
    assert counts[2] == 0
    assert abs(counts[0] - 450) < 4 * 15  # four standard deviations


def test_terms_are_the_formula():
    translator, settings = made(removes=(), view_noise=0.2), FlowSettings(code_weight=0.5, code_noise=0.0)
    images = bars(6)[0].float_images()
    draw = sample_step(translator, images.shape, generator=seeded())
    seen = {}

    def end(x, time, view, style):
        seen.update(x=x, time=time, view=view, style=style)
        return torch.zeros_like(x)

    translator.end = end
    terms = flow_terms(translator, images, draw, settings)
    torch.testing.assert_close(terms["end"], (2 * images - 1).square().mean())
    torch.testing.assert_close(terms["code"], 0.5 * seen["style"].square().mean())
    time = draw["time"].view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["x"], (1 - time) * (2 * images - 1) + time * draw["noise"][:, 0])
    assert torch.equal(seen["time"], draw["time"])
    clean = (images - images.mean((1, 2, 3), keepdim=True)) / images.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["view"] - 0.2 * draw["noise"][:, 1], clean, atol=1e-4, rtol=0)


def test_randomness_of_a_step():
    draw = sample_step(made(), (400, 1, 8, 8), generator=seeded())
    assert draw["time"].min() > 0
    assert draw["time"].max() <= 1
    assert all(len(value) == 400 for value in draw.values())
    assert draw["shift"].max() == 7


def test_scrambled_is_a_mirror_and_a_shift():
    images = torch.rand(8, 3, 5, 5, generator=seeded())
    mirror = torch.tensor([[row & 1, row >> 1 & 1] for row in range(8)], dtype=torch.bool)
    shift = torch.randint(5, (8, 2), generator=seeded(1))
    found = scrambled(images, mirror, shift)
    for row in range(8):
        expected = images[row]
        for axis in (0, 1):
            # Position i shows position (shift +- i): shift first, then mirror about the new origin.
            expected = expected.roll(-int(shift[row, axis]), axis + 1)
            if mirror[row, axis]:
                expected = expected.flip(axis + 1).roll(1, axis + 1)
        assert torch.equal(found[row], expected), row


def test_learning_rate_rises_and_falls():
    rates = [learning_rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[-1] < 0.01
    assert learning_rate_at(0, 1, 1.0) == 1.0


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"code_noise": -1.0}, {"average": 1.5}, {"code_weight": -0.1}])
def test_bad_settings(bad):
    with pytest.raises(SettingsError, match=f"flow.{next(iter(bad))} must be"):
        FlowSettings(**bad)


def test_by_name(tmp_path):
    data, options = bars()[0], {"width": 8, "bank_size": 16, "levels": None}
    run = Run(tmp_path / "run", kind="fit", seed=3)
    translator = fit_by_name(
        "flow", data, loop(steps=1), run=run, network=options, objective={"code_noise": 0.1}, progress=False
    )
    assert isinstance(translator, FlowTranslator)
    assert translator.config.levels == 2
    assert load_translator(run.path).config.width == 8
    for wrong in ({"network": {"blocks": 3}}, {"objective": {"gamma": 1.0}}):
        with pytest.raises(SettingsError, match="translator"):
            fit_by_name("flow", data, loop(), run=run, **wrong, progress=False)
