"""`rowsum` for Triton's Python backend: all requests that Triton hands over at once are one execution.

Triton hands over several only with dynamic batching; each of them must then get its own response, in order.
"""

import json
import os
import sys

# The backend's interpreter is isolated: it does not look at PYTHONPATH by itself.
sys.path[:0] = os.environ["PYTHONPATH"].split(":")

import numpy as np
import triton_python_backend_utils as pb_utils

from rowsum import Poisoned, Rowsum


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self.batched = config["max_batch_size"] > 0
        self.model = Rowsum(parameters)

    def execute(self, requests):
        parts = [self.inputs(request) for request in requests]
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        rows = [part["values"].shape[0] for part in parts]
        try:
            outputs = self.model.run(*self.joined(parts, rows), wanted=wanted)
        except Poisoned as error:
            return [pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error))) for _ in requests]
        responses, first = [], 0
        for request, count in zip(requests, rows):
            tensors = []
            for name in request.requested_output_names():
                part = outputs[name][first : first + count]
                tensors.append(pb_utils.Tensor(name, part if self.batched else part[0]))
            responses.append(pb_utils.InferenceResponse(tensors))
            first += count
        return responses

    def inputs(self, request):
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        return tensors if self.batched else {name: tensor[np.newaxis] for name, tensor in tensors.items()}

    def joined(self, parts, rows):
        values = np.concatenate([part["values"] for part in parts]) if len(parts) > 1 else parts[0]["values"]
        optional = []
        for name, absent, kind in (("factor", 1, np.int64), ("label", b"", np.object_)):
            if any(name in part for part in parts):
                each = [part.get(name, np.full((count, 1), absent, kind)) for part, count in zip(parts, rows)]
                optional.append(np.concatenate(each))
            else:
                optional.append(None)
        return values, *optional
