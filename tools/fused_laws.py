"""Which row of a fused matrix is q, k, v, gate or up: asked of the model's own forward pass.

Nothing here reads how a family splits its projections. Each row is told by what it does:

    up     the output of a gated feed-forward is linear in it
    gate   the output is not: it goes through the activation
    v      the output of attention is linear in it
    q      of token 0 alone, it does not reach the output at token 1
    k      of token 0 alone, it reaches the output at token 1, and not linearly

Linear means that the second difference vanishes, in float64. To change a projection at token 0
alone, the input of the fused layer is replaced by one whose column 0 is zero elsewhere, and
only that column of the matrix is changed.
"""

from __future__ import annotations

import inspect
from typing import Any

SCALE, STEP = 0.5, 0.5
"""Standard deviation of the weights of an attention, and how far one of them is moved."""

FEED_SCALE, FEED_STEP = 0.2, 0.05
"""The same for a feed-forward, where all that one row reads is moved, and some clamp."""

TOLERANCE = 1e-4
"""Of second differences, against the first: some families compute a softmax in float32."""


class Arrival(Exception):  # noqa: N818  it is no error
    """Carries the input of the output projection out of a forward pass."""

    def __init__(self, value: Any) -> None:
        self.value = value


def attention_rows(model: Any, name: str, output: str, axis: int) -> list[str]:
    """The part of each row of the fused attention weight `name`.

    output: the name of the output projection's module, whose input is looked at.
    """
    import torch

    fused = model.get_submodule(name.rpartition(".")[0])
    weight = model.get_parameter(name)

    def crafted(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(arguments[0].shape, generator=generator, dtype=arguments[0].dtype)
        flat = x.view(-1, x.shape[-1])
        flat[:, 0] = 0
        flat[0, 0] = 1
        return (x,)

    def catch(_: Any, arguments: tuple[Any, ...]) -> None:
        raise Arrival(arguments[0].reshape(-1, arguments[0].shape[-1])[1].clone())

    hooks = [
        fused.register_forward_pre_hook(crafted),
        model.get_submodule(output).register_forward_pre_hook(catch),
    ]

    def outcome() -> Any:
        try:
            _run(model, name)
        except Arrival as arrival:
            return arrival.value
        raise ValueError(f"{output} was not reached")

    try:
        found = []
        for row in range(weight.shape[axis]):
            at = (row, 0) if axis == 0 else (0, row)
            first, second = _differences(weight, at, outcome)
            found.append("q" if first == 0 else "v" if second <= TOLERANCE * first else "k")
        return found
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: Any, name: str) -> None:
    """A forward pass of the tower that the named weight stands in."""
    import torch

    if "vision_tower" not in name:
        model(torch.arange(3, 9)[None])
        return
    tower = model.get_submodule(name[: name.index("vision_tower") + len("vision_tower")])
    size = tower.config.image_size
    tower(torch.zeros(1, 3, size, size, dtype=torch.float64))


def feed_forward_rows(model: Any, name: str, axis: int) -> list[str]:
    """The part of each row along `axis` of the fused feed-forward weight `name`."""
    import torch

    weight = model.get_parameter(name)
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight"):  # one layer alone is no gate
        module = model.get_submodule(name.rsplit(".", 2)[0])
    generator = torch.Generator().manual_seed(1)
    arguments = _arguments(model, module, generator)

    def outcome() -> Any:
        out = module(*arguments)
        return out[0] if isinstance(out, tuple) else out

    found = []
    for row in range(weight.shape[axis]):
        at = (*[slice(None)] * axis, row)
        first, second = _differences(weight, at, outcome, FEED_SCALE, FEED_STEP)
        if first == 0:
            raise ValueError(f"{name}: row {row} does nothing")
        found.append("up" if second <= TOLERANCE * first else "gate")
    return found


def _arguments(model: Any, module: Any, generator: Any) -> tuple[Any, ...]:
    """Inputs of a feed-forward: hidden states, and for bare experts who goes where."""
    import torch

    signature = inspect.signature(module.forward).parameters
    names = [p.name for p in signature.values()
             if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]  # fmt: skip
    width = _width(model, module)
    experts = next((p.shape[0] for p in module.parameters() if p.dim() == 3), 1)
    states = torch.randn(2 * experts, width, generator=generator, dtype=torch.float64)
    # a decorator that chooses the implementation hides the names
    if len(names) == 3 or not names or "router_indices" in signature:
        index = torch.arange(2 * experts)[:, None] % experts
        return states, index, torch.ones(2 * experts, 1, dtype=torch.float64)
    if len(names) != 1:
        raise ValueError(f"{type(module).__name__}.forward takes {', '.join(names)}")
    return (states if names[0] == "hidden_states" and experts > 1 else states[None],)


def _width(model: Any, module: Any) -> int:
    """The width of the hidden states that enter a feed-forward."""
    linear = next((m for m in module.children() if hasattr(m, "in_features")), None)
    if linear is not None:
        return int(linear.in_features)
    return int(model.config.get_text_config().hidden_size)


def _differences(
    weight: Any, at: Any, outcome: Any, scale: float = SCALE, step: float = STEP
) -> tuple[float, float]:
    """How much the outcome changes with a step of the weight, and how far from linearly."""
    import torch

    before = weight.data.clone()
    generator = torch.Generator().manual_seed(2)
    # large enough that a softmax or an activation is far from linear
    weight.data.copy_(torch.randn(before.shape, generator=generator, dtype=before.dtype) * scale)
    start = weight.data.clone()
    values = []
    with torch.no_grad():
        for steps in range(3):
            weight.data[at] = start[at] + steps * step
            values.append(outcome())
        weight.data.copy_(before)
    first = (values[1] - values[0]).abs().max()
    second = (values[2] - 2 * values[1] + values[0]).abs().max()
    return float(first), float(second)
