"""`rowsum` as a custom handler of TorchServe: it is handed up to `batch_size` requests at once, and answers with as many.

A request's body is JSON, `{"values": [...], "factor": 1, "label": "a"}`: one row. Or it is a request of the Open
Inference Protocol, of any number of rows, which TorchServe hands over from `/v2/models/MODEL/infer` as it came: what of
the protocol there is, is the handler's. (TorchServe's own envelope for it, `kservev2`, makes every output flat, and so
takes no batches.)
"""

import json

import numpy as np

from rowsum import Rowsum, as_bytes


class Handler:
    def __init__(self):
        self.model = None

    def initialize(self, context):
        with open("rowsum.json", encoding="utf-8") as file:
            self.model = Rowsum(json.load(file))

    def handle(self, data, context):
        rows = [read(part.get("body") or part.get("data")) for part in data]
        if any("inputs" in row for row in rows):
            return [self.infer(row, context) for row in rows]
        values = np.array([row["values"] for row in rows], np.float32)
        factor = np.array([[row.get("factor", 1)] for row in rows], np.int64)
        label = np.array([[as_bytes(row.get("label", ""))] for row in rows], np.object_)
        outputs = self.model.run(values, factor, label)
        columns = (outputs["total"][:, 0], outputs["scaled"], outputs["note"][:, 0])
        return [
            {"total": int(total), "scaled": scaled.tolist(), "note": note.decode()}
            for total, scaled, note in zip(*columns)
        ]

    def infer(self, request, context):
        inputs = {part["name"]: array(part) for part in request["inputs"]}
        wanted = [output["name"] for output in request.get("outputs", [])] or ["total", "scaled", "note"]
        outputs = self.model.run(inputs["values"], inputs.get("factor"), inputs.get("label"), wanted)
        answer = {"model_name": context.manifest["model"]["modelName"], "model_version": "1.0"}
        if "id" in request:
            answer["id"] = request["id"]
        return {**answer, "outputs": [tensor(name, output) for name, output in outputs.items()]}


KINDS = {"FP32": np.float32, "INT64": np.int64, "BYTES": np.object_}


def array(part):
    return np.array(part["data"], KINDS[part["datatype"]]).reshape(part["shape"])


def tensor(name, output):
    datatype = next(datatype for datatype, kind in KINDS.items() if output.dtype == kind)
    data = [text.decode() if isinstance(text, bytes) else text for text in output.reshape(-1).tolist()]
    return {"name": name, "datatype": datatype, "shape": list(output.shape), "data": data}


def read(body):
    return body if isinstance(body, dict) else json.loads(body)
