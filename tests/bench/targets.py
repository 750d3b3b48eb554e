"""The targets of a benchmark."""

from typing import NamedTuple


class Target(NamedTuple):
    """What was measured, with its lower or its upper limit."""

    name: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self) -> bool:
        if self.at_least is not None:
            return self.measured >= self.at_least
        return self.measured <= self.at_most


def print_targets(targets: list[Target]) -> None:
    """A line for each target: whether it was met."""
    for target in targets:
        limit = f"at least {target.at_least}"
        if target.at_least is None:
            limit = f"at most {target.at_most}"
        verdict = "ok" if target.is_met() else "short"
        print(f"target {target.name} measured {target.measured:.2f} {limit} {verdict}")
