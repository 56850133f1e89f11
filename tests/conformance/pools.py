"""The Inference Extension's conformance cases that make sense for a mesh, with a Service in the place of its Gateway.

Its own suite cannot be run: it waits for Gateways first, and asks through them (docs/conformance/README.md). So these are our words for its cases,
each under the name that it has there. The pools' pods answer with their names.
"""

import json
import pathlib
import subprocess

import parts
import workloads
from world import Failure

INFERENCE = "sigs.k8s.io/gateway-api-inference-extension@v1.1.0"
GROUP, SPACE = "inference.networking.k8s.io", "pools"
GATEWAYS = ("primary-parent", "secondary-parent")
POOLS = ("primary", "secondary")
# 200 requests of which 70 % go to the first: outside of 0.56 and 0.82 once in 10,000 times. The suite allows itself as much.
SHARE, TOLERANCE = 0.7, 0.14


def definitions():
    """The definition of an InferencePool, as its module has it."""
    found = subprocess.run([parts.go(), "mod", "download", "-json", INFERENCE], cwd=parts.HERE, capture_output=True, text=True, check=True)
    return pathlib.Path(json.loads(found.stdout)["Dir"]) / f"config/crd/bases/{GROUP}_inferencepools.yaml"


def servers(name):
    container = workloads.stand("server", "serve", ":3000") | {
        "ports": [{"containerPort": 3000}],
        "readinessProbe": {"httpGet": {"port": 3000, "path": "/"}, "periodSeconds": 1},
    }
    pod = {"containers": [container], "terminationGracePeriodSeconds": 1}
    return workloads.workload("Deployment", name, {"app": name}, pod, replicas=2, space=SPACE)


