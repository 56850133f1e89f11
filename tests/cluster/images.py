"""Images, made of programs on this machine: an OCI archive of one layer, which containerd takes in without a registry.

A program of glibc gets the libraries that the loader finds for it here, at the same places, so that what runs in the pod is
what runs in the tests; a static one gets nothing.
"""

import hashlib
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile

NOBODY = 65532
# The users that our pods run as (manifests/install, control/inject); a name is all that they need.
PASSWD = "root:x:0:0:root:/:/none\npenstock:x:2102:2102:penstock:/:/none\nnonroot:x:65532:65532:nonroot:/:/none\n"
GROUP = "root:x:0:\npenstock:x:2102:\nnonroot:x:65532:\n"
ETC = {"etc/passwd": PASSWD, "etc/group": GROUP, "etc/nsswitch.conf": "hosts: files dns\n"}


def libraries(program):
    """What the loader would load for a program, by the paths under which it looks for them."""
    run = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return set()  # "not a dynamic executable"
    found = set()
    for line in run.stdout.splitlines():
        if "not found" in line:
            raise RuntimeError(f"{program} needs a library that is not here: {line.strip()}")
        # "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", or the loader: "/lib64/ld-linux-x86-64.so.2 (0x…)"
        words = line.split("=>")[-1].split()
        if words and words[0].startswith("/"):
            found.add(words[0])
    return found


def layer(files, folders):
    """A layer of files: a path in the image, and bytes or a file of this machine, or a folder of it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:

        def add(path, data, mode, kind=tarfile.REGTYPE):
            entry = tarfile.TarInfo(path)
            entry.type, entry.mode, entry.size = kind, mode, len(data)
            tar.addfile(entry, io.BytesIO(data))

        parents = {str(parent) for path in [*files, *folders] for parent in pathlib.PurePath(path).parents} | set(folders)
        for folder in sorted(parents - {"."}):
            add(folder, b"", 0o1777 if folder == "tmp" else 0o755, tarfile.DIRTYPE)
        for path, content in sorted(files.items()):
            data = content.encode() if isinstance(content, str) else content.read_bytes()
            add(path, data, 0o644 if isinstance(content, str) else 0o755)
    return made.getvalue()


def stripped(program, folder):
    """Without what only a debugger reads: 300 MB of a debug build become 40."""
    smaller = pathlib.Path(folder) / program.name
    subprocess.run(["strip", "--strip-debug", "-o", str(smaller), str(program)], check=True)
    return smaller


def archive(name, programs, extra=None, user=NOBODY, command=None):
    """An image with these programs in its PATH, and further files (path in the image: a file here); as the bytes of an archive."""
    files = dict(ETC) | {path.lstrip("/"): file for path, file in (extra or {}).items()}
    with tempfile.TemporaryDirectory(prefix="penstock-image-") as folder:
        for program in programs:
            needs = libraries(program)
            files |= {library.lstrip("/"): pathlib.Path(library) for library in needs}
            # What is static was built without (parts.py).
            files[f"usr/local/bin/{program.name}"] = stripped(program, folder) if needs else program
        content = layer(files, ["tmp"])
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": f"{user}:{user}",
            "Env": ["PATH=/usr/local/bin"],
            "Entrypoint": command or [f"/usr/local/bin/{programs[0].name}"],
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(content)]},
        "history": [{"created_by": "tests/cluster/images.py"}],
    }
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:

        def add(path, data):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        def blob(kind, data):
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            add(f"blobs/sha256/{digest(data).split(':')[1]}", data)
            return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest(data), "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("config.v1+json", config),
            "layers": [blob("layer.v1.tar", content)],
        }
        described = blob("manifest.v1+json", manifest)
        described["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.split(":")[-1]}
        add("oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        add("index.json", json.dumps({"schemaVersion": 2, "manifests": [described]}).encode())
    return made.getvalue()


def digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
