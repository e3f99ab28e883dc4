"""LitServe with its batching. `python litserve_server.py PORT`."""

from __future__ import annotations

import sys
from typing import Any

import litserve
from model import BATCH, BATCH_WAIT_S, Model


class Api(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        del device
        self.model = Model()

    def decode_request(self, request: dict[str, str]) -> str:
        return request["text"]

    def predict(self, texts: list[str]) -> list[list[float]]:
        scores: list[list[float]] = self.model.answer(list(texts))
        return scores

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"outputs": output}


if __name__ == "__main__":
    api = Api(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_S, api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
