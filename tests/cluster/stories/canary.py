"""Another version comes to users step by step, and goes back by itself when it is worse; control is restarted and killed meanwhile."""

import collections
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import threading
import time

import parts
import workloads
from stories.control import holder, settled
from world import SYSTEM, Failure, Load

SPACE = "shop"
# Of each: together they ask a hundred times a second, which is what the bound below is promised for.
CLIENTS, RATE = 2, 50
# From a candidate that fails 20 % of its requests to a weight of 0 on every proxy.
BOUND = 3.0


# The objects.


def versions(name, *numbered):
    """A Service, and for each of its versions another one with a Deployment: name, pod, replicas. The first is what the Service selects."""
    first = {"app": name, "version": numbered[0][0]}
    objects = [workloads.service(name, first, space=SPACE), workloads.account(name, SPACE)]
    for version, pod, replicas in numbered:
        labels = {"app": name, "version": version}
        pod = pod | {"serviceAccountName": name}
        objects.append(workloads.service(version, labels, space=SPACE))
        objects.append(workloads.workload("Deployment", version, labels, pod, replicas, space=SPACE))
    return objects


def server(failing=0):
    """The pod of a server that answers with its name; on SIGUSR1 so many of a hundred requests begin to fail."""
    container = workloads.stand("server", "serve", ":8000", str(failing)) | {
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"port": "http"}, "periodSeconds": 1},
    }
    return {"terminationGracePeriodSeconds": 5, "containers": [container]}


def canary(name, stable, candidate, steps, **more):
    spec = {"service": name, "stable": stable, "candidate": candidate, "steps": steps, "promotion": "2s"} | more
    metadata = {"name": name, "namespace": SPACE}
    return {"apiVersion": "penstock.io/v1alpha1", "kind": "Canary", "metadata": metadata, "spec": spec}


# Asking.


