"""`photos` for Triton's Python backend: the ONNX model beside it, run by onnxruntime, on all that Triton hands over at once."""

import os
import pathlib
import sys

# The backend's interpreter is isolated: it does not look at PYTHONPATH by itself.
sys.path[:0] = os.environ["PYTHONPATH"].split(":")

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        # It shares its cores with everything else in the test.
        options.intra_op_num_threads = 1
        file = pathlib.Path(__file__).with_name("model.onnx")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        parts = [pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        (logits,) = self.session.run(["logits"], {"pixels": np.concatenate(parts)})
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", one)]) for one in np.split(logits, ends)]
