"""Low-rank adapters on a backbone, through PEFT (optional); `TransferPlan("lora")` trains them."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

import gen_invariance.torchvision_guard  # noqa: F401  (PEFT leads to torchvision)
from gen_invariance.classifier.model import Classifier, lend_global_stream
from gen_invariance.errors import SettingsError


def add_lora(model: Classifier, *, rank: int = 8, generator: torch.Generator) -> None:
    """Put low-rank adapters on the linear and ungrouped conv layers of `model`'s backbone, in place.

    At the start the model computes what it did before. Grouped and depthwise convolutions get none: there an adapter
    is larger than the layer. `TransferPlan("lora").apply` then lets the adapters and the head train, and nothing else.
    Reference: Hu et al. 2022, equation 3.

    Args:
        model: a classifier with declared blocks.
        rank: of each adapter; layers with fewer channels on either side than `rank` are left out.
        generator: source of the adapters' initial weights.

    Raises:
        SettingsError: PEFT is missing, the rank is below one, or no layer fits.
    """
    if importlib.util.find_spec("peft") is None:
        raise SettingsError("low-rank adapters need PEFT; install it with: pip install peft")
    if rank < 1:
        raise SettingsError(f"rank must be at least 1, got {rank}; 8 is usual")
    model.require_blocks()
    targets = [name for name, module in model.backbone.named_modules() if _takes_adapter(module, rank)]
    if not targets:
        raise SettingsError(f"no layer of the backbone takes an adapter of rank {rank}; lower it")
    from peft import LoraConfig, inject_adapter_in_model

    with lend_global_stream(generator):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model.backbone)


def _takes_adapter(module: nn.Module, rank: int) -> bool:
    if isinstance(module, nn.Linear):
        return min(module.in_features, module.out_features) >= rank
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return min(module.in_channels, module.out_channels) >= rank
    return False


def merge_lora(model: Classifier) -> None:
    """Merge the adapters into the layers they sit on, in place: same outputs, plain layers, ordinary state dict."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.backbone.get_submodule(parent), child, module.get_base_layer())
