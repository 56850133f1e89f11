"""`pixels` for Triton's Python backend: gives back the bits that it was given, and the sum of each row."""

import json
import os
import sys
import time

# The backend's interpreter is isolated: it does not look at PYTHONPATH by itself.
sys.path[:0] = os.environ["PYTHONPATH"].split(":")

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.takes = int(parameters.get("fixed_us", {}).get("string_value", 0)) / 1e6

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        pixels = pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy()
        # SIMULATED: what an execution takes.
        time.sleep(self.takes)
        total = pixels.astype(np.float64).sum(axis=(1, 2, 3)).reshape(-1, 1)
        back = pixels.view(np.uint16 if pixels.dtype == np.float16 else np.uint32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("back", back), pb_utils.Tensor("sum", total)])
