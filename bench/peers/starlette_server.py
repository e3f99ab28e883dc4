"""The bare endpoint: Starlette on uvicorn, each request run in a thread. `python starlette_server.py PORT`."""

from __future__ import annotations

import sys

import uvicorn
from model import Model
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

model = Model()


async def infer(request: Request) -> JSONResponse:
    text = (await request.body()).decode()
    return JSONResponse({"outputs": (await run_in_threadpool(model.answer, [text]))[0]})


uvicorn.run(
    Starlette(routes=[Route("/infer", infer, methods=["POST"])]),
    host="127.0.0.1",
    port=int(sys.argv[1]),
    log_level="warning",
    access_log=False,
)
