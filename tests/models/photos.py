#!/usr/bin/env python3
"""Makes the photographs of the demo and the model that tells them apart, and writes everything that the repository commits:

    photos/NAME-1.jpg .. -4.jpg       views of ten photographs that may be redistributed (photos/README.md has the licences)
    photos/photos.json                seed, sizes, measured accuracy, what the model says of each committed view
    repository/photos/1/model.onnx    the classifier

The photographs are those that scikit-image ships in its wheel. A view is a part of one, seen at some size, a little darker or
lighter, sometimes mirrored, saved as JPEG of some quality. The model does not know what a cat is: it is a linear classifier on
the mean and the roughness of 14 x 14 patches, and says which of the ten photographs a view is of. So its answer can be computed and checked, and
it comes out wrong if the tensor is moved, mirrored channel by channel, normalised otherwise or somebody else's.

It takes `pixels` FP16 [-1, 3, 224, 224], what the preset `imagenet` makes, and gives `logits` FP32 [-1, 10]. Views of training and
views of the test are drawn from different seeds, and overlap as views of one photograph do.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python photos.py
"""

import io
import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import skimage
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageEnhance
from sklearn.linear_model import LogisticRegression

SEED = 5
# The class, and the file in skimage/data.
PHOTOS = {
    "astronaut": "astronaut.png",
    "bricks": "brick.png",
    "cameraman": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
TRAIN = 80  # views of each
TEST = 40
COMMITTED = 4
PATCH = 16
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
HERE = pathlib.Path(__file__).resolve().parent


def view(photo, random):
    """A part of it as a JPEG: 60 to 100 % of each side, at 70 to 130 % of its size but no smaller than 288 pixels."""
    share = random.uniform(0.6, 1.0, 2)
    width, height = int(photo.width * share[0]), int(photo.height * share[1])
    left, top = random.integers(0, photo.width - width + 1), random.integers(0, photo.height - height + 1)
    part = photo.crop((left, top, left + width, top + height))
    scale = max(random.uniform(0.7, 1.3) * min(1, 640 / max(part.size)), 288 / min(part.size))
    part = part.resize((round(part.width * scale), round(part.height * scale)), Image.Resampling.LANCZOS)
    part = ImageEnhance.Brightness(part).enhance(random.uniform(0.85, 1.15))
    if random.random() < 0.3:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    part.save(file, "JPEG", quality=int(random.integers(55, 93)), progressive=bool(random.random() < 0.2))
    return file.getvalue()


def tensor(jpeg):
    """What torchvision's usual transform makes of it, which is the preset `imagenet`."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = (256, 256 * height // width) if width == short else (256 * width // height, 256)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1).astype(np.float16)


def features(jpegs):
    """Of each patch and channel the mean and the standard deviation, as the network computes them."""
    side = 224 // PATCH
    tensors = (tensor(jpeg).astype(np.float32).reshape(3, side, PATCH, side, PATCH) for jpeg in jpegs)
    return np.stack([np.concatenate([each.mean(axis=(2, 4)), each.std(axis=(2, 4))]).reshape(-1) for each in tensors])


def network(weights, bias):
    nodes = [
        helper.make_node("Cast", ["pixels"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["wide"], ["means"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        helper.make_node("Mul", ["wide", "wide"], ["squares"]),
        helper.make_node("AveragePool", ["squares"], ["powers"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2),
        helper.make_node("Mul", ["means", "means"], ["squared"]),
        helper.make_node("Sub", ["powers", "squared"], ["difference"]),
        # Rounding can make of an even patch less than nothing.
        helper.make_node("Relu", ["difference"], ["variances"]),
        helper.make_node("Sqrt", ["variances"], ["deviations"]),
        helper.make_node("Concat", ["means", "deviations"], ["patches"], axis=1),
        helper.make_node("Flatten", ["patches"], ["features"]),
        helper.make_node("Gemm", ["features", "weights", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "photos",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT16, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(PHOTOS)])],
        [
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
            numpy_helper.from_array(bias.astype(np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], producer_name="penstock")
    model.ir_version = 8
    model.doc_string = "which of ten photographs; linear, on the mean and the deviation of patches"
    onnx.checker.check_model(model)
    return model


def main():
    data = pathlib.Path(skimage.__file__).parent / "data"
    photos = [Image.open(data / file).convert("RGB") for file in PHOTOS.values()]
    random = np.random.default_rng(SEED)
    train = [(view(photo, random), label) for label, photo in enumerate(photos) for _ in range(TRAIN)]
    random = np.random.default_rng(SEED + 1)
    test = [(view(photo, random), label) for label, photo in enumerate(photos) for _ in range(TEST)]
    labels = np.array([label for _, label in train])
    trained = LogisticRegression(C=0.01, max_iter=2000).fit(features([jpeg for jpeg, _ in train]), labels)

    path = HERE / "repository/photos/1/model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(network(trained.coef_.T, trained.intercept_), path)
    # What the exported file says, not what the trainer believes.
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    said = [int(session.run(["logits"], {"pixels": tensor(jpeg)[None]})[0].argmax()) for jpeg, _ in test]
    correct = sum(one == label for one, (_, label) in zip(said, test))

    names = list(PHOTOS)
    card = {
        "seed": SEED,
        "classes": names,
        "train_views": len(train),
        "test_views": len(test),
        "correct": correct,
        "accuracy": round(correct / len(test), 4),
        "views": {},
    }
    # The first test views of each, as they come: those that the model gets wrong are not exchanged for others.
    folder = HERE / "photos"
    folder.mkdir(exist_ok=True)
    for label, name in enumerate(names):
        for number in range(COMMITTED):
            at = label * TEST + number
            file = f"{name}-{number + 1}.jpg"
            (folder / file).write_bytes(test[at][0])
            card["views"][file] = {"class": label, "said": said[at]}
    (folder / "photos.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps({key: card[key] for key in card if key != "views"}))
    print({file: view for file, view in card["views"].items() if view["class"] != view["said"]})


if __name__ == "__main__":
    main()