class Diary:
    """Every status of a Canary that the API server had, as they came: nothing that happened is missed between two looks."""

    def __init__(self, world, name):
        self.seen = []
        line = [str(parts.program("kubectl")), "-n", SPACE, "get", "canary", name, "-o", "json", "--watch"]
        self.process = subprocess.Popen(line, env=world.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        text, decoder = "", json.JSONDecoder()
        for line in self.process.stdout:
            text += line
            # An object ends where a line begins with a brace.
            if line.startswith("}"):
                self.seen.append(decoder.decode(text).get("status", {}))
                text = ""

    def last(self):
        return self.seen[-1] if self.seen else {}

    def end(self):
        self.process.terminate()
        self.process.wait()
        self.thread.join()

    def weights(self):
        """Where it went, one after the other."""
        found = []
        for entry in self.last().get("history", []):
            if not found or found[-1] != entry["weight"]:
                found.append(entry["weight"])
        return found

    def every_weight_was_acknowledged(self):
        """At the end of each weight every proxy that it concerns had it, and it was known since when."""
        for weight in self.weights():
            of = [status for status in self.seen if status.get("course", {}).get("weight") == weight]
            whole = lambda status: 0 < status["concerned"] == status["applied"] and status.get("appliedSince")
            if not any(map(whole, of)) or not of[-1].get("appliedSince"):
                told = [(status["phase"], status["applied"], status["concerned"]) for status in of]
                raise Failure(f"{weight} % was left and not every proxy had it: {told}")


@contextlib.contextmanager
def followed(world, name, *objects):
    """Makes a Canary, with what else is to be, and follows it until the body ends."""
    world.cluster.apply(*objects)
    diary = Diary(world, name)
    try:
        yield diary
    finally:
        diary.end()


def penstock(world, line, status=0):
    """A command of `penstock canary`, and how it has to end."""
    said = world.shell(f"penstock canary --context penstock-test {line}", check=False)
    if said.returncode != status:
        raise Failure(f"penstock canary {line}: exit status {said.returncode} and not {status}\n{said.stdout}{said.stderr}")
    return said.stdout


def phase(world, diary, name, patience=60):
    world.until(f"it is {name}", lambda: diary.last().get("phase") == name, patience)
    return diary.last()


def at(world, diary, weight, more=lambda status: True):
    here = lambda status: status.get("course", {}).get("weight") == weight and status["phase"] == "Progressing"
    world.until(f"it is at {weight} %", lambda: here(diary.last()) and more(diary.last()), 60)


def moment(text):
    """A time of a status, or of the load (with nanoseconds), in seconds."""
    return datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()


def address(world, service):
    """Whoever asks by address is not disturbed by the cluster's DNS, which stumbles when eight pods start on a machine of two cores."""
    return f"http://{world.get('service', service, space=SPACE)['spec']['clusterIP']}"


@contextlib.contextmanager
def loads(world, what, service, path="", rate=RATE, file=None, may_fail=""):
    """Requests from every client while the body runs; which of them failed and may not is a Failure. Yields a list, for what came back."""
    url, outcomes = address(world, service) + path, []
    clients = [pod["metadata"]["name"] for pod in world.pods("app=client", SPACE)]
    running = [Load(world, pod, url, rate, file, SPACE) for pod in clients]
    try:
        time.sleep(1)
        yield outcomes
        time.sleep(1)
    finally:
        outcomes += [load.end() for load in running]
    asked = sum(outcome["requests"] for outcome in outcomes)
    failed = sum((collections.Counter(outcome["failed"]) for outcome in outcomes), collections.Counter())
    wrong = {why: count for why, count in failed.items() if not (may_fail and may_fail in why)}
    longest = max(outcome["longest_ms"] for outcome in outcomes)
    world.log(f"    {what}: {asked} requests of {len(clients)} clients, {sum(failed.values())} failed, the longest took {longest:.0f} ms")
    if wrong:
        raise Failure(f"{what}: {json.dumps(wrong, indent=2)}, first {[outcome['first'] for outcome in outcomes]}")
    if not all(outcome["requests"] for outcome in outcomes):
        raise Failure(f"{what}: nothing was asked")
    if not may_fail:
        world.asked += asked


def answered_by(outcomes):
    """How many requests each version answered. A pod is called after its Deployment."""
    found = {}
    for outcome in outcomes:
        for answer, count in outcome["answers"].items():
            version = re.sub(r"-[a-z0-9]+-[a-z0-9]{5}\s*$", "", answer)
            found[version] = found.get(version, 0) + count
    return found


def share(world, version, service):
    """Which part of some requests a version answers."""
    pod = world.pod("app=client", SPACE)
    outcome = json.loads(world.inside(pod, "/usr/local/bin/stand", "load", address(world, service), "1", "50", space=SPACE))
    if outcome["failed"]:
        raise Failure(f"{outcome['failed']}")
    found = answered_by([outcome])
    return found.get(version, 0) / sum(found.values())


# The tales.


def a_canary_takes_over_while_control_is_rolled_out_and_its_own_pods_are_scaled(world):
    world.cluster.apply(workloads.namespace(SPACE), workloads.account("client", SPACE), workloads.requests(SPACE))
    clients = workloads.client(SPACE)
    clients["spec"]["replicas"] = CLIENTS
    world.cluster.apply(clients, *versions("cart", ("cart-v1", server(), 2), ("cart-v2", server(failing=20), 2)))
    world.rolled_out("client", "cart-v1", "cart-v2", space=SPACE)
    steps = [{"weight": 10, "hold": "3s"}, {"weight": 50, "hold": "6s"}, {"weight": 90, "hold": "3s"}]
    made = canary("cart", "cart-v1", "cart-v2", steps, analysis={"minRequests": 20})
    with loads(world, "a canary to its end", "cart") as outcomes, followed(world, "cart", made) as diary:
        at(world, diary, 50)
        world.kubectl("-n", SYSTEM, "rollout", "restart", "deployment", "penstock-control")
        world.kubectl("-n", SPACE, "wait", "--for=condition=Succeeded", "canary/cart", "--timeout=90s")
        phase(world, diary, "Succeeded")
        settled(world)
        for replicas in (8, 2):
            world.kubectl("-n", SPACE, "scale", "deployment", "cart-v2", f"--replicas={replicas}")
            world.rolled_out("cart-v2", space=SPACE)
        world.until("six pods are gone", lambda: len(world.get("pods", "-l", "version=cart-v2", space=SPACE)["items"]) == 2)
    diary.every_weight_was_acknowledged()
    if diary.weights() != [10, 50, 90, 100] or diary.last()["concerned"] != CLIENTS:
        raise Failure(f"it went {diary.weights()}, and concerned {diary.last()['concerned']} proxies")
    versions_seen = answered_by(outcomes)
    if set(versions_seen) != {"cart-v1", "cart-v2"}:
        raise Failure(f"answered by {versions_seen}")
    heading, line = world.kubectl("-n", SPACE, "get", "canaries").stdout.splitlines()
    world.log(f"    {heading}\n    {line}")
    if heading.split() != ["NAME", "SERVICE", "CANDIDATE", "DEPLOYMENT", "PHASE", "WEIGHT", "APPLIED", "CONCERNED", "MESSAGE", "AGE"]:
        raise Failure(heading)
    if line.split()[:7] != ["cart", "cart", "cart-v2", "Succeeded", "100", str(CLIENTS), str(CLIENTS)]:
        raise Failure(line)
    for line, wanted in [("list", "Succeeded"), ("show shop/cart", "100 % to cart-v2")]:
        if wanted not in penstock(world, line):
            raise Failure(f"penstock canary {line}: {penstock(world, line)}")
    world.log("    " + penstock(world, "watch cart").rstrip().replace("\n", "\n    "))


def a_canary_that_fails_is_sent_nothing_within_seconds_though_the_leader_was_killed(world):
    """The same Service, from a new beginning: another `run`."""
    steps = [{"weight": 20, "hold": "3s"}, {"weight": 50, "hold": "2m"}]
    made = canary("cart", "cart-v1", "cart-v2", steps, run="again")
    pods = world.pods("version=cart-v2", SPACE)
    servers = [process for pod in pods for process in world.processes("stand", pod) if serves(process)]
    if len(servers) != 2:
        raise Failure(f"the candidate has {len(servers)} servers")
    with loads(world, "a canary that goes back", "cart", may_fail="cart-v2-") as outcomes, followed(world, "cart", made) as diary:
        at(world, diary, 20)
        leader = holder(world)
        (process,) = world.processes("penstock-control", world.get("pod", leader, space=SYSTEM))
        killed = time.monotonic()
        os.kill(process, signal.SIGKILL)
        at(world, diary, 50, lambda status: status.get("candidate", {}).get("requests", 0) > 150)
        took = time.monotonic() - killed
        world.log(f"    {leader} held the Lease and was killed at 20 %; {holder(world)} went on, {took:.0f} s later at 50 %")
        command = ["bash", "-c", "penstock canary --context penstock-test watch cart"]
        watching = subprocess.Popen(command, env=world.environment, stdout=subprocess.PIPE, text=True)
        time.sleep(1)
        began = time.time()
        for process in servers:
            os.kill(process, signal.SIGUSR1)
        told, _ = watching.communicate(timeout=60)
        status = phase(world, diary, "RolledBack")
        time.sleep(3)
    back = next(moment(entry["at"]) for entry in reversed(status["history"]) if entry["phase"] == "RolledBack")
    reached = [moment(at) for outcome in outcomes for became, at in outcome["last"].items() if "cart-v2-" in became]
    failed = sum(count for outcome in outcomes for count in outcome["failed"].values())
    world.log(f"    {status['message']}")
    world.log(f"    from the fault to a weight of 0 on every proxy: {back - began:.2f} s, and {failed} requests failed")
    world.log(f"    the last request that reached it: after {max(reached) - began:.2f} s")
    if back - began > BOUND or max(reached) > back:
        raise Failure(f"{BOUND} s are promised, and no request after: {began} {back} {sorted(reached)}")
    if status["course"]["weight"] != 0 or not status["concerned"] or status["applied"] != status["concerned"]:
        raise Failure(json.dumps(status))
    if not failed or "success rate of shop/cart-v2" not in status["message"]:
        raise Failure(f"{failed} failed, and it went back because of: {status['message']}")
    if watching.returncode != 1 or "RolledBack" not in told:
        raise Failure(f"penstock canary watch: exit status {watching.returncode}\n{told}")
    events = lambda: world.get("events", "--field-selector=involvedObject.name=cart,reason=RolledBack", space=SPACE)["items"]
    event = world.until("an Event says why", events)[-1]
    if "success rate of shop/cart-v2" not in event["message"] or event["type"] != "Warning":
        raise Failure(f"{event['type']} {event['message']}")
    settled(world)


def serves(process):
    with open(f"/proc/{process}/cmdline", "rb") as line:
        return b"serve" in line.read().split(b"\0")


def blue_and_green_are_exchanged_when_a_person_says_so(world):
    world.cluster.apply(*versions("till", ("till-blue", server(), 1), ("till-green", server(), 1)))
    world.rolled_out("till-blue", "till-green", space=SPACE)
    steps = [{"weight": 0, "hold": "0s", "pause": True}, {"weight": 100, "hold": "5s"}]
    testers = [{"headers": [{"name": "x-tester", "value": "yes"}]}]
    made = canary("till", "till-blue", "till-green", steps, match=testers)
    with loads(world, "blue and green", "till") as outcomes, followed(world, "till", made) as diary:
        status = phase(world, diary, "Paused")
        if "penstock canary promote" not in status["message"]:
            raise Failure(status["message"])
        client = world.pod("app=client", SPACE)
        for header, version in [("x-tester:yes", "till-green"), ("x-tester:no", "till-blue")]:
            for _ in range(5):
                said = world.inside(client, "/usr/local/bin/stand", "get", "-H", header, address(world, "till"), space=SPACE)
                if not said.startswith(version):
                    raise Failure(f"{header} is answered by {said}")
        if share(world, "till-green", "till") != 0:
            raise Failure("users see green, and nobody has let it go")
        penstock(world, "promote shop/till")
        penstock(world, "watch till")
        if share(world, "till-green", "till") != 1:
            raise Failure("users see blue still")
    if diary.last()["phase"] != "Succeeded" or diary.weights() != [0, 100]:
        raise Failure(json.dumps(diary.last()))
    diary.every_weight_was_acknowledged()
    if set(answered_by(outcomes)) != {"till-blue", "till-green"}:
        raise Failure(f"answered by {answered_by(outcomes)}")


def answers_of_a_shadow_are_compared_and_no_client_sees_them(world):
    """The digits in two versions, whose numbers differ, and then the first against itself."""
    model = lambda number: {key: value for key, value in workloads.server(number).items() if key != "serviceAccountName"}
    numbered = {"model-v1": 1, "model-v2": 2, "model-same": 1}
    world.cluster.apply(*versions("model", *((name, model(number), 1) for name, number in numbered.items())))
    world.rolled_out("model-v1", "model-v2", "model-same", space=SPACE)
    steps = [{"weight": 0, "shadow": 100, "hold": "6s"}]
    shadow = {"agreement": 99, "minCompared": 50}
    made = canary("model", "model-v1", "model-v2", steps, shadow=shadow)
    ask = ("model", "/v2/models/digits/infer", 10, "digits.json")
    with loads(world, "a shadow that answers otherwise", *ask) as outcomes, followed(world, "model", made) as diary:
        status = phase(world, diary, "RolledBack")
        time.sleep(2)
    world.log(f"    {status['message']}")
    if "agree" not in status["message"]:
        raise Failure(f"it went back for another reason: {status['message']}")
    stands_by_the_first(outcomes)
    same = made | {"spec": made["spec"] | {"candidate": "model-same"}}
    with loads(world, "a shadow that agrees", *ask) as outcomes, followed(world, "model", same) as diary:
        status = phase(world, diary, "Succeeded")
    shadows = [status["shadow"] for status in diary.seen if status.get("shadow", {}).get("compared", 0) >= 50]
    if not shadows or shadows[-1]["agreement"] < 99 or not shadows[-1]["compared"]:
        raise Failure(f"it went on without enough that agreed: {shadows}")
    last = shadows[-1]
    world.log(f"    {last['compared']} compared, {last['agreement']} % agree, largest difference {last.get('largestDifference')}")
    if diary.weights()[-2:] != [0, 100]:
        raise Failure(f"it went {diary.weights()}")
    stands_by_the_first(outcomes)


def stands_by_the_first(outcomes):
    """Every answer is of the first version."""
    answers = {answer for outcome in outcomes for answer in outcome["answers"]}
    if not answers or not all('"model_version":"1"' in answer for answer in answers):
        raise Failure(f"a client saw {answers}")


STORIES = [
    a_canary_takes_over_while_control_is_rolled_out_and_its_own_pods_are_scaled,
    a_canary_that_fails_is_sent_nothing_within_seconds_though_the_leader_was_killed,
    blue_and_green_are_exchanged_when_a_person_says_so,
    answers_of_a_shadow_are_compared_and_no_client_sees_them,
]
