"""Becomes one of the real model servers: python3 launch.py triton|mlserver|torchserve --dir DIR --ip IP --models JSON

Writes what the server needs (its model repository, its settings) into DIR and then executes the server in its place, so
that the process which was started is the server. It listens on IP: HTTP on 8000, gRPC on 8001, metrics and management
on 8002 and above. `--models` is a list of {"name", "max_batch", "batches", "delay_us", "fixed_us", "row_us", "poison",
"width", "instances", "kind", "datatype", "versions"}, all but the name optional: `batches` says whether the server batches by itself,
up to `max_batch` rows and no longer than `delay_us`; `kind` is `rowsum`, `kinds`, `pixels`, `photos` or `images`, and `pixels` takes
"FP16" unless its "datatype" is "FP32". Fails with exit status 3 if the server
is not installed.
"""

import argparse
import ctypes
import json
import os
import pathlib
import shutil
import signal
import sys
import sysconfig
import zipfile

from install import venv

HERE = pathlib.Path(__file__).resolve().parent
NOT_INSTALLED = 3
# What Triton's Python backend runs.
SOURCES = {
    "rowsum": "triton_model.py",
    "kinds": "triton_kinds.py",
    "pixels": "triton_pixels.py",
    "photos": "triton_photos.py",
    "images": "triton_photos.py",
}
# Those that run the network. `images` tells of an input `image` too, which it never sees since a sidecar makes `pixels` of it:
# perf_analyzer sends only what the server tells of.
PHOTOS = ("photos", "images")
NETWORK = HERE.parent.parent / "models/repository/photos/1/model.onnx"
# The inputs of `kinds`.
DATATYPES = {
    "half": "FP16",
    "single": "FP32",
    "double": "FP64",
    "long": "INT64",
    "short": "INT16",
    "byte": "UINT8",
    "flag": "BOOL",
    "text": "BYTES",
}
HTTP, GRPC, METRICS, MANAGEMENT = 8000, 8001, 8002, 8003
PR_SET_PDEATHSIG = 1
# What the Python backend's files in /dev/shm begin with.
SHM = "triton-python-"


def parameters(model):
    """What `rowsum` takes, as text."""
    return {key: str(model[key]) for key in ("fixed_us", "row_us", "poison") if model.get(key) is not None}


def versions(model):
    """The names of its versions, the newest last."""
    return [str(version + 1) for version in range(model.get("versions", 1))]


def of_kinds(model):
    """Whether it is `kinds`, and not `rowsum`."""
    return model.get("kind", "rowsum") == "kinds"


def triton(args, home):
    """Triton itself, from the wheel of PyTriton, with its Python backend and nothing of PyTriton's around it."""
    site = next(home.glob("lib/python3.*/site-packages"))
    wheel = site / "pytriton/tritonserver"
    backends = args.dir / "backends"
    if not backends.exists():
        shutil.copytree(wheel / "backends", backends)
        # The backend's worker links the library of the Python that runs it: this one's.
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy2(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    for model in args.models:
        folder = args.dir / "models" / model["name"]
        for version in versions(model):
            (folder / version).mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / SOURCES[model.get("kind", "rowsum")], folder / version / "model.py")
            if model.get("kind") in PHOTOS:
                shutil.copy2(NETWORK, folder / version / "model.onnx")
        (folder / "config.pbtxt").write_text(config(model), encoding="utf-8")
    libraries = [sysconfig.get_config_var("LIBDIR"), str(site / "nvidia_pytriton.libs")]
    paths = [str(site), str(HERE)]
    if any(model.get("kind") in PHOTOS for model in args.models):
        onnx = venv("onnx")
        if onnx is None:
            print("onnxruntime is not installed; run `make tools`", file=sys.stderr)
            sys.exit(NOT_INSTALLED)
        # Behind Triton's own, whose numpy its backend was tried with.
        paths += map(str, onnx.glob("lib/python3.*/site-packages"))
    environment = {"LD_LIBRARY_PATH": ":".join(libraries), "PYTHONPATH": ":".join(paths)}
    sweep()
    flags = {
        "model-repository": args.dir / "models",
        "backend-directory": backends,
        "http-address": args.ip,
        "http-port": HTTP,
        "grpc-address": args.ip,
        "grpc-port": GRPC,
        "metrics-address": args.ip,
        "metrics-port": METRICS,
        "allow-gpu-metrics": "false",
        "backend-config": f"python,shm-region-prefix-name={SHM}{os.getpid()}-",
        "exit-timeout-secs": 3,
    }
    return [str(wheel / "bin/tritonserver"), *(f"--{name}={value}" for name, value in flags.items())], environment


