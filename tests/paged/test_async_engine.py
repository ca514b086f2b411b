"""The engine in its thread: streams, cancellation, endings."""

import asyncio

import pytest

from paged import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError, SamplingParams
from paged.async_engine import AsyncEngine
from paged.config import EngineConfig
from tests.paged.tiny import SMALL, write_config

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture
def engine(tmp_path):
    options = SMALL | {
        "model": write_config(tmp_path),
        "load_format": "dummy",
        "num_gpu_blocks_override": 80,
        "max_num_queued_requests": 6,
    }
    engine = AsyncEngine(EngineConfig.from_kwargs(**options))
    yield engine
    engine.shutdown()


async def collect(engine, prompt, params, request_id) -> list[int]:
    return [t async for deltas in engine.generate(prompt, params, request_id) for d in deltas for t in d.token_ids]


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_everything(engine):
    """One engine for all of it: compiling is what takes the time."""

    async def scenario() -> None:
        await streams(engine)
        await cancellation(engine)
        await refusals(engine)
        await failure(engine)
        await endings(engine)

    asyncio.run(scenario())


async def streams(engine) -> None:
    alone = await collect(engine, [1, 2, 3], LONG, "alone")
    together = await asyncio.gather(*(collect(engine, [1, 2, 3], LONG, f"r{i}") for i in range(5)))
    assert together == [alone] * 5 and len(alone) == 100
    n = SamplingParams(n=2, seed=3, max_tokens=10, ignore_eos=True)
    deltas = [d async for item in engine.generate([5] * 20, n, "n") for d in item]
    assert {d.index for d in deltas if d.finish_reason == "length"} == {0, 1}

    lagging = engine.generate([1, 2, 3], LONG, "lagging")  # what the reader misses is merged, not lost
    items = [await anext(lagging)]
    await until(lambda: engine.health().num_running == 0)
    items += [item async for item in lagging]
    assert len(items) < 50 and [t for item in items for d in item for t in d.token_ids] == alone


async def cancellation(engine) -> None:
    stream = engine.generate([1, 2, 3], LONG, "closed")
    await anext(stream)
    await stream.aclose()
    task = asyncio.create_task(collect(engine, [4, 5], LONG, "cancelled"))
    await until(lambda: engine.health().num_running > 0)
    task.cancel()
    await until(lambda: engine.health().num_running == 0)
    assert engine._engine.scheduler.usage == 0
    assert len(await collect(engine, [4, 5], LONG, "closed")) == 100  # the id is free again


async def refusals(engine) -> None:
    with pytest.raises(InvalidRequestError):
        await collect(engine, [], LONG, "empty")
    results = await asyncio.gather(*(collect(engine, [7], LONG, f"q{i}") for i in range(40)), return_exceptions=True)
    refused = [r for r in results if isinstance(r, QueueFullError)]
    assert refused and all(len(r) == 100 for r in results if r not in refused)


async def failure(engine) -> None:
    runner, execute = engine._engine.runner, engine._engine.runner.execute

    def fail(plan):
        runner.execute = execute
        raise RuntimeError("out of memory")

    runner.execute = fail
    with pytest.raises(RequestFailedError, match="out of memory"):
        await collect(engine, [1, 2], LONG, "unlucky")
    assert len(await collect(engine, [1, 2], LONG, "lucky")) == 100
    health = engine.health()
    assert health.alive and health.error is None and health.num_running == 0


async def endings(engine) -> None:
    running = asyncio.create_task(collect(engine, [1, 2, 3], LONG, "last"))
    await until(lambda: engine.health().num_running > 0)
    assert await engine.drain(timeout=60)
    assert len(await running) == 100
    with pytest.raises(EngineStoppedError):
        await collect(engine, [1], LONG, "late")
    await until(lambda: engine.health().last_step_age == 0)
    await asyncio.to_thread(engine.shutdown)
    assert not engine.health().alive
