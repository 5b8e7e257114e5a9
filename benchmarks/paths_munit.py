"""Hot paths of MUNIT: fitting it and generating with it, the plain recipe's way and the package's."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import plain_recipe as recipe
from benchmarks.timing import BATCH, SMALL, Variant, pictures, stored
from gen_invariance.augment.cache import CodeCache, TranslationBank
from gen_invariance.data.images import ImageData
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator
from gen_invariance.translator.munit.model import MunitObjective, MunitSettings, MunitTranslator

# ---- fitting


def copy_weights(objective: MunitObjective, plain: recipe.PlainMunit) -> None:
    """The package's weights into the plain networks; biases that a normalisation removes have no counterpart."""

    def layers(module: nn.Module) -> list[nn.Module]:
        return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]

    ours, own = objective.translator, plain.gens[0]
    pairs = (
        (ours.content_encoder, own.content),
        (ours.style_encoder, own.style),
        (nn.ModuleList([ours.decoder.blocks, ours.decoder.up, ours.decoder.last]), own.decoder),
        (ours.decoder.style, own.mlp),
        (objective.discriminator, plain.dis[0]),
    )
    with torch.no_grad():
        for first, second in pairs:
            for source, target in zip(layers(first), layers(second), strict=True):
                target.weight.copy_(source.weight.view_as(target.weight))
                if source.bias is not None:
                    target.bias.copy_(source.bias.view_as(target.bias))


def our_step(objective: MunitObjective, images: Tensor, draw: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step as `fit_translator` takes it."""
    out = objective.forward(images, draw)
    terms = objective.discriminator_terms(out)
    _update(objective, "discriminator", terms)
    objective.discriminator.requires_grad_(False)
    terms |= objective.translator_terms(out)
    _update(objective, "translator", {name: term for name, term in terms.items() if name != "discriminator"})
    objective.discriminator.requires_grad_(True)
    return terms


def _update(objective: MunitObjective, name: str, terms: dict[str, Tensor]) -> None:
    objective.optimizers[name].zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    objective.optimizers[name].step()


def objective_on(device: torch.device, **network: int) -> MunitObjective:
    translator = MunitTranslator(1, **network).to(device)
    made = MunitObjective(translator, MunitSettings(discriminator_layers=3 if network else 4))
    made.discriminator.to(device)
    return made


def munit_same(device: torch.device, batch: int, goal: str) -> list[Variant]:
    """One domain, the same losses, both ways."""
    images = pictures(batch).float().to(device) / 255
    draw = {"style": torch.randn(batch, 8, generator=named_generator(1)).to(device)}
    ours, plain = objective_on(device), recipe.PlainMunit(1, domains=1, device=device)

    def difference() -> float:
        fresh, other = objective_on(device), recipe.PlainMunit(1, domains=1, device=device)
        copy_weights(fresh, other)
        one, two = our_step(fresh, images, draw), other.step([images * 2 - 1], [draw["style"]])
        return max(abs(float(one[name].detach()) - value) / abs(value) for name, value in two.items())

    return [
        Variant(
            f"recipe, one domain, batch {batch}", "plain", lambda: plain.step([images * 2 - 1], [draw["style"]])
        ),
        Variant(
            f"ours, batch {batch}", "same", lambda: our_step(ours, images, draw), goal=goal, difference=difference,
            note="difference is relative, of the five loss terms",
        ),
    ]  # fmt: skip


def munit_per_image(device: torch.device) -> list[Variant]:
    """What one training image of the generator that is kept costs."""
    variants = []
    plain, one = recipe.PlainMunit(1, device=device), pictures(1).float().to(device) / 127.5 - 1
    styles = [torch.randn(1, 8, device=device) for _ in range(2)]
    variants.append(
        Variant("recipe, two domains, batch 1", "plain", lambda: plain.step([one, one], styles), unit="image")
    )
    for name, network in (("ours, width 64, batch 16", {}), ("ours, munit_small, batch 16", SMALL)):
        objective, images = objective_on(device, **network), pictures(16).float().to(device) / 255
        draw = {"style": torch.randn(16, 8, device=device)}

        def run(objective: MunitObjective = objective, images: Tensor = images, draw: dict = draw) -> None:
            our_step(objective, images, draw)

        variants.append(Variant(name, "changed", run, units=16, unit="image", goal="with quality: docs/performance.md"))
    return variants


# ---- generating


def munit_on(device: torch.device, **network: int) -> MunitTranslator:
    return MunitTranslator(1, **network).to(device).eval().requires_grad_(False)


def generating(device: torch.device) -> list[Variant]:
    """Useful generated images: 64 of a batch of 128."""
    data, half = stored(256, device), BATCH // 2
    plain, objective = recipe.PlainMunit(1, domains=1, device=device), objective_on(device)
    copy_weights(objective, plain)
    variants = [
        Variant(
            "recipe: 128 translated, 64 used", "plain",
            lambda: recipe.generated_half(plain.gens[0], data.float_images(torch.arange(BATCH)) * 2 - 1),
            units=half, unit="image",
        ),
    ]  # fmt: skip
    rows = torch.arange(half, device=device)
    for name, nuisance in (
        ("width 64", objective.translator.eval().requires_grad_(False)),
        ("munit_small", munit_on(device, **SMALL)),
    ):
        same = name == "width 64"
        draw = nuisance.sample((half, 1, 28, 28), generator=named_generator(2))
        kept = CodeCache(nuisance, data.images)
        kept.codes(torch.arange(256, device=device))

        def apply(nuisance: Nuisance = nuisance, draw: dict = draw) -> Tensor:
            with torch.no_grad():
                return nuisance.apply(data.float_images(rows), draw)

        def keep(kept: CodeCache = kept, draw: dict = draw) -> Tensor:
            return kept.translate(rows, draw)

        def difference(fast: Callable[[], Tensor], draw: dict = draw, same: bool = same) -> Callable | None:
            with torch.no_grad():
                content, _ = plain.gens[0].encode(data.float_images(rows) * 2 - 1)
                slow = (plain.gens[0].decode(content, draw["style"].to(device)) + 1) / 2
            return (lambda: float((slow - fast()).abs().max())) if same else None

        kind, common = "same" if same else "changed", {"units": half, "unit": "image"}
        variants += [
            Variant(f"ours, {name}, only the used half", kind, apply, difference=difference(apply), **common),
            Variant(
                f"ours, {name}, codes kept", kind, keep, difference=difference(keep), **common,
                goal=">= 3.5" if same else "15 at equal quality",
            ),
            banked(f"ours, {name}, bank, each used 4 times, filling counted", nuisance, data, reuse=4),
        ]  # fmt: skip
    return variants


def banked(name: str, nuisance: Nuisance, data: ImageData, *, reuse: int) -> Variant:
    """Half batches out of a bank of one translation an image, over a whole period and so with all of its redrawing."""
    half, period = BATCH // 2, reuse * len(data) // (BATCH // 2)
    bank = TranslationBank(nuisance, data.images, versions=1, period=period, block=32)
    bank.refresh(0)
    steps = itertools.count()

    def run() -> None:
        for step in itertools.islice(steps, period):
            bank.refresh(step)
            rows = torch.arange(step * half, (step + 1) * half, device=data.device) % len(data)
            bank.translate(rows, {"version": torch.zeros(half, dtype=torch.int64)})

    return Variant(name, "changed", run, units=half * period, unit="image")
