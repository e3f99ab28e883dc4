"""Ray Serve with its batching. `python ray_server.py PORT`."""

from __future__ import annotations

import signal
import sys

import ray
from model import BATCH, BATCH_WAIT_S, Model
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Encoder:
    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)  # type: ignore[untyped-decorator]
    async def run(self, texts: list[str]) -> list[list[float]]:
        scores: list[list[float]] = self.model.answer(texts)
        return scores

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        return {"outputs": await self.run((await request.body()).decode())}


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Encoder.bind(), route_prefix="/infer")  # type: ignore[attr-defined]
signal.pause()
