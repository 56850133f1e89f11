"""One kind of client of penstock-bench-prepare's case end-to-end-jpeg, in several processes:

    python clients.py KIND FOLDER ADDRESS HOST PROCESSES

KIND is `jpeg` (sends the JPEG as it is), `pillow` (Pillow's usual transform, then a binary tensor) or `json` (the same, then the
numbers in JSON). All use tritonclient, one request at a time in each process, and ask for the sum of the tensor alone. For each line
on standard input, a number of seconds, all processes ask for so long; the answer is a line of JSON: {"requests", "rps", "cpu_s",
"p50_ms", "p99_ms", "means"}, where `cpu_s` is CPU time of these processes and `means` the mean element of each photograph's tensors as
the model saw them.
"""

import io
import json
import multiprocessing
import pathlib
import struct
import sys
import time

import numpy
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

MEAN = numpy.float32([0.485, 0.456, 0.406])
STD = numpy.float32([0.229, 0.224, 0.225])
ELEMENTS = 3 * 224 * 224
# Different photographs of one file: its columns moved, so that decoding and compressing cost the same.
VARIANTS = 8
# A comment behind the first marker gives every request bytes of its own: the sidecar prepares equal ones in flight only once.
COMMENT = struct.Struct(">2sHQ")


def photographs(folder):
    image = numpy.asarray(Image.open(folder / "1080p.jpg").convert("RGB"))
    for variant in range(VARIANTS):
        file = io.BytesIO()
        moved = numpy.roll(image, variant * image.shape[1] // VARIANTS, axis=1)
        Image.fromarray(moved).save(file, "JPEG", quality=90)
        yield file.getvalue()


def transformed(jpeg):
    """torchvision's for ImageNet, as clients write it: shortest side 256, the middle, numbers."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((455, 256), Image.Resampling.BILINEAR)
    pixels = numpy.asarray(image.crop((116, 16, 340, 240)), dtype=numpy.float32)
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)[None]


def as_jpeg(jpeg):
    tensor = InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(numpy.array([jpeg], dtype=object))
    return "pixels", tensor


def as_binary(jpeg):
    tensor = InferInput("pixels", [1, 3, 224, 224], "FP16")
    tensor.set_data_from_numpy(numpy.ascontiguousarray(transformed(jpeg), dtype=numpy.float16))
    return "pixels", tensor


def as_json(jpeg):
    # Triton reads no halves from JSON, so this model takes singles.
    tensor = InferInput("pixels", [1, 3, 224, 224], "FP32")
    tensor.set_data_from_numpy(numpy.ascontiguousarray(transformed(jpeg)), binary_data=False)
    return "pixels32", tensor


KINDS = {"jpeg": as_jpeg, "pillow": as_binary, "json": as_json}


def work(number, kind, photos, address, host, pipe):
    client = InferenceServerClient(address, connection_timeout=30, network_timeout=30)
    headers = {"host": host} if host else None
    outputs = [InferRequestedOutput("sum")]
    sent = 0
    while (seconds := pipe.recv()) is not None:
        sums, took, cpu = numpy.zeros((2, len(photos))), [], time.process_time()
        began = now = time.monotonic()
        try:
            while now - began < seconds:
                at = (sent + number) % len(photos)
                photo = photos[at]
                comment = COMMENT.pack(b"\xff\xfe", COMMENT.size - 2, number << 32 | sent)
                model, tensor = KINDS[kind](photo[:2] + comment + photo[2:])
                answer = client.infer(model, [tensor], outputs=outputs, headers=headers)
                sums[:, at] += float(answer.as_numpy("sum")[0, 0]), 1
                sent += 1
                before, now = now, time.monotonic()
                took.append(now - before)
        except Exception as error:  # whatever a library may raise is a row of the report
            pipe.send({"error": f"{type(error).__name__}: {error}"})
            continue
        pipe.send({"took": took, "seconds": now - began, "cpu_s": time.process_time() - cpu, "sums": sums})


def main(kind, folder, address, host, processes):
    photos = list(photographs(pathlib.Path(folder)))
    pipes = []
    for number in range(int(processes)):
        ours, theirs = multiprocessing.Pipe()
        arguments = (number, kind, photos, address, host, theirs)
        multiprocessing.Process(target=work, args=arguments, daemon=True).start()
        pipes.append(ours)
    print("ready", flush=True)
    for line in sys.stdin:
        for pipe in pipes:
            pipe.send(float(line))
        told = [pipe.recv() for pipe in pipes]
        failed = next((one for one in told if "error" in one), None)
        if failed:
            print(json.dumps(failed), flush=True)
            continue
        took = numpy.array([each for one in told for each in one["took"]]) * 1e3
        answer = {
            "requests": len(took),
            # Each process has a rate of its own, since each ends with its last answer.
            "rps": sum(len(one["took"]) / one["seconds"] for one in told),
            "cpu_s": sum(one["cpu_s"] for one in told),
            "p50_ms": float(numpy.percentile(took, 50)),
            "p99_ms": float(numpy.percentile(took, 99)),
            "means": [total / count / ELEMENTS if count else None for total, count in sum(one["sums"] for one in told).T],
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
