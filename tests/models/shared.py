"""Makes shared/pixels/1/model.onnx: FP32 [-1, 3, 64, 64] and its negative. Its rows are large enough for shared memory, and
its answer shows every bit of what it was given. One node, so it is written without the package onnx: field by field, by the
numbers of onnx.proto.
"""

from pathlib import Path


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def number(field, value):
    return varint(field << 3) + varint(value)


def text(field, value):
    value = value if isinstance(value, bytes) else value.encode()
    return varint(field << 3 | 2) + varint(len(value)) + value


def tensor(name):
    dims = [text(1, text(2, "rows"))] + [text(1, number(1, size)) for size in (3, 64, 64)]
    fp32 = 1
    return text(1, name) + text(2, text(1, number(1, fp32) + text(2, b"".join(dims))))


node = text(1, "pixels") + text(2, "negative") + text(4, "Neg")
graph = text(1, node) + text(2, "pixels") + text(11, tensor("pixels")) + text(12, tensor("negative"))
model = number(1, 8) + text(7, graph) + text(8, text(1, "") + number(2, 13))
place = Path(__file__).parent / "shared/pixels/1"
place.mkdir(parents=True, exist_ok=True)
(place / "model.onnx").write_bytes(model)
