"""The Python subjects of penstock-bench-prepare: python peers.py FOLDER, then a line of JSON for each thing to do.

{"case", "subject", "count"} is answered with {"cpu_ms"}, CPU time of this process for an image; {"case", "subject", "tensor"}
writes the tensor to that file. What cannot be done is {"error"}. The images are made once, by whoever has scikit-learn.
"""

import io
import json
import pathlib
import sys
import time

import numpy

FOLDER = pathlib.Path(sys.argv[1])
MEAN = numpy.float32([0.485, 0.456, 0.406])
STD = numpy.float32([0.229, 0.224, 0.225])
# A pixel's value in each channel to its half: the fastest way to normalise bytes in numpy.
TABLE = ((numpy.arange(256, dtype=numpy.float32)[:, None] / 255 - MEAN) / STD).astype(numpy.float16)


def make_images():
    """1920 x 1080 of the two photographs of scikit-learn, side by side and cut."""
    import sklearn
    from PIL import Image

    photos = pathlib.Path(sklearn.__file__).parent / "datasets/images"
    tiles = [Image.open(photos / name).convert("RGB") for name in ["china.jpg", "flower.jpg"]]
    image = Image.new("RGB", (1920, 1080))
    for row in range(3):
        for column in range(3):
            image.paste(tiles[(row + column) % 2], (column * 640, row * 427))
    image.save(FOLDER / "1080p.jpg", quality=90)
    (FOLDER / "1080p.rgb").write_bytes(image.tobytes())


def normalised(pixels):
    """torchvision's to_tensor and normalize, in numpy, and half precision."""
    pixels = (numpy.asarray(pixels, dtype=numpy.float32) / 255 - MEAN) / STD
    return numpy.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(numpy.float16)


def by_table(pixels):
    out = numpy.empty((3, *pixels.shape[:2]), numpy.float16)
    for channel in range(3):
        numpy.take(TABLE[:, channel], pixels[:, :, channel], out=out[channel])
    return out


def subjects(case):
    """By name, a function that makes a tensor."""
    found = {}
    data = (FOLDER / "1080p.jpg").read_bytes()
    flat = numpy.frombuffer((FOLDER / "1080p.rgb").read_bytes(), numpy.uint8)
    pixels = flat.reshape(1080, 1920, 3)
    small = flat[: 224 * 224 * 3].reshape(224, 224, 3)
    try:
        import cv2
        import simplejpeg
        from PIL import Image

        cv2.setNumThreads(1)
    except ImportError:
        return {"dali-cpu": dali(data)} if case == "jpeg-1080p" else {}
    bilinear = Image.Resampling.BILINEAR

    def cut(image):
        image = image.resize((455, 256), bilinear)
        return normalised(image.crop((116, 16, 340, 240)))

    def pillow():
        return cut(Image.open(io.BytesIO(data)).convert("RGB"))

    def pillow_draft():
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (455, 256))
        return cut(image)

    def best_python():
        decoded = simplejpeg.decode_jpeg(data, "RGB", min_height=256, min_width=455, min_factor=1)
        resized = cv2.resize(decoded, (455, 256), interpolation=cv2.INTER_AREA)
        return by_table(resized[16:240, 116:340])

    def opencv():
        decoded = cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_COLOR)
        resized = cv2.resize(decoded, (455, 256), interpolation=cv2.INTER_AREA)
        return normalised(resized[16:240, 116:340, ::-1])

    if case == "jpeg-1080p":
        found = {"pillow": pillow, "pillow-draft": pillow_draft, "best-python": best_python, "opencv": opencv}
    elif case == "resize":
        image = Image.fromarray(pixels)
        found["pillow"] = lambda: numpy.asarray(image.resize((224, 224), bilinear))
        found["opencv"] = lambda: cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_AREA)
    elif case == "normalise":
        found = {"numpy-224": lambda: normalised(small), "numpy-1080p": lambda: normalised(pixels)}
    return found


def dali(data):
    """NVIDIA's own, without a GPU: batches of eight, one thread; a call of it is an eighth of a batch."""
    from nvidia.dali import fn, pipeline_def, types

    batch = 8
    array = numpy.frombuffer(data, numpy.uint8)

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False)
    def pipeline():
        encoded = fn.external_source(lambda: [array] * batch)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        image = fn.resize(image, resize_shorter=256, interp_type=types.INTERP_TRIANGULAR, antialias=True)
        return fn.crop_mirror_normalize(
            image,
            crop=(224, 224),
            dtype=types.FLOAT16,
            output_layout="CHW",
            mean=(MEAN * 255).tolist(),
            std=(STD * 255).tolist(),
        )

    built = pipeline()
    built.build()

    def run():
        return built.run()[0]

    run.images = batch
    return run


def main():
    if not (FOLDER / "1080p.jpg").exists():
        make_images()
    print("ready", flush=True)
    made = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            case = asked["case"]
            if case not in made:
                made[case] = subjects(case)
            run = made[case][asked["subject"]]
            if "tensor" in asked:
                pathlib.Path(asked["tensor"]).write_bytes(run().tobytes())
                answer = {}
            else:
                images = getattr(run, "images", 1)
                calls = max(1, asked["count"] // images)
                began = time.process_time()
                for _ in range(calls):
                    run()
                answer = {"cpu_ms": (time.process_time() - began) * 1e3 / (calls * images)}
        except Exception as error:  # whatever a library may raise is a row of the report
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
