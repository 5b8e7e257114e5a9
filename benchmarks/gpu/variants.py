"""The bare step by hand: what half precision, a captured graph, many models at once and a compiler would give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from benchmarks.gpu.host import Host, describe
from benchmarks.timing import stored
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.devices import full_precision
from gen_invariance.translator.registry import build_objective

Step = Callable[[], object]


def variants(host: Host) -> None:
    """Each in turn; one that fails stops no other."""
    size, count = host.pick(128, 8), host.pick(100, 1)
    images = torch.rand(size, 3, 32, 32, device=host.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (size,), device=host.device)
    host.note_time("eager, TF32 convolutions", _step(host, images, labels)[1], count)
    host.note_time("eager, bf16", _step(host, images, labels, half=True)[1], count)
    with full_precision():
        host.note_time("eager, fp32", _step(host, images, labels)[1], count)
    if host.is_cuda:
        for half in (False, True):
            for bench in (False, True):
                torch.backends.cudnn.benchmark = bench
                name = f"graph, {'bf16' if half else 'TF32'}{', cudnn.benchmark' if bench else ''}"
                _note_graph(host, name, _step(host, images, labels, half=half)[1], count)
        torch.backends.cudnn.benchmark = False
    for half in (False, True):
        _ensemble(host, images, labels, host.pick(8, 2), count, half=half)
        _munit(host, count, half=half)
    if host.is_cuda:
        model = _step(host, images, labels)[0]
        compiled = torch.compile(model)
        host.note_time("torch.compile, TF32", _step(host, images, labels, wrap=lambda _: compiled)[1], count)


def _step(
    host: Host, images: Tensor, labels: Tensor, *, half: bool = False, wrap: Callable[[nn.Module], Any] = lambda m: m
) -> tuple[nn.Module, Step]:
    model = build_classifier("resnet32", num_classes=10, channels=3)
    model.to(host.device, memory_format=torch.channels_last).train()
    rate = torch.tensor(0.1, device=host.device) if host.is_cuda else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=2e-4, fused=True)
    called = wrap(model)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            loss = F.cross_entropy(called(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return model, step


def _capture(step: Step) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _note_graph(host: Host, name: str, step: Step, count: int, *, divide: int = 1) -> None:
    try:
        graph = _capture(step)
    except Exception as error:  # what cannot be captured is a result, too
        host.note(name, describe(error))
        return
    host.note_time(name, graph.replay, count, divide=divide)


def _ensemble(host: Host, images: Tensor, labels: Tensor, number: int, count: int, *, half: bool) -> None:
    """`number` ResNet-32s at once by vmap, as seeds of one arm; milliseconds for each."""
    models = [build_classifier("resnet32", num_classes=10, channels=3).to(host.device).train() for _ in range(number)]
    weights, buffers = stack_module_state(models)
    weights = {name: value.detach() for name, value in weights.items()}
    shape, momentum = copy.deepcopy(models[0]).to("meta"), {n: torch.zeros_like(v) for n, v in weights.items()}
    batch, wanted = images.expand(number, *images.shape).contiguous(), labels.expand(number, -1).contiguous()

    def loss(parameters: dict, state: dict, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return F.cross_entropy(functional_call(shape, (parameters, state), (x,)), y)

    def step() -> None:
        gradients, _ = vmap(grad_and_value(loss))(weights, buffers, batch, wanted)
        moving = list(momentum.values())
        torch._foreach_mul_(moving, 0.9)
        torch._foreach_add_(moving, [gradients[name] for name in weights])
        torch._foreach_add_(list(weights.values()), moving, alpha=-0.1)

    kind = "bf16" if half else "TF32"
    works = host.note_time(f"{number} models by vmap, {kind}, a model", step, count, divide=number)
    if host.is_cuda and works:
        _note_graph(host, f"{number} models by vmap, graph, {kind}, a model", step, count, divide=number)


def _munit(host: Host, count: int, *, half: bool) -> None:
    """MUNIT's step at the published size, batch 16 of 28 x 28."""
    network = host.pick({}, {"width": 4, "residual_blocks": 1, "mlp_width": 8})
    objective = build_objective("munit", stored(4), network=network)
    parts = {"translator": objective.translator, "discriminator": objective.discriminator}
    optimizers = {
        name: torch.optim.Adam(part.to(host.device).train().parameters(), lr=1e-4, fused=True, capturable=host.is_cuda)
        for name, part in parts.items()
    }
    size = host.pick(16, 2)
    images = torch.rand(size, 1, 28, 28, device=host.device)
    draw = {"style": torch.randn(size, objective.translator.config.style_dim, device=host.device)}

    def move(name: str, terms: dict[str, Tensor]) -> None:
        optimizers[name].zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        optimizers[name].step()

    def step() -> None:
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=half, cache_enabled=False)
        with autocast:
            out = objective.forward(images, draw)
            terms = objective.discriminator_terms(out)
        move("discriminator", terms)
        objective.discriminator.requires_grad_(False)
        with autocast:
            terms = objective.translator_terms(out)
        move("translator", terms)
        objective.discriminator.requires_grad_(True)

    kind = "bf16" if half else "TF32"
    host.note_time(f"munit step, {kind}", step, count)
    if host.is_cuda:
        _note_graph(host, f"munit step, graph, {kind}", step, count)
