"""`kinds` for Triton's Python backend; every request is an execution of its own, since its model does not batch."""

import json
import os
import sys

# The backend's interpreter is isolated: it does not look at PYTHONPATH by itself.
sys.path[:0] = os.environ["PYTHONPATH"].split(":")

import triton_python_backend_utils as pb_utils

from kinds import Kinds


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self.model = Kinds(parameters, args["model_version"])

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        add = json.loads(request.parameters() or "{}").get("add", 0)
        # Triton names all outputs where the client names none; those whose input is missing are not answered.
        outputs = self.model.run(inputs, add, request.requested_output_names())
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, output) for name, output in outputs.items()])
