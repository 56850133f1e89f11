"""Brings the real model servers and clients of the tests here: python3 install.py [NAME ...]

Each goes into a venv of its own below the cache (~/.cache/penstock, or XDG_CACHE_HOME), named by its version, so that a
new version never meets the remains of an old one. What is there already costs nothing. Exit status 1 if one could not
be installed, with pip's own words.
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time

# A venv's name, and what it holds. nvidia-pytriton is the only wheel on PyPI that carries the real tritonserver.
# kserve and tritonclient.grpc share a venv, but not a process: both register the same protobuf names.
VENVS = {
    "triton-2.51.0": ["nvidia-pytriton==0.7.0"],
    "mlserver-1.7.1": ["mlserver==1.7.1"],
    "torchserve-0.12.0": ["torchserve==0.12.0", "numpy==2.4.6", "pyyaml==6.*"],
    "clients-2.73.0": ["tritonclient[http,grpc]==2.73.0", "kserve==0.21.0"],
    # perf_analyzer is a program inside this wheel of the client, the last that runs with the libc of Debian 12. It is linked
    # with the CUDA runtime, which it calls for CUDA's shared memory alone, and with libb64 (see LIBRARIES).
    "perf-2.41.1": ["tritonclient==2.41.1", "nvidia-cuda-runtime-cu12==12.9.79"],
    # A model in Triton's Python backend, whose numpy is the one that Triton's wheel brings.
    "onnx-1.32.0": ["onnxruntime==1.32.0"],
    "images-13.0.0": [
        "pillow==13.0.0",
        "numpy==2.4.6",
        "opencv-python-headless==5.0.0.93",
        "simplejpeg==1.9.0",
        "scikit-image==0.26.0",
        "scikit-learn==1.9.1",
        "imageio==2.38.1",
    ],
}

# What only benches ask for, and by its name: nothing of it is installed unasked.
ASKED = {
    "dali-2.4.0": ["nvidia-dali-cuda120==2.4.0", "numpy==2.4.6"],
    # For kernels/cuda/compile.py: one that knows the newest GPUs, and one whose PTX old drivers read.
    "nvrtc-12.9.86": ["nvidia-cuda-nvrtc-cu12==12.9.86"],
    "nvrtcold-12.1.105": ["nvidia-cuda-nvrtc-cu12==12.1.105"],
}

# Libraries of Debian that a venv's programs need, unpacked into its lib/debian: that needs no root.
LIBRARIES = {"perf-2.41.1": "libb64-0d"}


def cache():
    """The folder for what this project downloads."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "penstock"


def venv(name):
    """The venv of a server by the first part of its name, or None if it was not installed."""
    for whole in [*VENVS, *ASKED]:
        path = cache() / f"servers-{whole}"
        if whole.split("-")[0] == name and (path / "installed").exists():
            return path
    return None


def install(name, packages):
    path = cache() / f"servers-{name}"
    if (path / "installed").exists():
        print(f"{name}: there already, {path}")
        return
    began = time.monotonic()
    shutil.rmtree(path, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    pip = [str(path / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    subprocess.run(pip + packages, check=True)
    if name in LIBRARIES:
        unpack(LIBRARIES[name], path / "lib/debian")
    (path / "installed").touch()
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    mib = sum(file.stat().st_size for file in files) >> 20
    print(f"{name}: installed {' '.join(packages)} in {time.monotonic() - began:.0f} s, {mib} MiB, {path}")


def unpack(package, folder):
    """A package of Debian's into a folder; its lists are fetched if they are not there, which only root can."""
    folder.mkdir(parents=True)
    download = ["apt-get", "download", "--quiet", "--quiet", package]
    if subprocess.run(download, cwd=folder, check=False).returncode != 0:
        subprocess.run(["apt-get", "update", "--quiet", "--quiet"], check=True)
        subprocess.run(download, cwd=folder, check=True)
    for file in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", str(file), str(folder)], check=True)
        file.unlink()


def main(wanted):
    known = VENVS | ASKED
    unknown = [name for name in wanted if not any(whole.split("-")[0] == name for whole in known)]
    if unknown:
        sys.exit(f"there is no {unknown[0]}; there are {', '.join(whole.split('-')[0] for whole in known)}")
    cache().mkdir(parents=True, exist_ok=True)
    # Two runs may want to install at the same time; the second finds what the first has brought.
    with open(cache() / "servers.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, packages in known.items():
            if name.split("-")[0] in wanted or (not wanted and name in VENVS):
                install(name, packages)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"could not install the model servers: {' '.join(error.cmd)} ended with {error.returncode}")
