"""A real Flagger moves a model's weights through its HTTPRoute, and reads our metrics from a real Prometheus.

A tale of its own (mesh.py --tale flagger), on a cluster that has Penstock's images. All of it runs in pods, with the rights that their own
manifests give them: Flagger's controller and its definitions are from the module in ../flagger, Prometheus is Debian's, and what is
applied beside them is manifests/examples/flagger, word for word but for an image and a namespace.
"""

import json
import pathlib
import re
import shutil
import subprocess
import time

import images
import parts
import workloads
from stories import begin
from world import SPACE, SYSTEM, Failure, Load

MODULE, AT = "github.com/fluxcd/flagger", parts.HERE / "flagger"
EXAMPLE = parts.HERE / "../../manifests/examples/flagger"
# Where Flagger's own manifests put it.
HOME = "default"
CANARY, ROUTE = "canary.flagger.app/digits", "httproute/digits"
# Flagger looks every 10 s; a canary that succeeds takes about ten looks, and pods have to start in between.
WHOLE = 300
RATE = 40


def flagger():
    """Flagger's controller, made once for its version, and its version."""
    number = parts.required(MODULE, AT / "go.mod")
    made = parts.cache() / f"flagger-{number}" / "flagger"
    with parts.locked(f"flagger-{number}"):
        if not made.exists():
            parts.compile_go(f"{MODULE}/cmd/flagger", made, at=AT)
    return made, number


def prometheus():
    found = shutil.which("prometheus")
    if not found:
        raise Failure("programs are missing: apt-get install --no-install-recommends prometheus")
    return pathlib.Path(found)


def artifacts():
    """The manifests that Flagger is installed by, from its module."""
    found = subprocess.run([parts.go(), "mod", "download", "-json", MODULE], cwd=AT, capture_output=True, text=True, check=True)
    return pathlib.Path(json.loads(found.stdout)["Dir"]) / "artifacts/flagger"


def controller(world, number):
    """Flagger's own Deployment, with our image."""
    made = json.loads(world.kubectl("create", "--dry-run=client", "-o", "json", f"--filename={artifacts() / 'deployment.yaml'}").stdout)
    container = made["spec"]["template"]["spec"]["containers"][0]
    container["image"] = f"penstock.io/flagger:{number}"
    # Theirs is "./flagger", where their image begins.
    container["command"][0] = "flagger"
    container["command"] += ["-mesh-provider=gatewayapi:v1", "-metrics-server=http://prometheus.monitoring:9090"]
    for probe in ("livenessProbe", "readinessProbe"):
        # Its own are commands, and nothing but the controller is in the image.
        container[probe] = {"httpGet": {"port": "http", "path": "/healthz"}}
    return made


# What is looked at.


def looked(world):
    """How far Flagger is, and what it has written: primary's weight and the candidate's. One look, since looks are what takes time."""
    found = {one["kind"]: one for one in world.get(CANARY, ROUTE)["items"]}
    (rule,) = found["HTTPRoute"]["spec"]["rules"]
    backends = {backend["name"]: backend["weight"] for backend in rule["backendRefs"]}
    return found["Canary"]["status"]["phase"], (backends["digits-primary"], backends["digits-canary"])


def in_force(world):
    """The weights by which the client's sidecar shares requests out, from that sidecar itself."""
    page = json.loads(world.ask(world.pod("app=client"), "http://127.0.0.1:15000/config"))
    (rule,) = page["services"][f"{SPACE}/digits"]["rules"]
    found = {backend["service"]: backend["weight"] for backend in rule["backends"]}
    return found[f"{SPACE}/digits-primary"], found[f"{SPACE}/digits-canary"]


def counted(world, metric="penstock_requests_total"):
    """What the client's sidecar has counted of primary and of the candidate."""
    page = world.metrics(world.pods("app=client")[0])
    line = rf'^{metric}\{{direction="outbound",service="{SPACE}/digits",backend="{SPACE}/digits-%s",.*\}} (\d+)$'
    return tuple(sum(map(int, re.findall(line % name, page, re.MULTILINE))) for name in ("primary", "canary"))


def phase(world):
    return world.get(CANARY)["status"]["phase"]