def pool(name):
    # The picker is not there, and is not asked: each proxy picks by itself.
    picker = {"name": "nobody", "port": {"number": 9002}}
    spec = {"selector": {"matchLabels": {"app": name}}, "targetPorts": [{"number": 3000}], "endpointPickerRef": picker}
    return {"apiVersion": f"{GROUP}/v1", "kind": "InferencePool", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


def parent(name):
    """What stands in a Gateway's place: a Service without pods of its own."""
    spec = {"ports": [{"name": "http", "port": 80, "appProtocol": "http"}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


def rule(path, **pools):
    """A rule that sends a path to pools, by weight; a weight and a port where it is a pair."""
    backends = []
    for name, weight in pools.items():
        weight, port = weight if isinstance(weight, tuple) else (weight, None)
        backends.append({"group": GROUP, "kind": "InferencePool", "name": name, "weight": weight} | ({"port": port} if port else {}))
    return {"matches": [{"path": {"type": "PathPrefix", "value": path}}], "backendRefs": backends}


def route(name, *rules, of=GATEWAYS[0]):
    spec = {"parentRefs": [{"group": "", "kind": "Service", "name": of}], "rules": list(rules)}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


class Case:
    """Words for a case: routes that are made for it, and what is seen of them."""

    def __init__(self, world):
        self.world, self.made = world, []

    def add(self, *routes):
        self.world.cluster.apply(*routes)
        self.made += [one["metadata"]["name"] for one in routes]

    def remove(self, *names):
        self.world.kubectl("-n", SPACE, "delete", "httproute", *names)
        self.made = [name for name in self.made if name not in names]

    def end(self):
        """Takes all of it away, and waits until pools have forgotten it, so that the next case sees nothing of this one."""
        if self.made:
            self.remove(*self.made)
        for name in POOLS:
            self.world.until(f"{name} has no parents", lambda name=name: not self.conditions("inferencepool", name), 30)

    def conditions(self, kind, name):
        """By parent, the conditions: type to status and reason."""
        status = self.world.get(kind, name, space=SPACE).get("status", {})
        of = lambda entry: {one["type"]: (one["status"], one["reason"]) for one in entry["conditions"]}
        ours = [entry for entry in status.get("parents", []) if entry["controllerName"] == "penstock.io/control"]
        return {entry["parentRef"]["name"]: of(entry) for entry in ours}

    def has(self, kind, name, of=GATEWAYS[0], **wanted):
        holds = lambda: all(self.conditions(kind, name)[of].get(which) == so for which, so in wanted.items())
        self.world.until(f"{kind} {name} has {wanted} of {of}", holds, 30)

    def accepted(self, routes, pools, of=GATEWAYS[0]):
        for name in routes:
            self.has("httproute", name, of, Accepted=("True", "Accepted"), ResolvedRefs=("True", "ResolvedRefs"))
        for name in pools:
            self.has("inferencepool", name, of, Accepted=("True", "Accepted"), ResolvedRefs=("True", "ResolvedRefs"))

    def load(self, path, of=GATEWAYS[0], rate=40):
        """What a second of requests comes to: by pool, and by failure."""
        line = ["/usr/local/bin/stand", "load", f"http://{of}{path}", "1" if rate == 40 else "2", str(rate)]
        said = json.loads(self.world.kubectl("-n", SPACE, "exec", "deployment/client", "-c", "client", "--", *line).stdout)
        counts = {}
        for pod, count in said["answers"].items():
            name = pod.rsplit("-", 2)[0]
            counts[name] = counts.get(name, 0) + count
        return counts, said["failed"]

    def reaches(self, path, name, of=GATEWAYS[0]):
        def holds():
            counts, failed = self.load(path, of)
            return not failed and set(counts) == {name}

        self.world.until(f"{of}{path} is answered by {name}", holds, 30)


def InferencePoolAccepted(case):
    case.add(route("accepted", rule("/", primary=1)))
    case.accepted(["accepted"], ["primary"])


def HTTPRouteInvalidInferencePoolRef(case):
    case.add(route("nowhere", rule("/", absent=1)))
    case.has("httproute", "nowhere", Accepted=("True", "Accepted"), ResolvedRefs=("False", "BackendNotFound"))


def InferencePoolHTTPRoutePortValidation(case):
    """The port of a reference to a pool is not looked at: the pool knows its own."""
    ports = {"unspecified": None, "matching": 3000, "other": 8888}
    case.add(*(route(name, rule(f"/{name}", primary=(1, port))) for name, port in ports.items()))
    case.accepted(ports, ["primary"])
    for name in ports:
        case.reaches(f"/{name}", "primary")


def HTTPRouteMultipleRulesDifferentPools(case):
    case.add(route("two-rules", *(rule(f"/{name}", **{name: 1}) for name in POOLS)))
    case.accepted(["two-rules"], POOLS)
    for name in POOLS:
        case.reaches(f"/{name}", name)


def HTTPRouteMultipleGatewaysDifferentPools(case):
    pairs = list(zip(GATEWAYS, POOLS))
    case.add(*(route(name, rule("/", **{name: 1}), of=of) for of, name in pairs))
    for of, name in pairs:
        case.accepted([name], [name], of)
        case.reaches("/", name, of)


def GatewayWeightedAcrossTwoInferencePools(case):
    case.add(route("weighted", rule("/", primary=70, secondary=30)))
    case.accepted(["weighted"], POOLS)

    def holds():
        counts, failed = case.load("/", rate=100)
        total = sum(counts.values())
        return not failed and set(counts) == set(POOLS) and abs(counts["primary"] / total - SHARE) <= TOLERANCE

    case.world.until("7 of 10 requests go to the first pool", holds, 30)


def InferencePoolResolvedRefsCondition(case):
    """A pool knows the parents that lead to it, and forgets them."""
    case.add(*(route(of, rule("/", primary=1), of=of) for of in GATEWAYS))
    for of in GATEWAYS:
        case.accepted([of], ["primary"], of)
        case.reaches("/", "primary", of)
    first, second = GATEWAYS
    case.remove(first)
    case.world.until("the pool has one parent", lambda: set(case.conditions("inferencepool", "primary")) == {second}, 30)
    case.reaches("/", "primary", second)
    case.remove(second)
    case.world.until("the pool has no parents", lambda: not case.conditions("inferencepool", "primary"), 30)
    case.world.until("nobody reaches it", lambda: not case.load("/", second)[0], 30)


CASES = [
    InferencePoolAccepted,
    HTTPRouteInvalidInferencePoolRef,
    InferencePoolHTTPRoutePortValidation,
    HTTPRouteMultipleRulesDifferentPools,
    HTTPRouteMultipleGatewaysDifferentPools,
    GatewayWeightedAcrossTwoInferencePools,
    InferencePoolResolvedRefsCondition,
]


def run(world):
    """All of them; answers how many failed."""
    client = workloads.workload("Deployment", "client", {"app": "client"}, {"containers": [workloads.stand("client", "pause")]}, space=SPACE)
    world.cluster.apply(workloads.namespace(SPACE), client, *map(servers, POOLS), *map(pool, POOLS), *map(parent, GATEWAYS))
    world.rolled_out("client", *POOLS, space=SPACE)
    failed = 0
    for story in CASES:
        case = Case(world)
        try:
            story(case)
            print(f"ok      {story.__name__}", flush=True)
        except (Failure, KeyError, ValueError) as error:
            failed += 1
            print(f"FAILED  {story.__name__}: {error}", flush=True)
        finally:
            case.end()
    print(f"inference extension, a Service in a Gateway's place: {len(CASES) - failed} passed, {failed} failed", flush=True)
    return failed
