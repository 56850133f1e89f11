"""`rowsum` as a custom handler of TorchServe: it is handed up to `batch_size` requests at once, and answers with as many.

A request's body is JSON, `{"values": [...], "factor": 1, "label": "a"}`: one row.
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
        values = np.array([row["values"] for row in rows], np.float32)
        factor = np.array([[row.get("factor", 1)] for row in rows], np.int64)
        label = np.array([[as_bytes(row.get("label", ""))] for row in rows], np.object_)
        outputs = self.model.run(values, factor, label)
        columns = (outputs["total"][:, 0], outputs["scaled"], outputs["note"][:, 0])
        return [
            {"total": int(total), "scaled": scaled.tolist(), "note": note.decode()}
            for total, scaled, note in zip(*columns)
        ]


def read(body):
    return body if isinstance(body, dict) else json.loads(body)