def events(world):
    found = world.get("events", "--field-selector=involvedObject.name=digits,involvedObject.kind=Canary")["items"]
    return [one["message"] for one in sorted(found, key=lambda one: one["metadata"]["creationTimestamp"])]


def changed(world, *line):
    """Gives the model server other arguments: a new version, as Flagger sees it."""
    patch = [{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": list(line)}]
    world.kubectl("-n", SPACE, "patch", "deployment", "digits", "--type=json", f"--patch={json.dumps(patch)}")


def followed(world, wanted, longest=0):
    """Follows a canary to its end. Answers its steps: weights that Flagger wrote, how many seconds after that they were seen in force in the
    client's sidecar, and what that sidecar sent to each version while they were. Requests take up to `longest` seconds."""
    steps, until = [], time.monotonic() + WHOLE
    # Requests are counted when they are over, on a page that is up to a second old: what is read then was sent by these weights.
    settle = 1.5 + longest
    world.until("Flagger has seen the change", lambda: phase(world) in ("Progressing", wanted))
    while True:
        ended, now = looked(world)
        if not steps or steps[-1]["weights"] != now:
            began = time.monotonic()
            world.until(f"the client's sidecar has the weights {now}", lambda now=now: in_force(world) == now, 10)
            took = time.monotonic() - began
            time.sleep(settle)
            before = counted(world)
            steps.append({"weights": now, "seconds": took, "from": before, "to": before})
        else:
            count = counted(world)
            # Had they changed meanwhile, the last requests may have been shared otherwise.
            if in_force(world) == now:
                steps[-1]["to"] = count
        if ended not in ("Progressing", "Promoting", "Finalising"):
            break
        if time.monotonic() > until:
            raise Failure(f"the canary is {ended} after {WHOLE} s, weights {now}: {events(world)[-5:]}")
    if ended != wanted:
        raise Failure(f"the canary is {ended}, and not {wanted}: {events(world)[-8:]}")
    # The weights of its end stay.
    time.sleep(3)
    steps[-1]["to"] = counted(world)
    for step in steps:
        primary, candidate = (after - before for before, after in zip(step["from"], step["to"]))
        step["asked"], step["share"] = primary + candidate, candidate / max(primary + candidate, 1)
        world.log(f"    {step['weights'][1]:>3} %: {candidate} of {primary + candidate} requests to the candidate")
    return steps


def held(steps, wanted):
    """Flagger wrote these weights of the candidate, one after the other, and requests were shared so."""
    if [step["weights"] for step in steps] != [(100 - weight, weight) for weight in wanted]:
        raise Failure(f"Flagger wrote {[step['weights'] for step in steps]}, and not {wanted} for the candidate")
    for step in steps:
        share, wants = step["share"], step["weights"][1] / 100
        # Five times the deviation of so many draws: one run in a million is further off by chance.
        off = 5 * (wants * (1 - wants) / max(step["asked"], 1)) ** 0.5
        if abs(share - wants) > off:
            raise Failure(f"{share:.1%} of {step['asked']} requests went to the candidate, and {wants:.0%} were due")
        # Weights stay for ten seconds, of which looks on a busy machine take most.
        if wants and step["asked"] < 40:
            raise Failure(f"only {step['asked']} requests were counted at {wants:.0%}")


# The stories.


def flagger_and_a_prometheus_are_installed(world):
    program, number = flagger()
    world.cluster.load(images.archive(f"penstock.io/flagger:{number}", [program]))
    world.cluster.load(images.archive("penstock.io/prometheus:test", [prometheus()]))
    if world.kubectl("get", "namespace", SYSTEM, check=False).returncode != 0:
        begin.it_is_installed_by_two_commands(world)
    for file in ("crd.yaml", "account.yaml"):
        world.kubectl("apply", f"--filename={artifacts() / file}")
    monitoring = (EXAMPLE / "prometheus.yaml").read_text(encoding="utf-8")
    monitoring = re.sub(r"image: quay.io/prometheus/prometheus:\S+", "image: penstock.io/prometheus:test", monitoring)
    monitoring = monitoring.replace("sidecars.models", f"sidecars.{SPACE}")
    world.kubectl("apply", "--filename=-", stdin=monitoring)
    world.rolled_out("prometheus", space="monitoring")
    world.cluster.apply(controller(world, number))
    world.rolled_out("flagger", space=HOME)
    said = subprocess.run([prometheus(), "--version"], capture_output=True, text=True, check=True).stdout
    world.log(f"    Flagger {number}; {said.split(' (')[0]}")


def the_example_is_taken_up_by_both(world):
    world.cluster.apply(workloads.namespace(), workloads.account("client"), workloads.requests(), workloads.client())
    for file in ("metrics.yaml", "digits.yaml"):
        world.kubectl("-n", SPACE, "apply", f"--filename={EXAMPLE / file}")
    world.rolled_out("client")
    world.until("Flagger has made what is missing", lambda: phase(world) == "Initialized", WHOLE)
    conditions = lambda: {one["type"]: one["status"] for one in world.get(ROUTE)["status"]["parents"][0]["conditions"]}
    sound = {"Accepted": "True", "ResolvedRefs": "True", "Programmed": "True"}
    client = world.pod("app=client")
    answer = json.loads(world.ask(client, "http://digits/v2/models/digits/infer", "/request/digits.json"))
    if answer["model_version"] != "1":
        raise Failure(f"{answer}")
    # A sidecar holds what its pod has asked for, so only now does one have to acknowledge it.
    world.until("the route of Flagger is in force, and says so", lambda: conditions() == sound, 30)
    if in_force(world) != (100, 0):
        raise Failure(f"the weights in force are {in_force(world)}")


def a_version_that_is_well_is_brought_to_everybody(world):
    with world.load("a canary of Flagger that succeeds", rate=RATE):
        changed(world, "--repository=/models", "--only=digits:2", "--listen=0.0.0.0:8000")
        steps = followed(world, "Succeeded")
    held(steps, [0, 10, 50, 0])
    slowest = max(step["seconds"] for step in steps)
    world.log(f"    weights were seen in force within {slowest:.1f} s, by looks that take a process of kubectl each")
    answer = json.loads(world.ask(world.pod("app=client"), "http://digits/v2/models/digits/infer", "/request/digits.json"))
    if answer["model_version"] != "2":
        raise Failure(f"after the canary, primary answers {answer}")


def a_version_that_fails_is_taken_back_by_what_our_metrics_say(world):
    # SIMULATED: each inference takes a second, and only one more may wait. Whatever comes meanwhile is answered 503.
    slow = ("--delay-model=fixed=1s", "--queue=1")
    before = counted(world, "penstock_request_failures_total")
    load = Load(world, world.pod("app=client"), "http://digits/v2/models/digits/infer", RATE, "digits.json")
    try:
        changed(world, "--repository=/models", "--only=digits:2", "--listen=0.0.0.0:8000", *slow)
        # A second for its own, one for who waits before it, and as much again where it is tried anew.
        steps = followed(world, "Failed", longest=4)
    finally:
        outcome = load.end()
    held(steps, [0, 10, 0])
    # Counted when the page is made, once a second.
    time.sleep(1.5)
    of_primary, of_candidate = (after - at for at, after in zip(before, counted(world, "penstock_request_failures_total")))
    failed = sum(outcome["failed"].values())
    world.log(f"    {failed} of {outcome['requests']} requests failed; counted: {of_candidate} of the candidate, {of_primary} of primary")
    if (of_primary, of_candidate) != (0, failed) or not failed:
        raise Failure(f"not all of these failures are the candidate's, or there are none: {outcome['failed']}")
    halts = [message for message in events(world) if "Halt" in message and "success-rate" in message]
    if not halts or any("no values" in halt for halt in halts):
        raise Failure(f"Flagger did not roll back for what our metrics say: {events(world)[-8:]}")
    world.log(f"    Flagger: {halts[-1]}")
    with world.load("after a canary of Flagger was taken back", rate=RATE):
        time.sleep(3)
    # What failed on the way was the point.
    world.asked += outcome["requests"] - failed


STORIES = [
    flagger_and_a_prometheus_are_installed,
    the_example_is_taken_up_by_both,
    a_version_that_is_well_is_brought_to_everybody,
    a_version_that_fails_is_taken_back_by_what_our_metrics_say,
]
