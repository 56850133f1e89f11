"""What Pillow, OpenCV and numpy make of images: python images.py FOLDER

Writes inputs, and the tensors that users of these libraries get, into FOLDER, and prints a line of JSON for each:
{"case", "input", "expected", "declaration", "unit"}. `expected` is a file of float32, NCHW; `unit` is what a 255th of a pixel is
worth in it. torchvision's transforms are written out with Pillow and numpy, as torchvision defines them for Pillow's images.
"""

import io
import json
import pathlib
import sys

import cv2
import numpy
import skimage
import sklearn
from PIL import Image, ImageOps

cv2.setNumThreads(1)
FOLDER = pathlib.Path(sys.argv[1])
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
INPUTS = {}


def photos():
    """Real ones, as their packages ship them."""
    sklearn_images = pathlib.Path(sklearn.__file__).parent / "datasets/images"
    skimage_images = pathlib.Path(skimage.__file__).parent / "data"
    yield from sorted(sklearn_images.glob("*.jpg"))
    for name in ["astronaut.png", "chelsea.png", "coffee.png", "camera.png", "rocket.jpg", "retina.jpg"]:
        yield skimage_images / name
    yield from [skimage_images / "hubble_deep_field.jpg", skimage_images / "logo.png"]


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tell(case, data, pixels, declaration, unit=1.0):
    """`pixels` is HWC, or HW."""
    if data not in INPUTS:
        INPUTS[data] = f"{len(INPUTS)}.in"
        (FOLDER / INPUTS[data]).write_bytes(data)
    tell.count += 1
    name = f"{tell.count}.expected"
    pixels = numpy.asarray(pixels, dtype=numpy.float32)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    numpy.ascontiguousarray(pixels.transpose(2, 0, 1)).tofile(FOLDER / name)
    line = {"case": case, "input": INPUTS[data], "expected": name, "declaration": declaration, "unit": unit}
    print(json.dumps(line))


tell.count = 0


def exact(width, height, filter="bilinear", **more):
    resize = {"mode": "exact", "width": width, "height": height, "filter": filter}
    return {"resize": resize, "jpeg-scaling": "off", **more}


def opened(data):
    return Image.open(io.BytesIO(data))


def classify(image, size, filter, mean, std):
    """torchvision: resize(size), center_crop(224), to_tensor, normalize."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    image = image.resize((size, other) if width <= height else (other, size), FILTERS[filter])
    left = int(round((image.width - 224) / 2.0))
    top = int(round((image.height - 224) / 2.0))
    pixels = numpy.asarray(image.crop((left, top, left + 224, top + 224)), dtype=numpy.float32) / 255
    return (pixels - numpy.float32(mean)) / numpy.float32(std)


def letterbox(image):
    """Ultralytics' LetterBox, with OpenCV's resize."""
    height, width = image.shape[:2]
    ratio = min(640 / height, 640 / width)
    new = int(round(width * ratio)), int(round(height * ratio))
    across, down = (640 - new[0]) / 2, (640 - new[1]) / 2
    if (width, height) != new:
        image = cv2.resize(image, new, interpolation=cv2.INTER_LINEAR)
    top, bottom = int(round(down - 0.1)), int(round(down + 0.1))
    left, right = int(round(across - 0.1)), int(round(across + 0.1))
    image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    return image.astype(numpy.float32) / 255


def weigh(filter, x):
    """Pillow's filters."""
    x = numpy.abs(x)
    if filter == "bilinear":
        return numpy.where(x < 1, 1 - x, 0)
    if filter == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return numpy.where(x < 1, near, numpy.where(x < 2, far, 0))
    return numpy.where(x < 3, numpy.sinc(x) * numpy.sinc(x / 3), 0)


def weights(filter, all, count):
    """Pillow's coefficients: a row for each pixel of the result."""
    scale = all / count
    wide = max(scale, 1)
    support = {"bilinear": 1, "bicubic": 2, "lanczos": 3}[filter] * wide
    matrix = numpy.zeros((count, all))
    for to in range(count):
        centre = (to + 0.5) * scale
        first, last = int(max(centre - support + 0.5, 0)), int(min(centre + support + 0.5, all))
        row = weigh(filter, (numpy.arange(first, last) - centre + 0.5) / wide)
        matrix[to, first:last] = row / row.sum()
    return matrix


