"""MLServer's runtime of the encoder, for its adaptive batching; `model-settings.json` names it."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from model import Model


class Encoder(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        texts = StringCodec.decode_input(payload.inputs[0])
        scores = np.array(self.model.answer(texts), np.float32)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("outputs", scores)])
