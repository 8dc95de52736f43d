"""What is measured once a call or a generation, with the conventions' own buckets.

Measured inside the spans' context: where a trace is sampled, histograms keep it as exemplar.
"""

from __future__ import annotations

from opentelemetry.metrics import Histogram, Meter

MODEL_SECONDS = tuple(0.01 * 2**step for step in range(14))
FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
USED_TOKENS = tuple(4**power for power in range(14))
CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class Instruments:
    """The instruments, and what every measurement of a model says of it."""

    def __init__(self, meter: Meter) -> None:
        def histogram(name: str, unit: str, bounds: tuple[float, ...], description: str) -> Histogram:
            return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=bounds)

        self.address: dict[str, str | int] = {}
        self.model: dict[str, str | int] = {}
        self.call_duration = histogram("rpc.server.call.duration", "s", CALL_SECONDS, "Duration of incoming calls")
        self.request_duration = histogram(
            "gen_ai.server.request.duration", "s", MODEL_SECONDS, "From a request's arrival to its last token"
        )
        self.first_token = histogram(
            "gen_ai.server.time_to_first_token", "s", FIRST_TOKEN_SECONDS, "From a request's arrival to its first token"
        )
        self.per_token = histogram(
            "gen_ai.server.time_per_output_token", "s", TOKEN_SECONDS, "Time per token after the first"
        )
        self.usage = histogram("gen_ai.client.token.usage", "{token}", USED_TOKENS, "Tokens in and out of a request")
        self.queue = histogram("dspark.queue.duration", "s", FIRST_TOKEN_SECONDS, "Wait for the first round")
        self.prompt = meter.create_counter("dspark.prompt.tokens", "{token}", "Prompt tokens of admitted requests")
        self.cached = meter.create_counter(
            "dspark.prefix_cache.hit.tokens", "{token}", "Of these, found in the prefix cache"
        )

    def serve(self, model: str) -> None:
        """Names the model."""
        self.model = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "dspark",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            **self.address,
        }

    def listen(self, host: str, port: int) -> None:
        """Names the address."""
        self.address = {"server.address": host, "server.port": port}
        if self.model:
            self.model = {**self.model, **self.address}