def columns_first(image, width, height, filter):
    """As Pillow resizes, but for the order of its two passes, each of which ends in bytes."""
    pixels = numpy.asarray(image, dtype=float)
    down, across = weights(filter, pixels.shape[0], height), weights(filter, pixels.shape[1], width)
    pixels = numpy.rint(numpy.tensordot(down, pixels, (1, 0))).clip(0, 255)
    return numpy.rint(numpy.einsum("xw,hwc->hxc", across, pixels, optimize=True)).clip(0, 255)


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def real():
    for path in photos():
        image = Image.open(path).convert("RGB")
        lossless = encoded(image, "PNG", compress_level=1)
        for filter, pillow in FILTERS.items():
            for size in [(224, 224), (97, 333), (1, 1)]:
                tell(f"{filter}: Pillow, same pixels", lossless, image.resize(size, pillow), exact(*size, filter))
            turned = columns_first(image, 224, 224, filter)
            tell(f"{filter}: numpy, columns first", lossless, turned, exact(224, 224, filter))
        larger = image.resize((64, 48), FILTERS["bilinear"])
        for filter, pillow in FILTERS.items():
            grown = larger.resize((200, 131), pillow)
            tell(f"{filter}: Pillow, same pixels", encoded(larger, "PNG"), grown, exact(200, 131, filter))
        for progressive in [False, True]:
            data = encoded(image, "JPEG", quality=90, progressive=progressive)
            full = opened(data).convert("RGB")
            resized = full.resize((224, 224), FILTERS["bilinear"])
            tell("jpeg-scaling off: Pillow", data, resized, exact(224, 224))
            for scaling in ["fine", "fast"]:
                declaration = {**exact(120, 80), "jpeg-scaling": scaling}
                resized = full.resize((120, 80), FILTERS["bilinear"])
                tell(f"jpeg-scaling {scaling}: Pillow's full decode", data, resized, declaration)
        if min(image.size) >= 224:
            unit = lambda std: 1 / 255 / min(std)
            expected = classify(image, 256, "bilinear", *IMAGENET)
            tell("imagenet: torchvision", lossless, expected, {"preset": "imagenet"}, unit(IMAGENET[1]))
            expected = classify(image, 224, "bicubic", *CLIP)
            tell("clip: torchvision, Pillow", lossless, expected, {"preset": "clip"}, unit(CLIP[1]))
            for dtype, case in [("f16", "imagenet in f16: numpy"), ("bf16", "imagenet in bf16: numpy")]:
                expected = classify(image, 256, "bilinear", *IMAGENET)
                tell(case, lossless, expected, {"preset": "imagenet", "dtype": dtype}, unit(IMAGENET[1]))
        expected = letterbox(numpy.asarray(image))
        tell("yolo-letterbox: Ultralytics, OpenCV", lossless, expected, {"preset": "yolo-letterbox"}, 1 / 255)
        gray = image.resize((224, 224), FILTERS["bilinear"]).convert("L")
        tell("gray: Pillow", lossless, gray, exact(224, 224, colour="gray"))
        bgr = numpy.asarray(image.resize((224, 224), FILTERS["bilinear"]))[:, :, ::-1]
        tell("bilinear: Pillow, same pixels", lossless, bgr, exact(224, 224, colour="bgr"))
        webp = encoded(image, "WEBP", quality=90)
        decoded = opened(webp).convert("RGB").resize((224, 224), FILTERS["bilinear"])
        tell("WebP, lossy: Pillow", webp, decoded, exact(224, 224))


def edges():
    photo = Image.open(next(photos())).convert("RGB").resize((131, 77))
    for size in [(1, 1), (1, 50), (50, 1), (7, 3), (131, 77)]:
        image = photo.crop((20, 10, 20 + size[0], 10 + size[1])) if size != (131, 77) else photo
        data = encoded(image, "PNG")
        tell("edge sizes: Pillow", data, image.resize((33, 17), FILTERS["bilinear"]), exact(33, 17))
        data = encoded(image, "JPEG", quality=95)
        resized = opened(data).convert("RGB").resize((33, 17), FILTERS["bilinear"])
        tell("edge sizes, JPEG: Pillow", data, resized, exact(33, 17))
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        for format in ["PNG", "JPEG"]:
            data = encoded(photo, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
            upright = ImageOps.exif_transpose(opened(data)).convert("RGB")
            resized = upright.resize((40, 50), FILTERS["bilinear"])
            tell(f"EXIF 1 to 8, {format}: Pillow", data, resized, exact(40, 50))
    cmyk = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    tell("CMYK JPEG: Pillow", cmyk, opened(cmyk).convert("RGB"), exact(131, 77))
    gray = encoded(photo.convert("L"), "JPEG", quality=95)
    tell("gray JPEG: Pillow", gray, opened(gray).convert("RGB"), exact(131, 77))
    for subsampling in [0, 1, 2]:
        data = encoded(photo, "JPEG", quality=95, subsampling=subsampling)
        tell("4:4:4, 4:2:2, 4:2:0: Pillow", data, opened(data).convert("RGB"), exact(131, 77))
    lossless = "PNG and WebP without loss: Pillow"
    alpha = photo.convert("RGBA")
    alpha.putalpha(photo.convert("L"))
    for image in [photo, alpha, alpha.convert("LA"), photo.convert("L"), photo.quantize(50), photo.convert("1")]:
        data = encoded(image, "PNG")
        tell(lossless, data, opened(data).convert("RGB"), exact(131, 77))
    for image in [photo, alpha]:
        data = encoded(image, "WEBP", lossless=True, exact=True)
        tell(lossless, data, opened(data).convert("RGB"), exact(131, 77))
    deep = numpy.random.default_rng(3).integers(0, 65536, (77, 131, 3)).astype(numpy.uint16)
    for pixels in [deep, deep[:, :, 0]]:
        data = cv2.imencode(".png", pixels)[1].tobytes()
        decoded = cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        tell("PNG of 16 bits: OpenCV", data, decoded, exact(131, 77))
    frame = numpy.random.default_rng(4).integers(0, 256, (72 * 3 // 2, 130)).astype(numpy.uint8)
    for name, code in [("nv12", cv2.COLOR_YUV2RGB_NV12), ("yuv420", cv2.COLOR_YUV2RGB_I420)]:
        declaration = {"input": {"format": name, "width": 130, "height": 72}}
        tell("NV12, YUV420: OpenCV", frame.tobytes(), cv2.cvtColor(frame, code), declaration)


if __name__ == "__main__":
    real()
    edges()
