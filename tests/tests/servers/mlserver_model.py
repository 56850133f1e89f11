"""`rowsum` and `kinds` as custom runtimes of MLServer, which batch by themselves if their settings say so."""

import asyncio

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceResponse
import numpy as np

from kinds import Kinds
from rowsum import Rowsum


class RowsumRuntime(MLModel):
    async def load(self):
        self.model = Rowsum(self.settings.parameters.extra or {})
        # One execution at a time, as on one GPU; the server must go on reading meanwhile.
        self.device = asyncio.Lock()
        return True

    async def predict(self, payload):
        inputs = {part.name: part for part in payload.inputs}
        values = NumpyCodec.decode_input(inputs["values"]).astype(np.float32)
        factor = NumpyCodec.decode_input(inputs["factor"]) if "factor" in inputs else None
        label = np.array(StringCodec.decode_input(inputs["label"]), np.object_) if "label" in inputs else None
        wanted = [output.name for output in payload.outputs or []] or ["total", "scaled", "note"]
        async with self.device:
            outputs = await asyncio.to_thread(self.model.run, values, factor, label, wanted)
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[encode(name, output) for name, output in outputs.items()],
        )


class KindsRuntime(MLModel):
    async def load(self):
        self.model = Kinds(self.settings.parameters.extra or {}, self.version)
        self.device = asyncio.Lock()
        return True

    async def predict(self, payload):
        inputs = {part.name: decode(part) for part in payload.inputs}
        add = getattr(payload.parameters, "add", 0) if payload.parameters else 0
        wanted = [output.name for output in payload.outputs or []]
        async with self.device:
            outputs = await asyncio.to_thread(self.model.run, inputs, add, wanted)
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[encode(name, output) for name, output in outputs.items()],
        )


def decode(part):
    if part.datatype != "BYTES":
        return NumpyCodec.decode_input(part)
    return np.array(StringCodec.decode_input(part), np.object_).reshape(part.shape)


def encode(name, output):
    if output.dtype != np.object_:
        return NumpyCodec.encode_output(name, output)
    texts = [text if isinstance(text, str) else text.decode() for text in output.reshape(-1)]
    encoded = StringCodec.encode_output(name, texts)
    encoded.shape = list(output.shape)
    return encoded