def sweep():
    """Removes what Tritons that were killed have left in shared memory: their process ids are in its names."""
    for file in pathlib.Path("/dev/shm").glob(f"{SHM}*"):
        pid = file.name.removeprefix(SHM).split("-")[0]
        if not pathlib.Path("/proc", pid).exists():
            file.unlink(missing_ok=True)


def config(model):
    width = model.get("width", -1)
    batch = model.get("max_batch", 32)
    tensors = {
        "input": [("values", "TYPE_FP32", width), ("factor", "TYPE_INT64", 1), ("label", "TYPE_STRING", 1)],
        "output": [("total", "TYPE_INT64", 1), ("scaled", "TYPE_FP32", width), ("note", "TYPE_STRING", 1)],
    }
    if of_kinds(model):
        of = {name: "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}" for name, datatype in DATATYPES.items()}
        tensors = {
            "input": [(name, datatype, width) for name, datatype in of.items()],
            "output": [("sum", "TYPE_INT64", 1), ("byte_half", "TYPE_FP16", width)],
        }
        tensors["output"] += [(f"{name}_back", datatype, width) for name, datatype in of.items()]
    if model.get("kind") == "pixels":
        image, datatype = [3, 224, 224], model.get("datatype", "FP16")
        tensors = {
            "input": [("pixels", f"TYPE_{datatype}", image)],
            "output": [("back", "TYPE_UINT16" if datatype == "FP16" else "TYPE_UINT32", image), ("sum", "TYPE_FP64", [1])],
        }
    if model.get("kind") in PHOTOS:
        tensors = {"input": [("pixels", "TYPE_FP16", [3, 224, 224])], "output": [("logits", "TYPE_FP32", [10])]}
    if model.get("kind") == "images":
        tensors["input"].append(("image", "TYPE_STRING", 1))
    text = [f'backend: "python"\nmax_batch_size: {batch}\nversion_policy {{ all {{}} }}']
    for kind, members in tensors.items():
        for name, datatype, dims in members:
            required = kind == "output" or name == "values" or (name == "pixels" and model["kind"] != "images")
            optional = "" if required else ", optional: true"
            dims = dims if isinstance(dims, list) else [dims]
            text.append(f'{kind} {{ name: "{name}", data_type: {datatype}, dims: {dims}{optional} }}')
    text.append(f"instance_group {{ kind: KIND_CPU, count: {model.get('instances', 1)} }}")
    if model.get("batches"):
        text.append(f"dynamic_batching {{ max_queue_delay_microseconds: {model.get('delay_us', 0)} }}")
    for key, value in parameters(model).items():
        text.append(f'parameters {{ key: "{key}", value {{ string_value: "{value}" }} }}')
    return "\n".join(text) + "\n"


