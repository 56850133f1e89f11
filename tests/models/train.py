#!/usr/bin/env python3
"""Trains the two digit classifiers of the demo and writes everything that the repository commits:

    repository/digits/1/model.onnx   logistic regression on under half of the training images: the weaker
    repository/digits/2/model.onnx   a multilayer perceptron on all of them, each also shifted half a pixel: the better
    digits-test.bin                  the held-out images and labels: u32 count (little-endian), count x 64 bytes
                                     of pixels 0..16 row by row, count bytes of labels 0..9
    digits.json                      seed, sizes, measured accuracy; the tests hold the server to these numbers

The images are the UCI test images of handwritten digits that scikit-learn ships, so nothing is downloaded.
Both models take `image` FP32 [-1, 64], pixels 0..16 as they are, and give `logits` FP32 [-1, 10]. The scaling
is folded into the first layer.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python train.py
"""

import json
import pathlib
import struct

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

SEED = 2102
TEST_SHARE = 1 / 3
WEAK_SHARE = 0.45
SCALE = 1 / 16
HERE = pathlib.Path(__file__).resolve().parent


def network(layers, description):
    """An ONNX model of dense layers [(weights [in, out], bias [out])] with ReLU between them."""
    nodes, constants, value = [], [], "image"
    for i, (weights, bias) in enumerate(layers):
        last = i == len(layers) - 1
        constants.append(numpy_helper.from_array(weights.astype(np.float32), f"weights{i}"))
        constants.append(numpy_helper.from_array(bias.astype(np.float32), f"bias{i}"))
        out = "logits" if last else f"dense{i}"
        nodes.append(helper.make_node("Gemm", [value, f"weights{i}", f"bias{i}"], [out], name=f"gemm{i}"))
        value = out
        if not last:
            value = f"relu{i}"
            nodes.append(helper.make_node("Relu", [out], [value], name=value))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], producer_name="penstock")
    model.ir_version = 8
    model.doc_string = description
    onnx.checker.check_model(model)
    return model


def with_shifts(images, labels):
    """Each image, and the same moved half a pixel up, down, left and right."""
    squares = images.reshape(-1, 8, 8)
    padded = np.pad(squares, ((0, 0), (1, 1), (1, 1)))
    moved = [padded[:, y : y + 8, x : x + 8] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
    every = [squares] + [(squares + neighbour) / 2 for neighbour in moved]
    return np.concatenate(every).reshape(-1, 64), np.tile(labels, len(every))


def accuracy(path, images, labels):
    """What the exported file says, not what the trainer believes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.astype(np.float32)})
    return int((logits.argmax(axis=1) == labels).sum())


def main():
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=TEST_SHARE, random_state=SEED, stratify=labels
    )
    weak_x, _, weak_y, _ = train_test_split(
        train_x, train_y, train_size=WEAK_SHARE, random_state=SEED, stratify=train_y
    )

    weak = LogisticRegression(C=1.0, max_iter=1000).fit(weak_x * SCALE, weak_y)
    # Width, penalty and shifts were chosen by cross-validation on the training part alone.
    shifted_x, shifted_y = with_shifts(train_x, train_y)
    better = MLPClassifier((160,), alpha=0.1, max_iter=500, random_state=SEED).fit(shifted_x * SCALE, shifted_y)

    versions = {
        1: network([(weak.coef_.T * SCALE, weak.intercept_)], "logistic regression"),
        2: network(
            [(better.coefs_[0] * SCALE, better.intercepts_[0]), (better.coefs_[1], better.intercepts_[1])],
            "multilayer perceptron 64-160-10",
        ),
    }
    card = {
        "seed": SEED,
        "train_images": {"1": len(weak_y), "2": len(train_y)},
        "test_images": len(test_y),
        "correct": {},
        "accuracy": {},
    }
    for version, model in versions.items():
        path = HERE / "repository" / "digits" / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        correct = accuracy(path, test_x, test_y)
        card["correct"][str(version)] = correct
        card["accuracy"][str(version)] = round(correct / len(test_y), 4)

    pixels = test_x.astype(np.uint8)
    assert (pixels == test_x).all() and pixels.max() <= 16
    (HERE / "digits-test.bin").write_bytes(
        struct.pack("<I", len(test_y)) + pixels.tobytes() + test_y.astype(np.uint8).tobytes()
    )
    (HERE / "digits.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
