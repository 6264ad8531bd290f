"""Counting how often hooks fire, so that a hook that never fires is an error and not an effect of zero.

It knows nothing about where hooks are attached.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._names import PointTable


class Firings:
    """Firings of the hooks of one run, by direction and name.

    Args:
        points: the table that the names come from.
    """

    def __init__(self, points: PointTable) -> None:
        self.points = points
        self.counts: dict[tuple[str, str], int] = {}

    def watch(self, name: str, hook: Callable[..., Any], direction: str = "forward") -> Callable[..., Any]:
        """Wrap a hook so that its firings are counted.

        Args:
            name: the point's name.
            hook: called as `hook(value, hook=point)`.
            direction: "forward" or "backward".
        """
        key = (direction, name)
        self.counts.setdefault(key, 0)
        function = hook

        def counted(value: Any, hook: Any) -> Any:  # TransformerLens passes hook= by keyword
            self.counts[key] += 1
            return function(value, hook=hook)

        return wraps(function)(counted) if hasattr(function, "__name__") else counted

    def require(self, backward: bool = True) -> None:
        """Raise HookError for the first watched hook that never fired.

        Args:
            backward: whether backward hooks must have fired too.
        """
        for (direction, name), calls in self.counts.items():
            if calls == 0 and (direction == "forward" or backward):
                raise HookError(silence(self.points, name, direction))


def silence(points: PointTable, name: str, direction: str = "forward") -> str:
    """The message for a hook that never fired, with the likeliest reason."""
    point = points.points.get(points.aliases.get(name, name).partition(".hook_sae_")[0])
    if direction == "backward":
        return (
            f"The backward hook at {name!r} never fired. Call backward() inside the `hooks()` block, on a"
            " result that depends on this point with gradients enabled."
        )
    why = "The model did not run, or it stopped before this point."
    if point is not None and point.prefill_only:
        why = "It fires only when the model sees pixel_values; this run had none."
    return f"The hook at {name!r} never fired. {why} A silent hook would look like an effect of zero."
