"""How one emulated provider is set up: what the handle hands to the process it starts."""

from __future__ import annotations

import msgspec

LIMITS: dict[str, int] = {
    "openai_requests": 50_000,
    "openai_bytes": 200_000_000,
    "openai_embedding_inputs": 50_000,
    "openai_batches_per_hour": 2_000,
    "openai_enqueued_tokens": 0,  # 0: no limit
    "anthropic_requests": 100_000,
    "anthropic_bytes": 256_000_000,
    "anthropic_queue": 500_000,
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the server process is told at its start."""

    directory: str
    host: str = "127.0.0.1"
    port: int = 0
    latency: float = 0.0
    batch_seconds: float = 0.0
    auto: bool = True
    stepwise: bool = False
    scoped: bool = False
    models: list[str] | None = None
    rpm: int | None = None
    tpm: int | None = None
    limits: dict[str, int] = {}
    asks_parent: bool = False
    detached: bool = False

    def limit(self, name: str) -> int:
        return self.limits.get(name, LIMITS[name])
