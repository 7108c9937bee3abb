"""How much the server takes on: everything an operator can bound, in one place."""

from __future__ import annotations

import dataclasses

from mdm.config import require


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    max_rows         texts in work at the same time; the others wait
    batch_tokens     tokens of one forward, padding included (a longer single row is one by itself)
    max_queue        requests that wait for a place; one more is told to come back (429)
    max_n            texts one request may ask for
    max_samples      masks one likelihood may take
    max_body_bytes   size of a request
    timeout_s        seconds a request may take, waiting included; a request can ask for less
    workspace_mib    memory that forwards and caches may take beside the weights; 0 = half of what
                     is free when the models are loaded
    trajectories     finished requests kept for replay; 0 = none
    """

    max_rows: int = 16
    batch_tokens: int = 4096
    max_queue: int = 64
    max_n: int = 16
    max_samples: int = 4096
    max_body_bytes: int = 2**20
    timeout_s: float = 600.0
    workspace_mib: int = 0
    trajectories: int = 64

    def __post_init__(self) -> None:
        for name in ("max_rows", "batch_tokens", "max_n", "max_samples", "max_body_bytes"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1; got {value}")
        for name in ("max_queue", "workspace_mib", "trajectories"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must be at least 0; got {value}")
        require(0 < self.timeout_s < 10**6, f"timeout_s must be > 0; got {self.timeout_s}")
