"""Under which names the library that a backbone comes from keeps the tensors of a classifier.

With these names weights load into the library's own model, with nothing of this package.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gen_invariance.torchvision_guard  # noqa: F401
from gen_invariance.classifier.backbones import is_torchvision
from gen_invariance.classifier.model import Classifier, CosineHead
from gen_invariance.classifier.small_networks import OWN_BACKBONES

_LITE0 = "tf_efficientnet_lite0"
"""timm's name of EfficientNet-Lite0 with the padding of TensorFlow, which its weights were trained with."""

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LibraryNames:
    """A classifier as another library names it.

    Attributes:
        library: "timm", "torchvision", or "gen_invariance" where no other library has this model.
        architecture: name of the model there.
        names: of each tensor of the classifier but its normalisation, its name there.
        model: the library's own model with these weights, in eval mode; takes normalised images. None for our own.
    """

    library: str
    architecture: str
    names: dict[str, str]
    model: nn.Module | None = None


def find_library_names(model: Classifier, backbone: str, *, side: tuple[int, int]) -> LibraryNames:
    """How the library of `backbone` names the tensors of `model`; our own names where it cannot hold the model.

    The library's model is built, given the weights and asked for an image; only one that answers alike counts. A
    cosine head has no place in other libraries.

    Args:
        model: built by `build_classifier(backbone, ...)`.
        backbone: name that it was built by.
        side: height and width of images to compare on.
    """
    own = {name: name for name in model.state_dict() if name not in ("mean", "std")}
    fallback = LibraryNames("gen_invariance", f"gen_invariance.{backbone}", own)  # no name that timm knows
    if not isinstance(model.head, nn.Linear):
        return fallback
    found = None
    if backbone.startswith("timm:"):
        found = _match_timm(model, backbone.removeprefix("timm:"))
    elif backbone == "efficientnet_lite0":
        found = _match_in_order(model, _LITE0) if importlib.util.find_spec("timm") else None
    elif is_torchvision(backbone):
        found = _match_torchvision(model, backbone)
    elif backbone not in OWN_BACKBONES:
        found = _match_timm(model, backbone)
    return found if found is not None and _answers_alike(model, found.model, side) else fallback


def linearise(model: Classifier, *, feature_norm: float) -> Classifier:
    """A classifier with a plain linear head in place of a cosine one, which other libraries have no place for.

    It names the same class for every image, for the length of an image's features scales all its logits alike;
    probabilities are those of features of length `feature_norm`.

    Args:
        model: with a cosine head; another one is returned as it is.
        feature_norm: mean length of the features of images.
    """
    if not isinstance(model.head, CosineHead):
        return model
    weight = nn.functional.normalize(model.head.weight.detach(), dim=1) * (model.head.scale / feature_norm)
    head = nn.utils.skip_init(nn.Linear, *weight.shape[::-1], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    plain = copy.copy(model)
    plain._modules = {**model._modules, "head": head}
    return plain


def _match_torchvision(model: Classifier, name: str) -> LibraryNames | None:
    from torchvision import models

    full = models.get_model(name, weights=None, num_classes=model.num_classes)
    return _match_by_prefix(model, full, "torchvision", name)


def _match_timm(model: Classifier, name: str) -> LibraryNames | None:
    import timm

    architecture = name.partition(".")[0]  # without the tag of its weights
    return _match_by_prefix(model, timm.create_model(architecture, num_classes=model.num_classes), "timm", architecture)


def _match_by_prefix(model: Classifier, full: nn.Module, library: str, architecture: str) -> LibraryNames | None:
    """The backbone's tensors lose their prefix, and the head takes the place of the two that are left."""
    wanted = full.state_dict()
    names = {key: key.removeprefix("backbone.") for key in model.state_dict() if key.startswith("backbone.")}
    left = [key for key in wanted if key not in names.values()]
    weights, biases = ([key for key in left if key.endswith(end)] for end in (".weight", ".bias"))
    if len(weights) != 1 or len(biases) != 1 or len(left) != 2:
        return None
    names |= {"head.weight": weights[0], "head.bias": biases[0]}
    return _fill(model, full, LibraryNames(library, architecture, names))


def _match_in_order(model: Classifier, architecture: str) -> LibraryNames | None:
    """Tensor by tensor, as both list their layers from input to output."""
    import timm

    full = timm.create_model(architecture, num_classes=model.num_classes)
    own, there = [key for key in model.state_dict() if key not in ("mean", "std")], list(full.state_dict())
    if len(own) != len(there):
        return None
    return _fill(model, full, LibraryNames("timm", architecture, dict(zip(own, there, strict=True))))


def _fill(model: Classifier, full: nn.Module, found: LibraryNames) -> LibraryNames | None:
    """`found` with the weights of `model` in `full`; None where some do not fit."""
    state = rename_state(model.state_dict(), found.names)
    wanted = full.state_dict()
    if set(state) != set(wanted) or any(state[key].shape != wanted[key].shape for key in wanted):
        return None
    full.load_state_dict(state)
    return LibraryNames(found.library, found.architecture, found.names, full.eval())


def rename_state(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors that `names` lists under their new names, on the CPU."""
    return {new: state[old].detach().cpu().contiguous() for old, new in names.items()}


@torch.no_grad()
def _answers_alike(model: Classifier, full: nn.Module, side: tuple[int, int]) -> bool:
    images = torch.rand(1, model.channels, *side, generator=torch.Generator().manual_seed(0))
    mode = model.training
    model.eval()
    try:
        expected = model(images.to(model.mean.device)).cpu()
        answer = full(model.normalise(images.to(model.mean.device)).cpu())
    finally:
        model.train(mode)
    return bool((answer - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1))
