"""Published ways to deepen a model, by name; each has one parameter.

    name        parameter      n layers become
    solar       trim           0:n-trim, trim:n; n/4 by default (arXiv:2312.15166: 8 of 32)
    g_stack     times          all of them, `times` times; 2 by default (arXiv:2405.15319)
    llama-pro   expand_every   a zero-initialised copy behind every `expand_every` layers;
                               4 by default (arXiv:2401.02415: 32 to 40)
    midas       block          the middle one of blocks of `block` layers twice; 4 by default
                               (arXiv:2409.19044)
    lidas       block          the `block` layers around the middle twice; 4 by default
                               (arXiv:2512.08819)

With n/block blocks, counted from 1, the middle one is number ceil(n / block / 2).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from streammap.architectures.limits import MAX_LAYERS
from streammap.errors import SchemeError, some


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """One of them."""

    parameter: str
    default: int | None
    """None where it depends on the number of layers."""
    layers: Callable[[int, int], list[range]]
    """Number of layers, parameter -> slices. A ValueError says what was expected."""
    zero: bool = False
    """Whether the layers that it adds are zero-initialised."""


def named(text: str) -> str | None:
    """The recipe that a text names, with dashes or underscores; None if none."""
    plain = text.strip().lower().replace("_", "-")
    return next((name for name in RECIPES if name.replace("_", "-") == plain), None)


def layers(name: str, n: int, parameters: Mapping[str, int], where: str) -> tuple[int, ...]:
    """For each layer of the result, the layer of a source of `n` that it comes from.

    Raises:
        SchemeError: a parameter that doesn't fit the number of layers.
    """
    recipe = RECIPES[name]
    usual = n // 4 if recipe.default is None else recipe.default
    value = parameters.get(recipe.parameter, usual)
    try:
        slices = recipe.layers(n, value)
    except ValueError as error:
        raise SchemeError(
            f"{where}: {name} of {n} layers: {recipe.parameter} is {value}, expected {error}",
            hint=f"give another {recipe.parameter}",
        ) from error
    if sum(map(len, slices)) > MAX_LAYERS:
        raise SchemeError(f"{where}: more than {MAX_LAYERS} layers", hint="ask for fewer layers")
    return tuple(layer for one in slices for layer in one)


def _solar(n: int, trim: int) -> list[range]:
    if not 0 <= 2 * trim < n:
        raise ValueError(f"0 to {(n - 1) // 2}, less than half of them")
    return [range(n - trim), range(trim, n)]


def _g_stack(n: int, times: int) -> list[range]:
    if not 2 <= times <= MAX_LAYERS:
        raise ValueError("2 or more")
    return [range(n)] * times


def _llama_pro(n: int, every: int) -> list[range]:
    if not 1 <= every <= n:
        raise ValueError(f"1 to {n}")
    blocks: list[range] = []
    for end in range(every, n + 1, every):
        blocks += [range(end - every, end), range(end - 1, end)]
    return [*blocks, range(n - n % every, n)]


def _midas(n: int, block: int) -> list[range]:
    fitting = [size for size in range(1, n + 1) if n % size == 0]
    if block not in fitting:
        raise ValueError(f"blocks of one size: {some(fitting, limit=6)}")
    end = -(-(n // block) // 2) * block
    return [range(end), range(end - block, n)]


def _lidas(n: int, block: int) -> list[range]:
    if not 1 <= block <= n:
        raise ValueError(f"1 to {n}")
    start = (n - block) // 2
    return [range(start + block), range(start, n)]


RECIPES: Mapping[str, Recipe] = {
    "solar": Recipe("trim", None, _solar),
    "g_stack": Recipe("times", 2, _g_stack),
    "llama-pro": Recipe("expand_every", 4, _llama_pro, zero=True),
    "midas": Recipe("block", 4, _midas),
    "lidas": Recipe("block", 4, _lidas),
}
