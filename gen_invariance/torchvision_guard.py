"""Make `import torchvision` work beside a CPU-only torch.

The torchvision wheel on the public index is compiled against CUDA. Next to a CPU build of torch its compiled
operators cannot load, and `import torchvision` then fails with "operator torchvision::nms does not exist",
because its Python side registers shape functions for two operators that nobody declared. Only that Python side
(models, transforms, data sets) is needed here, so this module declares the two schemas when, and only when, the
compiled operators cannot be loaded. Modules that lead to torchvision (diffusers does, too) import it first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library withdraws its operators when it is collected


def _compiled_operators_load() -> bool:
    """Whether torchvision's own compiled operators are, or can be, registered with this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # no torchvision: nothing to repair
    libraries = [*Path(spec.origin).parent.glob("_C.*")]
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, ImportError):
        return False
    return True


def declare_missing_operators() -> bool:
    """Declare `torchvision::nms` and `torchvision::qnms` where nothing else did or can; True if this call did.

    Example:
        >>> from gen_invariance import declare_missing_operators
        >>> declare_missing_operators()  # importing `gen_invariance.torchvision_guard` did it, where it was needed
        False
    """
    if _declared or "torchvision" in sys.modules or _compiled_operators_load():
        return False
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False  # another package made the same repair
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in missing:
        library.define(operator + _SIGNATURE)
    _declared.append(library)
    return True


declare_missing_operators()
