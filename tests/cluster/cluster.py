"""A Kubernetes of one node on this machine, from real parts: python3 cluster.py COMMAND

  build                     make the programs, once for a version (a quarter of an hour on two cores)
  up                        build what is missing, and start; --control-plane-only: without a kubelet, so without pods
  down                      end it and leave nothing behind
  status                    what runs, and since when it is ready
  images --bins DIR         put Penstock's images into it, made of the programs in DIR (target/debug)
  load-image NAME PROGRAM…  put an image into it, made of programs and the libraries that they need
  stop PROGRAM, start PROGRAM   an outage of one program
  run COMMAND…              run something on the node: tcpdump, nft, crictl, ctr

All of it is a process tree in namespaces of its own (network, mounts, processes, host name), below one first process; README.md
says how and why. --name NAME: another cluster beside it. Needs root. Exit status 1 if it did not work, with the reason.
"""

import argparse
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

import images
import parts
import programs
from parts import Failure

# Far more than a start takes on a machine that does nothing else.
PATIENCE = 120


class Cluster:
    """One cluster: its folder, and what is asked of it."""

    def __init__(self, name):
        if not re.fullmatch(r"[a-z0-9]{1,16}", name):
            raise Failure(f"{name} is no name for a cluster: up to 16 letters and digits")
        self.name = name
        # Short, as paths of sockets may have 107 letters.
        self.state = pathlib.Path(f"/tmp/penstock-cluster-{name}")
        self.cgroup = f"/penstock-cluster-{name}"
        self.kubeconfig = self.state / "kubeconfig"

    # The node.

    def pid(self):
        """The node's first process, or None."""
        try:
            pid = int((self.state / "node.pid").read_text(encoding="utf-8"))
            # A number that is somebody else's by now is not ours.
            return pid if str(self.state).encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") else None
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return None

    def inside(self, *command):
        pid = self.pid()
        if pid is None:
            raise Failure(f"the cluster {self.name} is not up: make cluster")
        return ["nsenter", "-t", str(pid), "--net", "--mount", "--pid", "--uts", "--", *command]

    def run(self, *command, **options):
        return subprocess.run(self.inside(*command), check=True, **options)

    def ip(self):
        return (self.state / "ip").read_text(encoding="utf-8")

    def link(self):
        return (self.state / "link").read_text(encoding="utf-8")

    def connect(self):
        """A cable between the machine and the node. Its addresses are of the range that carriers use among themselves (RFC 6598),
        the first pair that nobody here has."""
        with parts.locked("cluster-link"):
            taken = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True).stdout
            number = next(n for n in range(1, 255) if f"100.127.{n}." not in taken and f"penstock{n} " not in taken)
            link, here, there = f"penstock{number}", f"100.127.{number}.1", f"100.127.{number}.2"
            (self.state / "link").write_text(link, encoding="utf-8")
            (self.state / "ip").write_text(there, encoding="utf-8")
            commands = [
                ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid())],
                ["ip", "address", "add", f"{here}/30", "dev", link],
                ["ip", "link", "set", link, "up"],
                self.inside("ip", "address", "add", f"{there}/30", "dev", "eth0"),
                self.inside("ip", "link", "set", "eth0", "up"),
                # The machine forwards nothing: whatever pods send elsewhere ends there.
                self.inside("ip", "route", "add", "default", "via", here),
            ]
            for command in commands:
                subprocess.run(command, check=True)

    def make_node(self):
        log = open(self.state / "logs/node.log", "w", encoding="utf-8")
        command = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", sys.executable]
        command += [str(parts.HERE / "node.py"), str(self.state), programs.NODE]
        made = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.wait("the node's namespaces", self.pid, made, "node")

    def cgroups(self):
        """The folders of our cgroup, one in each hierarchy. (With version 1 there are several.)"""
        mounts = pathlib.Path("/proc/self/mounts").read_text(encoding="utf-8")
        found = [line.split()[1] for line in mounts.splitlines() if line.split()[2] in ("cgroup", "cgroup2")]
        return [pathlib.Path(place + self.cgroup) for place in found]

    # Programs.

    def start(self, name):
        log = open(self.state / f"logs/{name}.log", "a", encoding="utf-8")
        command = self.inside(*programs.command(name, self.state, self.ip()))
        # So that the plugins of the network, and runc, are found whoever starts us.
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"PATH": path}
        )

    def running(self, name):
        """The process of a program, by the machine's number: it is in the node's processes, and its command line is ours."""
        ours = os.readlink(f"/proc/{self.pid()}/ns/pid")
        wanted = [argument.encode() for argument in programs.command(name, self.state, self.ip())]
        for folder in pathlib.Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and os.readlink(folder / "ns/pid") == ours:
                    if (folder / "cmdline").read_bytes().split(b"\0")[:-1] == wanted:
                        return int(folder.name)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return None

    def stop(self, name, how=signal.SIGTERM):
        pid = self.running(name)
        if pid is None:
            raise Failure(f"{name} does not run")
        os.kill(pid, how)
        self.wait(f"the end of {name}", lambda: self.running(name) is None)

    def healthy(self, name):
        if name == "kube-apiserver":
            return self.kubectl("get", "--raw", "/readyz", check=False).stdout == "ok"
        if name == "containerd":
            return subprocess.run(self.inside("ctr", "version"), capture_output=True, check=False).returncode == 0
        # Asked on the node: these listen on its loopback.
        ask = [sys.executable, __file__, "ask", programs.HEALTH[name]]
        return subprocess.run(self.inside(*ask), capture_output=True, check=False).returncode == 0

    def wait(self, what, ready, process=None, log=None):
        until = time.monotonic() + PATIENCE
        while not ready():
            ended = process is not None and process.poll() is not None
            if ended or time.monotonic() > until:
                said = ""
                if log:
                    said = "\n".join((self.state / f"logs/{log}.log").read_text(encoding="utf-8").splitlines()[-15:])
                how = f"ended with {process.returncode}" if ended else f"not there after {PATIENCE} s"
                raise Failure(f"{what}: {how}\n{said}")
            time.sleep(0.1)

    def bring(self, *names):
        """Starts programs together, and waits for all."""
        began = time.monotonic()
        started = {name: self.start(name) for name in names}
        for name, process in started.items():
            self.wait(name, lambda name=name: self.healthy(name), process, name)
            print(f"{name}: ready after {time.monotonic() - began:.1f} s", flush=True)

    # Its API.

    def kubectl(self, *arguments, check=True, stdin=None):
        command = [str(parts.program("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)
        if check and run.returncode != 0:
            raise Failure(f"kubectl {' '.join(arguments)}: {run.stderr.strip()}")
        return run

    def apply(self, *objects):
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.kubectl("apply", "-f", "-", stdin=text)

    def load(self, archive):
        self.run("ctr", "--namespace=k8s.io", "images", "import", "-", input=archive, stdout=subprocess.DEVNULL)

    def gateway_api(self):
        """The definitions of the Gateway API that are called standard, as its module has them."""
        crds = parts.gateway_api()
        self.kubectl("apply", "--server-side", *(f"--filename={file}" for file in crds))

    # Commands.

    def able(self, control_plane_only):
        """Whether this machine can have a node at all."""
        if os.geteuid() != 0:
            raise Failure("a node needs root: sudo make cluster")
        if control_plane_only:
            return
        if "overlay" not in pathlib.Path("/proc/filesystems").read_text(encoding="utf-8"):
            raise Failure("a node needs overlayfs for its images: modprobe overlay")
        for folder in self.cgroups():
            try:
                folder.mkdir()
                folder.rmdir()
            except FileExistsError:
                pass
            except OSError as error:
                raise Failure(f"a node needs cgroups of its own, and none can be made: {error}") from error
        if not self.cgroups():
            raise Failure("a node needs cgroups, and none are mounted")
        if shutil.which("nft") and subprocess.run(["nft", "list", "tables"], capture_output=True, check=False).returncode != 0:
            raise Failure("a node needs nf_tables: modprobe nf_tables")

    def up(self, control_plane_only):
        self.able(control_plane_only)
        parts.build(control_plane_only)
        if self.pid() is not None:
            raise Failure(f"the cluster {self.name} is up already: make cluster-down ends it")
        self.down()
        began = time.monotonic()
        (self.state / "logs").mkdir(parents=True)
        try:
            self.make_node()
            self.connect()
            for folder in self.cgroups():
                folder.mkdir(exist_ok=True)
            programs.write(self.state, self.ip(), self.cgroup)
            self.bring("etcd")
            self.bring("kube-apiserver")
            if control_plane_only:
                self.bring("kube-controller-manager", "kube-scheduler")
            else:
                self.bring("kube-controller-manager", "kube-scheduler", "containerd")
                self.load(images.archive(programs.PAUSE, [parts.program("stand")], command=["/usr/local/bin/stand", "pause"]))
                self.load(images.archive(DNS_IMAGE, [parts.program(parts.dns())], command=[f"/usr/local/bin/{parts.dns()}"]))
                self.bring("kubelet", "kube-proxy")
                self.apply(*dns())
                self.wait("the node is ready", self.node_ready)
                self.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", f"--timeout={PATIENCE}s")
        except BaseException:
            # What is there tells why; what it said is kept, and the next `up` makes all of it anew.
            if not os.environ.get("PENSTOCK_CLUSTER_KEEP"):
                kept = pathlib.Path(f"{self.state}-failed-logs")
                shutil.rmtree(kept, ignore_errors=True)
                if (self.state / "logs").exists():
                    shutil.copytree(self.state / "logs", kept)
                self.down()
                print(f"what its programs said: {kept}", file=sys.stderr)
            raise
        kind = "a control plane" if control_plane_only else "a node"
        print(f"Kubernetes {parts.version()}, {kind}, up in {time.monotonic() - began:.0f} s")
        print(f"export KUBECONFIG={self.kubeconfig} PATH={parts.folder()}:$PATH")

    def node_ready(self):
        nodes = json.loads(self.kubectl("get", "nodes", "-o", "json").stdout)["items"]
        return any(c["type"] == "Ready" and c["status"] == "True" for n in nodes for c in n["status"].get("conditions", []))

    def down(self):
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.wait("the end of the node", lambda: not pathlib.Path(f"/proc/{pid}").exists())
        if (self.state / "link").exists():
            # With the node's network goes the node's end, and with it ours; but the kernel takes its time.
            subprocess.run(["ip", "link", "delete", self.link()], capture_output=True, check=False)
        left = []
        for root in self.cgroups():
            self.wait(f"the end of all processes in {root}", lambda root=root: not any(map(members, below(root))))
            for folder in below(root):
                try:
                    folder.rmdir()
                except OSError as error:
                    left.append(f"{folder}: {error}")
        if self.state.exists():
            shutil.rmtree(self.state)
        if left:
            raise Failure("cgroups are left:\n" + "\n".join(left))

    def status(self):
        if self.pid() is None:
            raise Failure(f"the cluster {self.name} is not up")
        for name in programs.CONTROL_PLANE + programs.WORKER:
            pid = self.running(name)
            print(f"{name:<26}{'stopped' if pid is None else f'process {pid}, ' + ('healthy' if self.healthy(name) else 'NOT healthy')}")
        print(self.kubectl("get", "pods", "--all-namespaces", check=False).stdout, end="")
        print(f"export KUBECONFIG={self.kubeconfig} PATH={parts.folder()}:$PATH")

    def images(self, bins):
        """Penstock's own, by the names that are in manifests/install, and the tests' model server with its models."""
        number = re.search(r'^version = "(.+)"$', (parts.HERE / "../../Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
        number, models = number.group(1), (parts.HERE / "../models/repository").resolve()
        files = {f"models/{file.relative_to(models)}": file for file in models.rglob("*") if file.is_file()}
        for name, program, more in [
            ("control", "penstock-control", {}),
            ("proxy", "penstock-proxy", {}),
            ("modelserver", "penstock-modelserver", files),
        ]:
            if not (bins / program).exists():
                raise Failure(f"{bins / program} is not there: cargo build --workspace --bins")
            began = time.monotonic()
            made = images.archive(f"penstock.io/{name}:{number}", [bins / program], more)
            self.load(made)
            took = time.monotonic() - began
            print(f"penstock.io/{name}:{number}: {len(made) >> 20} MiB, in {took:.1f} s", flush=True)


DNS_IMAGE = "penstock.io/coredns:test"


def dns():
    """CoreDNS, as every cluster has it."""
    labels, name = {"k8s-app": "kube-dns"}, {"name": "coredns", "namespace": "kube-system"}
    corefile = f""".:53 {{
  errors
  health
  ready
  kubernetes {programs.DOMAIN} in-addr.arpa {{
    pods insecure
    ttl 5
  }}
  cache 5
}}
"""
    pod = {
        "serviceAccountName": "coredns",
        "priorityClassName": "system-cluster-critical",
        "dnsPolicy": "Default",
        "containers": [
            {
                "name": "coredns",
                "image": DNS_IMAGE,
                "args": ["-conf", "/etc/coredns/Corefile"],
                "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}],
                "readinessProbe": {"httpGet": {"port": 8181, "path": "/ready"}, "periodSeconds": 1},
                "livenessProbe": {"httpGet": {"port": 8080, "path": "/health"}, "initialDelaySeconds": 30},
                "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
                "securityContext": {"runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}},
            }
        ],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    reads = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"}
    account = {"kind": "ServiceAccount", **name}
    ports = [{"name": f"dns-{kind}".lower(), "port": 53, "protocol": kind} for kind in ("UDP", "TCP")]
    service = {"selector": labels, "clusterIP": programs.DNS_IP, "ports": ports}
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": name},
        {"apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": "system:coredns"}, "rules": reads},
        {"apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": "system:coredns"}, "roleRef": role, "subjects": [account]},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": {"Corefile": corefile}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": name,
            "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": name | {"name": "kube-dns"}, "spec": service},
    ]


def below(root):
    """The folders of a cgroup, the innermost first."""
    return [pathlib.Path(folder) for folder, _, _ in os.walk(root, topdown=False)]


def members(cgroup):
    try:
        return (cgroup / "cgroup.procs").read_text(encoding="utf-8").split()
    except (FileNotFoundError, OSError):
        return []


def ask(url):
    """Whether a URL answers 200; on the node's loopback, where programs show certificates of their own making."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=2, context=trusting) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("--name", default="test")
    parser.add_argument("command", choices=["build", "up", "down", "status", "images", "load-image", "stop", "start", "run", "ask"])
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    cluster, rest = Cluster(chosen.name), chosen.rest
    if chosen.command == "ask":
        sys.exit(0 if ask(rest[0]) else 1)
    if chosen.command == "run":
        os.execvp("nsenter", cluster.inside(*rest))
    if chosen.command in ("build", "up") and rest not in ([], ["--control-plane-only"]):
        raise Failure(f"{' '.join(rest)} is not known")
    if chosen.command == "build":
        parts.build(bool(rest))
    elif chosen.command == "load-image":
        name, *files = rest
        cluster.load(images.archive(name, [pathlib.Path(file).resolve() for file in files]))
    elif chosen.command == "images":
        if len(rest) != 2 or rest[0] != "--bins":
            raise Failure("say where the programs are: images --bins target/debug")
        cluster.images(pathlib.Path(rest[1]).resolve())
    elif chosen.command == "status":
        cluster.status()
    elif chosen.command == "stop":
        cluster.stop(rest[0])
    elif chosen.command == "start":
        cluster.bring(rest[0])
    else:
        with open(f"/tmp/penstock-cluster-{chosen.name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cluster.up(bool(rest)) if chosen.command == "up" else cluster.down()
        if chosen.command == "down":
            os.unlink(f"/tmp/penstock-cluster-{chosen.name}.lock")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(str(failure))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))} ended with {error.returncode}")