def mlserver(args, home):
    """MLServer without workers of its own: with them, its batching would be as it is here, in the parent."""
    settings = {
        "host": args.ip,
        "http_port": HTTP,
        "grpc_port": GRPC,
        "metrics_port": METRICS,
        "parallel_workers": 0,
        "debug": False,
        "metrics_dir": str(args.dir / "metrics"),
    }
    (args.dir / "metrics").mkdir(exist_ok=True)
    (args.dir / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    for model in args.models:
        for version in versions(model):
            folder = args.dir / "models" / model["name"] / version
            folder.mkdir(parents=True, exist_ok=True)
            own = {
                "name": model["name"],
                "implementation": f"mlserver_model.{'Kinds' if of_kinds(model) else 'Rowsum'}Runtime",
                "parameters": {"version": version, "extra": parameters(model)},
            }
            if model.get("batches"):
                own["max_batch_size"] = model.get("max_batch", 32)
                own["max_batch_time"] = model.get("delay_us", 0) / 1e6
            (folder / "model-settings.json").write_text(json.dumps(own), encoding="utf-8")
    return [str(home / "bin/mlserver"), "start", str(args.dir)], {"PYTHONPATH": str(HERE)}


def torchserve(args, home):
    """TorchServe's Java server itself, since its launcher goes into the background; tokens are off."""
    store = args.dir / "store"
    scratch = args.dir / "tmp"
    store.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    models = {}
    for model in args.models:
        archive(store / f"{model['name']}.mar", model)
        models[model["name"]] = {
            "1.0": {
                "defaultVersion": True,
                "marName": f"{model['name']}.mar",
                "minWorkers": model.get("instances", 1),
                "maxWorkers": model.get("instances", 1),
                "batchSize": model.get("max_batch", 32) if model.get("batches") else 1,
                "maxBatchDelay": max(1, model.get("delay_us", 0) // 1000),
                "responseTimeout": 60,
            }
        }
    snapshot = {"name": "tests", "modelCount": len(models), "created": 0, "models": models}
    properties = {
        "inference_address": f"http://{args.ip}:{HTTP}",
        "management_address": f"http://{args.ip}:{MANAGEMENT}",
        "metrics_address": f"http://{args.ip}:{METRICS}",
        "grpc_inference_address": args.ip,
        "grpc_management_address": args.ip,
        "grpc_inference_port": GRPC,
        "grpc_management_port": MANAGEMENT + 1,
        "model_store": store,
        "disable_token_authorization": "true",
        "disable_system_metrics": "true",
        "install_py_dep_per_model": "false",
        "number_of_netty_threads": 2,
        "model_snapshot": json.dumps(snapshot),
    }
    text = "".join(f"{key}={value}\n" for key, value in properties.items())
    (args.dir / "config.properties").write_text(text, encoding="utf-8")
    site = next(home.glob("lib/python3.*/site-packages"))
    java = shutil.which("java", path=os.environ.get("JAVA_HOME", "") + "/bin:" + os.environ["PATH"])
    if java is None:
        print("there is no java, which TorchServe runs on; install Java 17 (openjdk-17-jre-headless)", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    # Workers are reached over sockets in the folder for temporary files: another server's would have the same names.
    command = [java, f"-Dmodel_server_home={site}", f"-Djava.io.tmpdir={scratch}", "-Xmx512m"]
    command += ["-cp", f"{site}/ts/frontend/*", "org.pytorch.serve.ModelServer", "--python", str(home / "bin/python")]
    command += ["-f", str(args.dir / "config.properties"), "-s", str(store), "-w", str(store), "-ncs"]
    environment = {"LOG_LOCATION": str(args.dir), "METRICS_LOCATION": str(args.dir), "TEMP": str(scratch)}
    return command, {**environment, "PYTHONPATH": f"{HERE}:{site}"}


def archive(file, model):
    """A model archive, which is a zip file with a manifest."""
    manifest = {
        "runtime": "python",
        "archiverVersion": "0.12.0",
        "model": {"modelName": model["name"], "modelVersion": "1.0", "handler": "torchserve_handler.py"},
    }
    with zipfile.ZipFile(file, "w") as mar:
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        mar.write(HERE / "torchserve_handler.py", "torchserve_handler.py")
        mar.writestr("rowsum.json", json.dumps(parameters(model)))


def main():
    servers = {"triton": triton, "mlserver": mlserver, "torchserve": torchserve}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", choices=servers)
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("--ip", required=True)
    parser.add_argument("--models", type=json.loads, required=True)
    args = parser.parse_args()
    args.dir = args.dir.resolve()
    home = venv(args.server)
    if home is None:
        print(f"{args.server} is not installed; run `make tools`", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    command, environment = servers[args.server](args, home)
    # The server ends with whoever started it, even if that one is killed; this outlives the change of program.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.chdir(args.dir)
    os.execve(command[0], command, {**os.environ, **environment, "PYTHONUNBUFFERED": "1"})


if __name__ == "__main__":
    main()
