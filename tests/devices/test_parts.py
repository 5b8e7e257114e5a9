"""Parts that no command uses, on another device: a loop of one's own, kornia, torchmetrics, pipelines."""

from __future__ import annotations

import os

import kornia
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import gen_invariance as gi
from gen_invariance.contrib.pipeline import TranslationPipeline
from gen_invariance.devices import use_accelerator
from gen_invariance.measure.metric import ExpectedKL
from gen_invariance.nuisance.protocol import draw_to
from gen_invariance.run import named_generator

pytestmark = pytest.mark.gpu

NUISANCES = {
    "background": gi.Background(),
    "compose": gi.Compose([gi.Rotation(), gi.Lighting()]),
    "lighting": gi.Lighting(),
    "randaugment": gi.RandAugment(),
    "rotation": gi.Rotation(),
    "shear": gi.Shear(),
    "thickness": gi.Thickness(),
    "translation": gi.Translation(),
    "trivialaugment": gi.TrivialAugment(),
}


def pixels(count=12, channels=1):
    images = torch.rand(count, channels, 16, 16, generator=named_generator(0, "pixels"))
    return images * (images > 0.5)


def translator():
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        return gi.MunitTranslator(width=4, residual_blocks=1, mlp_width=8).eval().requires_grad_(False)


def test_measuring_against_a_translator_that_lies_elsewhere(device):
    """It is copied to the images, and stays as it was: it may be in training."""
    nuisance, labels = translator().train().requires_grad_(True), torch.arange(12) % 3
    weights = torch.rand(256, 3, generator=named_generator(0, "weights"))
    found = [
        gi.measure_invariance(lambda x: x.flatten(1) @ weights.to(x.device), images, labels, nuisance, draws=2).ekld
        for images in (pixels(), pixels().to(device))
    ]
    torch.testing.assert_close(found[1].cpu(), found[0], rtol=1e-3, atol=1e-5)
    assert nuisance.training
    assert all(each.requires_grad and each.device.type == "cpu" for each in nuisance.parameters())


@pytest.mark.parametrize("name", NUISANCES)
def test_nuisances_do_the_same_with_the_same_draw(name, device):
    nuisance, images = NUISANCES[name], pixels(channels=3)
    draw = nuisance.sample(images.shape, generator=named_generator(1))
    there = nuisance.apply(images.to(device), draw_to(draw, images.to(device)))
    assert there.device == device
    torch.testing.assert_close(there.cpu(), nuisance.apply(images, draw), rtol=0, atol=2e-3)


def test_a_loop_of_ones_own(device):
    """The stage beside a model that trains; the same rows are translated as on the CPU."""
    found = {}
    for place in (torch.device("cpu"), device):
        data = gi.ImageData((pixels(30) * 255).to(torch.uint8), torch.arange(30) % 3, ("a", "b", "c")).to(place)
        stage = gi.TailAugment(translator(), torch.tensor([0.0, 0.5, 1.0]), seed=3).to(place)
        stage.enable_cache(data.images, data.labels)
        weight = torch.zeros(3, 256, device=place, requires_grad=True)
        optimizer, loader = torch.optim.SGD([weight], lr=0.1), gi.ResidentLoader(data, batch_size=10, seed=2)
        for step in range(6):
            rows = loader.indices(step)
            images, labels = stage(data.float_images(rows), data.labels[rows], indices=rows)
            optimizer.zero_grad()
            F.cross_entropy(images.flatten(1) @ weight.T, labels).backward()
            optimizer.step()
        found[place] = weight.detach().cpu()
    torch.testing.assert_close(found[device], found[torch.device("cpu")], rtol=0, atol=1e-4)


def test_a_device_without_a_number_is_its_first(device):
    """Tensors say "cuda:0", users "cuda": nothing is copied where the weights are already."""
    from gen_invariance.augment.reference import FrozenReference

    there = translator().to(device)
    assert FrozenReference(there).on(torch.device(device.type)) is there


def test_inside_kornia_and_replayed(device):
    chain = kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomHorizontalFlip(p=0.5), gi.KorniaNuisance(translator(), p=0.5)
    ).to(device)
    images = pixels().to(device)
    out = chain(images)
    assert out.device == device
    torch.testing.assert_close(chain(images, params=chain._params), out, rtol=0, atol=1e-5)


