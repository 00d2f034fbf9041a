"""A batch as it is recorded: which runs one worker does together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Runs that one worker does together, in the order that the engine is given them.

    Attributes:
        method, backbone: names.
        keys: of the runs.
        threads: that it is worked on with.
        budget: bytes that training may take at once; None for methods that do not train in the engine.
        cost: seconds that it may take one core, roughly.
        attempt: how often a batch of these runs has failed before.
    """

    method: str
    backbone: str
    keys: tuple[str, ...]
    threads: int
    budget: int | None = None
    cost: float = 0.0
    attempt: int = 0

    @property
    def name(self) -> str:
        """What its record and its checkpoint are called."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()[:16]

    @property
    def trains(self) -> bool:
        """Whether its runs train together in the engine."""
        return self.budget is not None
