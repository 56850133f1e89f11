"""The model that shows every datatype: it turns each row of each input around, and adds up what is whole.

In, of each row, any of (at least one): `half` FP16, `single` FP32, `double` FP64, `long` INT64, `short` INT16, `byte`
UINT8, `flag` BOOL, `text` BYTES, each [width] with a width of its own. Out, of each row: `NAME_back` for each input that
was given, its elements from the last to the first; `byte_half` FP16, as wide as `byte`: its elements as they are; `sum`
INT64 [1]: the elements of `long`, `short`, `byte` and `flag`,
the lengths of `text`, the request's parameter `add`, and 1,000,003 times the version. No element is computed with that
is not whole, so that a row's result is the same bits in every batch.

SIMULATED: an execution takes `fixed_us + row_us * rows` microseconds, slept.
"""

import time

import numpy as np

from rowsum import as_bytes

INPUTS = ("half", "single", "double", "long", "short", "byte", "flag", "text")
OUTPUTS = ("sum", "byte_half", *(f"{name}_back" for name in INPUTS))
WHOLE = ("long", "short", "byte", "flag")
OF_VERSION = 1_000_003


class Kinds:
    """The model with its parameters, which are text, as servers hand them over."""

    def __init__(self, parameters, version):
        self.fixed = float(parameters.get("fixed_us", 0)) / 1e6
        self.row = float(parameters.get("row_us", 0)) / 1e6
        self.version = int(version)

    def run(self, inputs, add=0, wanted=()):
        """One execution of inputs by their names; returns the wanted outputs by their names, all if none is named."""
        began = time.monotonic()
        # Triton finds that out by itself.
        if strange := [name for name in inputs if name not in INPUTS] + [name for name in wanted if name not in OUTPUTS]:
            raise ValueError(f"there is no {strange[0]}")
        rows = next(iter(inputs.values())).shape[0]
        total = np.full((rows, 1), int(add) + OF_VERSION * self.version, np.int64)
        outputs = {}
        for name, values in inputs.items():
            outputs[f"{name}_back"] = np.ascontiguousarray(values.reshape(rows, -1)[:, ::-1])
            if name == "byte":
                outputs["byte_half"] = values.reshape(rows, -1).astype(np.float16)
            if name in WHOLE:
                total += values.reshape(rows, -1).astype(np.int64).sum(axis=1, keepdims=True)
            elif name == "text":
                total += np.array([[sum(len(as_bytes(text)) for text in row)] for row in values], np.int64)
        outputs["sum"] = total
        left = self.fixed + self.row * rows - (time.monotonic() - began)
        if left > 0:
            time.sleep(left)
        return {name: output for name, output in outputs.items() if not wanted or name in wanted}
