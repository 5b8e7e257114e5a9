"""Low-rank adapters on a backbone, through PEFT (optional)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import nn

import gen_invariance.torchvision_guard  # noqa: F401  (PEFT leads to torchvision)
from gen_invariance.classifier.backbones import Classifier
from gen_invariance.errors import SettingsError


def add_lora(
    model: Classifier,
    *,
    rank: int = 8,
    alpha: float | None = None,
    stages: Sequence[str] | None = None,
    generator: torch.Generator,
) -> list[nn.Parameter]:
    """Fix the backbone of `model`, in place, and put low-rank adapters on its linear and ungrouped conv layers.

    At the start the model computes what it did before. Batch norm stays in eval mode. Grouped and depthwise
    convolutions get none: there an adapter is larger than the layer. Do not `apply` a `TransferPlan` afterwards, it
    would thaw the backbone. Reference: Hu et al. 2022, equation 3.

    Args:
        model: a classifier with declared stages.
        rank: of each adapter; layers with fewer channels on either side than `rank` are left out.
        alpha: adapters are scaled by alpha / rank; default `rank`.
        stages: which stages get adapters; default all.
        generator: source of the adapters' initial weights.

    Returns:
        The parameters that train: adapters, then head.

    Raises:
        SettingsError: PEFT is missing, a stage is unknown, the rank is below one, or no layer fits.
    """
    if importlib.util.find_spec("peft") is None:
        raise SettingsError("low-rank adapters need PEFT; install it with: pip install peft")
    if rank < 1:
        raise SettingsError(f"rank must be at least 1, got {rank}; 8 is usual")
    if not model.stages:
        raise SettingsError("the backbone declares no stages; wrap it with Classifier(Backbone(..., stages=...), head)")
    targets = _targets(model, tuple(stages or model.stages), rank)
    if not targets:
        raise SettingsError(
            f"no layer of {', '.join(stages or model.stages)} takes an adapter of rank {rank}; lower it"
        )
    from peft import LoraConfig, inject_adapter_in_model

    model.backbone.requires_grad_(False)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=targets)
        inject_adapter_in_model(config, model.backbone)
    model.keep_in_eval(model.stages)
    adapters = [parameter for name, parameter in model.backbone.named_parameters() if "lora_" in name]
    return [*adapters, *model.head.parameters()]


def _targets(model: Classifier, stages: Sequence[str], rank: int) -> list[str]:
    """Paths, inside the backbone, of the layers in `stages` that an adapter fits on."""
    chosen = {id(module) for stage in stages for module in model.stage_modules(stage)}

    def fits(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return min(module.in_features, module.out_features) >= rank
        plain = isinstance(module, nn.Conv2d) and module.groups == 1
        return plain and min(module.in_channels, module.out_channels) >= rank

    return [name for name, module in model.backbone.named_modules() if id(module) in chosen and fits(module)]


def merge_lora(model: Classifier) -> Classifier:
    """Fold the adapters into the layers they sit on, in place: same outputs, plain layers, ordinary state dict."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.backbone.get_submodule(parent), child, module.get_base_layer())
    return model
