#!/usr/bin/env python3
"""Writes `exact/rowsum/{1,2}/model.onnx`, the model with which the tests compare answers bit by bit.

The digits are no good for that: the last bits of a matrix product depend on how many rows are multiplied at once. Here
everything is computed row by row, and exactly. In, of each row: `values` FP32 [16], whole numbers; `factor` INT32 [1];
`flag` BOOL [4]. Out: `total` INT32 [1], the sum of the values times the factor; `scaled` FP32 [16], the values times two,
in version 2 times four; `flag_back` BOOL [4], from the last to the first; `half` FP16 [4], of the flags.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python exact.py
"""

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = pathlib.Path(__file__).resolve().parent

def model(times):
    constants = {
        "times": np.array(times, np.float32),
        "rows": np.array([1], np.int64),
        "order": np.array([3, 2, 1, 0], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["values"], ["whole"], to=TensorProto.INT32),
        helper.make_node("ReduceSum", ["whole", "rows"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "factor"], ["total"]),
        helper.make_node("Mul", ["values", "times"], ["scaled"]),
        helper.make_node("Gather", ["flag", "order"], ["flag_back"], axis=1),
        helper.make_node("Cast", ["flag"], ["half"], to=TensorProto.FLOAT16),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("values", TensorProto.FLOAT, ["rows", 16]), value("factor", TensorProto.INT32, ["rows", 1])]
    outputs = [value("total", TensorProto.INT32, ["rows", 1]), value("scaled", TensorProto.FLOAT, ["rows", 16])]
    inputs += [value("flag", TensorProto.BOOL, ["rows", 4])]
    outputs += [value("flag_back", TensorProto.BOOL, ["rows", 4]), value("half", TensorProto.FLOAT16, ["rows", 4])]
    initializers = [numpy_helper.from_array(constant, name) for name, constant in constants.items()]
    graph = helper.make_graph(nodes, "exact sums of rows", inputs, outputs, initializers)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(whole)
    return whole


for version, times in {"1": 2, "2": 4}.items():
    folder = HERE / "exact/rowsum" / version
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model(times), folder / "model.onnx")
