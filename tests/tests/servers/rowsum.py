"""The model that all servers serve: exact arithmetic on rows, after a pause that stands for a GPU's work.

In, of each row: `values` FP32 [width]; `factor` INT64 [1] and `label` BYTES [1], which may be left out (1 and empty).
Out, of each row: `total` INT64 [1], the sum of the values as whole numbers, times the factor; `scaled` FP32 [width],
the values times two; `note` BYTES [1], `label:total`. All of it is exact, so that a row's result is the same bits in
every batch.

SIMULATED: an execution takes `fixed_us + row_us * rows` microseconds, slept. A row with the poison value fails the whole
execution, as models do that raise.
"""

import time

import numpy as np


class Poisoned(Exception):
    """A row had the poison value; the message names the rows, counted in the batch as it was executed."""


class Rowsum:
    """The model with its parameters, which are text, as servers hand them over."""

    def __init__(self, parameters):
        self.fixed = float(parameters.get("fixed_us", 0)) / 1e6
        self.row = float(parameters.get("row_us", 0)) / 1e6
        poison = parameters.get("poison", "")
        self.poison = np.float32(poison) if poison != "" else None
        self.executions = 0

    def run(self, values, factor=None, label=None, wanted=("total", "scaled", "note")):
        """One execution; returns the wanted outputs by their names."""
        began = time.monotonic()
        self.executions += 1
        rows = values.shape[0]
        if self.poison is not None:
            guilty = np.flatnonzero((values == self.poison).any(axis=tuple(range(1, values.ndim))))
            if guilty.size:
                raise Poisoned(f"rows {guilty.tolist()} of {rows} hold the poison value {self.poison}")
        outputs = {}
        if "total" in wanted or "note" in wanted:
            total = values.reshape(rows, -1).astype(np.int64).sum(axis=1, keepdims=True)
            outputs["total"] = total if factor is None else total * factor.reshape(rows, 1)
        if "note" in wanted:
            labels = [b""] * rows if label is None else label.reshape(rows).tolist()
            notes = [as_bytes(text) + b":%d" % total for text, total in zip(labels, outputs["total"][:, 0])]
            outputs["note"] = np.array(notes, dtype=np.object_).reshape(rows, 1)
        if "scaled" in wanted:
            outputs["scaled"] = values * np.float32(2)
        left = self.fixed + self.row * rows - (time.monotonic() - began)
        if left > 0:
            time.sleep(left)
        return {name: outputs[name] for name in wanted}


def as_bytes(text):
    """A BYTES element, which some servers hand over as text."""
    return text if isinstance(text, bytes) else str(text).encode()