def test_metric_and_pipeline(device):
    metric = ExpectedKL(3).to(device)
    logits = [torch.randn(12, 3, generator=named_generator(place)) for place in range(2)]
    labels = torch.arange(12) % 3
    metric.update(*(each.to(device) for each in (*logits, labels)))
    here = ExpectedKL(3)
    here.update(*logits, labels)
    assert float(metric.compute()) == pytest.approx(float(here.compute()), rel=1e-4)
    moved = {
        place: TranslationPipeline(translator().to(place))(pixels(), num_draws=2, generator=named_generator(5)).cpu()
        for place in ("cpu", device)
    }
    torch.testing.assert_close(moved[device], moved["cpu"], rtol=0, atol=1e-3)


def test_one_process_computes_on_one_device_after_another(device):
    for place in (torch.device("cpu"), device, torch.device("cpu")):
        with use_accelerator(place) as accelerator:
            assert accelerator.device.type == place.type


def test_a_users_accelerator_is_left_as_it_was(device):
    own = Accelerator(cpu=True)
    with use_accelerator(device, mixed_precision="bf16") as accelerator:
        assert (accelerator.device.type, accelerator.mixed_precision) == (device.type, "bf16")
    assert (own.device.type, own.mixed_precision, own.num_processes) == ("cpu", "no", 1)


@pytest.mark.skipif(os.environ.get("GEN_INVARIANCE_TEST_DEVICE") != "pretended", reason="changes the pretended device")
def test_on_a_device_without_float64(device, monkeypatch):
    """As Apple's, whose tensors refuse that type."""
    from pretended import Elsewhere

    made = Elsewhere.__new__

    def without(cls, values):
        if values.dtype in (torch.float64, torch.complex128):
            raise TypeError("this device has no float64")
        return made(cls, values)

    monkeypatch.setattr(Elsewhere, "__new__", without)
    images, labels = pixels(12, 3), torch.arange(12) % 3
    data = gi.ImageData((images * 255).to(torch.uint8), labels, ("a", "b", "c"))

    def model(given):
        return given.flatten(1)[:, :3]

    found = {}
    for place in (torch.device("cpu"), device):
        here, there = images.to(place), labels.to(place)
        stage = gi.TailAugment(gi.RandAugment(), torch.ones(3), seed=1)
        stage.enable_cache(data.to(place).images, there, versions=2, seed=0)
        metric = ExpectedKL(3).to(place)
        metric.update(model(here), model(here.flip(0)), there)
        logits = torch.randn(12, 3, generator=named_generator(3)).to(place)
        found[place] = [
            gi.measure_invariance(model, here, there, gi.Rotation(30), draws=2).ekld,
            gi.compare_invariance(
                model, lambda each: 2 * model(each), here, there, gi.Rotation(30), draws=2
            ).difference,
            gi.measure_accuracy(model, here, there).accuracy,
            metric.compute().cpu().double(),
            gi.build_loss("ldam", counts=[9, 3, 1], weights="inverse").to(place)(logits, there).cpu(),
            stage(here, there, indices=torch.arange(12, device=place))[0].cpu(),
            data.to(place).mean_std()[1].cpu(),
        ]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_recorded_steps_train_as_steps_that_are_asked_for(device):
    """The short last batch has a graph of its own in the end; rates change from step to step."""
    data = gi.ImageData((pixels(30) * 255).to(torch.uint8), torch.arange(30) % 3, ("a", "b", "c")).to(device)
    found = []
    for capture in (False, True):
        how = gi.TrainSettings(epochs=8, batch_size=8, warmup=1, milestones=(4, 6), learning_rate=0.02, capture=capture)
        stage = gi.TailAugment(gi.Rotation(), torch.tensor([0.0, 0.5, 1.0]))
        model = gi.build_classifier("small_conv", num_classes=3, channels=1, generator=named_generator(2))
        found.append(gi.fit_classifier(model, data, how, stage=stage, progress=False).state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=2e-2, atol=5e-3)
