"""What stories lean on: the cluster, the programs that are installed on it, and words to ask and to wait with."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.request

import parts
import programs
from parts import Failure

SPACE = "team-a"
SYSTEM = "penstock-system"
# Far more than any single step takes on a machine that does nothing else.
PATIENCE = 90
# A look costs a process of kubectl, on a machine that has two cores for everything.
LOOK = 0.5


class Load:
    """Requests from a pod, from now until `ended`. It is started through containerd and not through the API, which goes on
    while the API server is away."""

    number = itertools.count(1)

    def __init__(self, world, pod, url, rate, file, space=SPACE):
        self.world, self.rate = world, rate
        self.container = world.container(pod, "client", space)
        self.name = f"load-{next(self.number)}-{os.getpid()}"
        line = ["/usr/local/bin/stand", "load", url, "3600", str(rate), *([f"/request/{file}"] if file else [])]
        command = world.cluster.inside("ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", self.name, self.container, *line)
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self):
        """Ends it, and answers what came back."""
        ask = ("ctr", "-n", "k8s.io", "tasks", "kill", "--exec-id", self.name, "--signal", "SIGTERM", self.container)
        subprocess.run(self.world.cluster.inside(*ask), capture_output=True, check=False)
        out, errors = self.process.communicate(timeout=PATIENCE)
        if self.process.returncode != 0 or not out:
            raise Failure(f"the load did not end well: {errors.strip()}")
        return json.loads(out)


class World:
    """A cluster with Penstock on it."""

    def __init__(self, cluster, bins, log=print):
        self.cluster, self.bins, self.log = cluster, pathlib.Path(bins), log
        self.kubectl = cluster.kubectl
        self.environment = os.environ | {
            "KUBECONFIG": str(cluster.kubeconfig),
            "PATH": f"{self.bins}:{parts.folder()}:{os.environ['PATH']}",
        }
        # How many requests all loads together have asked.
        self.asked = 0

    # Asking.

    def shell(self, line, check=True):
        """A command as it is in the documentation, with `penstock` and `kubectl` in the PATH."""
        run = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, check=False, env=self.environment
        )
        if check and run.returncode != 0:
            raise Failure(f"{line}: exit status {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-3000:]}")
        return run

    def get(self, *what, space=SPACE):
        return json.loads(self.kubectl("-n", space, "get", *what, "-o", "json").stdout)

    def pods(self, selector, space=SPACE):
        """The pods that are there and not on their way out."""
        found = self.get("pods", "-l", selector, space=space)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def pod(self, selector, space=SPACE):
        return self.pods(selector, space)[0]["metadata"]["name"]

    def until(self, what, holds, patience=PATIENCE):
        """What `holds` answers once that is something; `holds` may fail meanwhile."""
        began, trouble = time.monotonic(), ""
        while True:
            try:
                seen = holds()
                if seen:
                    self.waited(what, began)
                    return seen
            except (Failure, KeyError, IndexError, json.JSONDecodeError) as error:
                trouble = f": {error}"
            if time.monotonic() > began + patience:
                raise Failure(f"{what}: not within {patience} s{trouble}")
            time.sleep(LOOK)

    def waited(self, what, began):
        """Tells of long waits, so that a slow story tells why it is."""
        took = time.monotonic() - began
        if took > 10:
            self.log(f"    {took:.0f} s until {what}")

    def rolled_out(self, *names, space=SPACE):
        for name in names:
            name, began = name if "/" in name else f"deployment/{name}", time.monotonic()
            self.kubectl("-n", space, "rollout", "status", name, f"--timeout={PATIENCE}s")
            self.waited(f"{name} is rolled out", began)

    def container(self, pod, name, space=SPACE):
        """The number of a container, as containerd knows it."""
        status = self.get("pod", pod, space=space)["status"]
        for one in status.get("initContainerStatuses", []) + status["containerStatuses"]:
            if one["name"] == name:
                return one["containerID"].removeprefix("containerd://")
        raise Failure(f"pod {pod} has no container {name}")

    def inside(self, pod, *line, container="client", space=SPACE):
        """What a command in a pod prints."""
        return self.kubectl("-n", space, "exec", pod, "-c", container, "--", *line).stdout

    def ask(self, pod, url, body=None):
        return self.inside(pod, "/usr/local/bin/stand", "get", url, *([body] if body else []))

    def processes(self, program, pod):
        """The processes of a program in a pod, by the machine's numbers: the cgroups of its containers have the pod's uid."""
        uid, found = pod["metadata"]["uid"], []
        for folder in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError):
                if folder.name.isdigit() and uid in (folder / "cgroup").read_text(encoding="utf-8"):
                    if pathlib.Path(os.readlink(folder / "exe")).name == program:
                        found.append(int(folder.name))
        return found

    # Of the proxies.

    def metrics(self, pod):
        """What a pod's proxy counts; asked on the node, where pods are reached."""
        url = f"http://{pod['status']['podIP']}:15020/metrics"
        line = [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen({url!r}, timeout=5).read().decode())"]
        run = subprocess.run(self.cluster.inside(*line), capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise Failure(f"{url}: {run.stderr.strip().splitlines()[-1]}")
        return run.stdout

    @contextlib.contextmanager
    def api(self, of="svc/penstock-control"):
        """Control's API, as the documentation says that it is reached; answers the URL."""
        line = [str(parts.program("kubectl")), "-n", SYSTEM, "port-forward", of, ":8080"]
        forward = subprocess.Popen(line, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            told = forward.stdout.readline()
            found = re.search(r"127\.0\.0\.1:(\d+)", told)
            if not found:
                raise Failure(f"no way to control's API: {told}")
            yield f"http://127.0.0.1:{found.group(1)}"
        finally:
            forward.terminate()
            forward.wait()

    def each_replica(self, path, method="GET"):
        """What each replica of control answers: it speaks for the proxies that are connected to it."""
        said = []
        for pod in self.pods("app.kubernetes.io/component=control", SYSTEM):
            with self.api(f"pod/{pod['metadata']['name']}") as api:
                asked = urllib.request.Request(api + path, method=method)
                said.append(urllib.request.urlopen(asked, timeout=30).read().decode())
        return said

    # Load.

    @contextlib.contextmanager
    def load(self, what, url="http://digits/v2/models/digits/infer", rate=40, file="digits.json"):
        """Requests while the body runs; afterwards all of them have to be answered."""
        load = Load(self, self.pod("app=client"), url, rate, file)
        try:
            # Before, between, after: what is disturbed has to have been undisturbed.
            time.sleep(1)
            yield
            time.sleep(1)
        finally:
            outcome = load.end()
        self.asked += outcome["requests"]
        failed = sum(outcome["failed"].values())
        self.log(f"    {what}: {outcome['requests']} requests, {failed} failed, the longest took {outcome['longest_ms']:.0f} ms")
        if failed:
            raise Failure(f"{what}: {failed} of {outcome['requests']} failed: {json.dumps(outcome['failed'], indent=2)}, first {outcome['first']}")
        if outcome["requests"] == 0:
            raise Failure(f"{what}: nothing was asked")

    # When something is wrong.

    def last_words(self):
        """What programs said last, for whoever has to find out."""
        said = [self.kubectl("get", "pods", "-A", "-o", "wide", check=False).stdout]
        said.append(self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp", check=False).stdout[-3000:])
        for space, selector, container in [
            (SYSTEM, "app.kubernetes.io/component=control", "control"),
            (SPACE, "penstock.io/injected=true", "penstock-proxy"),
            ("default", "app=flagger", "flagger"),
        ]:
            options = ("--prefix", "--tail=15", "--max-log-requests=50", "-c", container)
            said.append(self.kubectl("-n", space, "logs", "-l", selector, *options, check=False).stdout[-8000:])
        return "\n".join(said)


def version():
    """The workspace's."""
    text = (parts.HERE / "../../Cargo.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1)


__all__ = ["Failure", "Load", "World", "SPACE", "SYSTEM", "PATIENCE", "programs", "version"]
