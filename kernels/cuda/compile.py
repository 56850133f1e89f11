"""Compiles the kernels for GPUs with NVRTC, which needs neither a GPU nor a driver: python3 compile.py [--check]

Writes kernels/cubin: a cubin for each architecture, PTX for those to come, and MANIFEST, which says what they were made of. With
--check nothing is written; everything is compiled all the same, and has to be what lies there, byte for byte.

Every kernel is held against the bounds below: registers, and no spills. NVRTC comes from NVIDIA's wheels on PyPI (`make
tools-cuda` brings them into the cache); it is proprietary, stays there, and is in nothing that we ship.
"""

import ctypes
import hashlib
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE.parent / "cubin"
sys.path.insert(0, str(HERE.parents[1] / "tests/tests/servers"))

import install  # noqa: E402  (the cache and its venvs)

# Turing, the oldest that PyTorch and Triton of today still serve, to Blackwell.
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
# Compiled and checked, but not shipped: a GPU runs what is for its major version and for no later minor one.
RUNS_ANOTHERS = [89]
# PTX is compiled by the driver, and by none that is older than the toolkit that wrote it: so it is written by an old one.
PTX_ARCHITECTURE = 75
CUBINS_BY, PTX_BY = "nvrtc-12.9.86", "nvrtcold-12.1.105"

SOURCES = ["shim.h", "number_core.h", "prepare_core.h", "prepare.cu", "convert.cu", "rows.cu", "penstock.cu"]
OPTIONS = ["--fmad=false", "--std=c++17", f"-I{HERE}"]

# Registers of a thread. With 64 a multiprocessor of any architecture holds 1024 threads; a mere copy should take far fewer.
BOUNDS = {
    "penstock_prepare_rgb": 64,
    "penstock_prepare_gray": 64,
    "penstock_prepare_nv12": 64,
    "penstock_prepare_i420": 64,
    "penstock_convert_same": 40,
    "penstock_convert_same_wide": 48,
    "penstock_convert_turned": 48,
    "penstock_convert_turned_wide": 64,
    "penstock_tables": 40,
    "penstock_gather": 40,
    "penstock_scatter": 40,
}


class Nvrtc:
    """NVRTC of one venv."""

    def __init__(self, venv):
        self.name = venv
        path = install.cache() / f"servers-{venv}"
        found = sorted(path.glob("lib/python3*/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))
        if not found:
            sys.exit(f"there is no NVRTC in {path}: `make tools-cuda` brings it")
        # By its full name, before NVRTC looks for it.
        for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(found[0]))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def read(self, program, what):
        """What a program has under `what`: CUBIN, PTX, ProgramLog."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def call(self, function, *args):
        code = getattr(self.library, function)(*args)
        if code:
            raise RuntimeError(f"{function}: {self.library.nvrtcGetErrorString(code).decode()}")

    def compile(self, architecture, real):
        """The image and the log."""
        program = ctypes.c_void_p()
        source = (HERE / "penstock.cu").read_bytes()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source, b"penstock.cu", 0, None, None)
        options = OPTIONS + [f"--gpu-architecture={'sm' if real else 'compute'}_{architecture}"]
        if real:
            options.append("--ptxas-options=-v")
        words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        code = self.library.nvrtcCompileProgram(program, len(options), words)
        log = self.read(program, "ProgramLog").rstrip(b"\0").decode()
        if code:
            sys.exit(f"{self.name} does not compile for {architecture}:\n{log}")
        image = self.read(program, "CUBIN" if real else "PTX")
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return image, log


def usage(log):
    """Registers, shared memory and spills of each kernel, from what ptxas says."""
    kernels, name = {}, None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            kernels[name] = {"registers": None, "shared": 0, "stack": 0, "spills": 0}
        elif name and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line)):
            kernels[name]["stack"] = int(found[1])
            kernels[name]["spills"] = int(found[2]) + int(found[3])
        elif name and (found := re.search(r"Used (\d+) registers", line)):
            kernels[name]["registers"] = int(found[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[name]["shared"] = int(shared[1])
    return kernels


def check(architecture, kernels):
    """What is wrong with a compiled module."""
    wrong = [f"{name} is missing" for name in BOUNDS if name not in kernels]
    for name, used in kernels.items():
        if name not in BOUNDS:
            wrong.append(f"{name} has no bound in compile.py")
        elif used["registers"] is None:
            wrong.append(f"{name}: ptxas did not say how many registers it takes")
        elif used["registers"] > BOUNDS[name]:
            wrong.append(f"{name} takes {used['registers']} registers, more than {BOUNDS[name]}")
        if used["spills"] or used["stack"]:
            wrong.append(f"{name} spills {used['spills']} bytes, and has {used['stack']} bytes of stack")
    return [f"sm_{architecture}: {line}" for line in wrong]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def main(arguments):
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    new, old = Nvrtc(CUBINS_BY), Nvrtc(PTX_BY)
    files, wrong, table = {}, [], []
    for architecture in ARCHITECTURES:
        image, log = new.compile(architecture, True)
        if architecture not in RUNS_ANOTHERS:
            files[f"penstock.sm_{architecture}.cubin"] = image
        kernels = usage(log)
        wrong += check(architecture, kernels)
        print(f"sm_{architecture:<4} {len(image):7} bytes  registers: "
              + ", ".join(f"{name.removeprefix('penstock_')} {used['registers']}" for name, used in kernels.items()))
        table += [f"# sm_{architecture} {name}: {used['registers']} registers, {used['spills']} bytes spilled, "
                  f"{used['shared']} bytes shared" for name, used in kernels.items()]
    image, _ = old.compile(PTX_ARCHITECTURE, False)
    files[f"penstock.compute_{PTX_ARCHITECTURE}.ptx"] = image.rstrip(b"\0")
    version = re.search(rb"\.version (\S+)", image)[1].decode()
    print(f"PTX     {len(image):7} bytes, version {version}, by NVRTC {old.version()}")
    manifest = [
        "# Written by kernels/cuda/compile.py: `make cubins` writes it anew, and a test holds sources and images against it.",
        f"# cubins by NVRTC {new.version()} ({CUBINS_BY.split('-')[1]}), PTX {version} by NVRTC {old.version()}; {' '.join(OPTIONS[:-1])}",
    ]
    manifest += [f"{sha256((HERE / name).read_bytes())}  cuda/{name}" for name in SOURCES]
    manifest += [f"{sha256(data)}  cubin/{name}" for name, data in sorted(files.items())]
    files["MANIFEST"] = "\n".join(manifest + table + [""]).encode()
    if arguments:
        wrong += [f"kernels/cubin/{name} is not what the sources give: run `make cubins`"
                  for name, data in files.items() if not (OUT / name).exists() or (OUT / name).read_bytes() != data]
    else:
        OUT.mkdir(exist_ok=True)
        for left in OUT.iterdir():
            left.unlink()
        for name, data in files.items():
            (OUT / name).write_bytes(data)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"cubins: {len(ARCHITECTURES)} architectures, {len(BOUNDS)} kernels each, {sum(map(len, files.values()))} bytes, "
          f"{len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
