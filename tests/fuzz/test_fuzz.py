"""A small, fixed part of `make fuzz`, around a scripted engine."""

from __future__ import annotations

import random

from dspark.v1 import generation_pb2 as wire

from tests.fuzz import messages
from tests.fuzz.run import fuzz, services
from tests.server.conftest import Launch, checkpoint, directory, launch, until, vocab_size
from tests.server.test_service import collect

__all__ = ["checkpoint", "directory", "launch", "vocab_size"]


async def test_no_message_is_a_fault_of_the_server(launch: Launch) -> None:
    running = await launch("hello world, " * 3)
    outcome = await fuzz(running.address, 800, seed=11, concurrent=4)
    assert outcome.faults == []
    assert outcome.codes["OK"] > 20 and outcome.codes["INVALID_ARGUMENT"] > 200
    await until(lambda: not running.server.service.active and not running.engine.running)
    assert await collect(running, wire.GenerateRequest(text="hi"))


def test_messages_are_fixed_by_their_seed_and_reach_every_field() -> None:
    def make(seed: int) -> bytes:
        return messages.hostile(wire.GenerateRequest, random.Random(seed)).SerializeToString(deterministic=True)

    assert [make(seed) for seed in range(20)] == [make(seed) for seed in range(20)]
    seen = {
        field.name
        for seed in range(300)
        for field, _ in messages.hostile(wire.GenerateRequest, random.Random(seed)).ListFields()
    }
    assert seen == {field.name for field in wire.GenerateRequest.DESCRIPTOR.fields}
    methods = {path for path, _, _ in messages.methods(services())}
    assert methods >= {"/dspark.v1.GenerationService/Generate", "/dspark.v1.SchedulerService/UpdatePolicy"}
