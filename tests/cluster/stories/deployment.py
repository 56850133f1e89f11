"""A Deployment is changed, and Kubernetes waits until its Canary lets it go on; another change is worse, goes back, and is undone."""

import os
import signal

import workloads
from stories.canary import CLIENTS, SPACE, at, followed, loads, penstock, phase, serves, server
from world import Failure

REPLICAS = 3
GATE = "penstock.io/promoted"
STEPS = [{"weight": 20, "hold": "3s"}, {"weight": 30, "hold": "6s"}]


def crane(change, failing=0):
    """A Deployment that is what it was but for an annotation of its pods; a surge of one."""
    pod = server(failing) | {"serviceAccountName": "crane"}
    surge = {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    labels, written = {"app": "crane"}, {"change": str(change)}
    return workloads.workload("Deployment", "crane", labels, pod, REPLICAS, written, SPACE, strategy=surge)


def canary():
    spec = {"service": "crane", "deployment": "crane", "steps": STEPS, "promotion": "2s", "analysis": {"minRequests": 20}}
    metadata = {"name": "crane", "namespace": SPACE}
    return {"apiVersion": "penstock.io/v1alpha1", "kind": "Canary", "metadata": metadata, "spec": spec}


def condition(pod, kind):
    found = [one["status"] for one in pod["status"].get("conditions", []) if one["type"] == kind]
    return found[0] if found else None


def by_template(world):
    """The pods that are not on their way out, by their ReplicaSets."""
    found = {}
    for pod in world.pods("app=crane", SPACE):
        found.setdefault(pod["metadata"]["ownerReferences"][0]["name"], []).append(pod)
    return found


def reached_by_the_service(world):
    """The ReplicaSets to whose pods Kubernetes itself sends requests."""
    slices = world.get("endpointslices", "-l", "kubernetes.io/service-name=crane", space=SPACE)["items"]
    endpoints = [one for part in slices for one in part["endpoints"] if one["conditions"]["ready"]]
    return {one["targetRef"]["name"].rsplit("-", 1)[0] for one in endpoints}


def template(status, version):
    return status["course"][version].removesuffix(".template")


def a_change_of_a_deployment_is_a_canary_for_which_kubernetes_waits(world):
    # The node has no room for what the tales before this one have made.
    world.kubectl("-n", SPACE, "delete", "canaries,deployments", "--all")
    world.cluster.apply(workloads.namespace(SPACE), workloads.account("client", SPACE), workloads.requests(SPACE))
    clients = workloads.client(SPACE)
    clients["spec"]["replicas"] = CLIENTS
    made = [workloads.service("crane", {"app": "crane"}, space=SPACE), workloads.account("crane", SPACE), crane(1)]
    world.cluster.apply(clients, *made)
    world.rolled_out("client", "crane", space=SPACE)
    with loads(world, "a change of a Deployment", "crane") as outcomes, followed(world, "crane", canary()) as diary:
        world.until("it waits for a change", lambda: "waits for a change" in diary.last().get("message", ""))
        old = template(diary.last(), "stable")
        world.cluster.apply(crane(2))
        at(world, diary, 20)
        new = template(diary.last(), "candidate")
        pods = by_template(world)
        if (len(pods[old]), len(pods[new])) != (REPLICAS, 1):
            raise Failure(f"Kubernetes has gone on: {[(name, len(some)) for name, some in pods.items()]}")
        (held,) = pods[new]
        if (condition(held, "ContainersReady"), condition(held, "Ready"), condition(held, GATE)) != ("True", "False", "False"):
            raise Failure(f"{held['status']['conditions']}")
        if reached_by_the_service(world) != {old}:
            raise Failure(f"the Service leads to {reached_by_the_service(world)}")
        phase(world, diary, "Succeeded", 150)
        world.until("every proxy knows that it is over", lambda: diary.last()["applied"] == diary.last()["concerned"] == CLIENTS)
        world.rolled_out("crane", space=SPACE)
        world.log("    " + penstock(world, "show crane").splitlines()[0])
    if diary.weights() != [0, 20, 30, 100]:
        raise Failure(f"it went {diary.weights()}")
    status = diary.last()
    if template(status, "stable") != new:
        raise Failure(f"{status}")
    pods = by_template(world)
    if list(pods) != [new] or {condition(pod, "Ready") for pod in pods[new]} != {"True"}:
        raise Failure(f"{[(name, len(some)) for name, some in pods.items()]}")
    # The pods of the first template were there before the Canary, and none of them had a gate.
    answered = {answer.strip().rsplit("-", 1)[0] for outcome in outcomes for answer in outcome["answers"]}
    if answered != {old, new}:
        raise Failure(f"answered by {answered}")


def a_change_that_fails_is_held_until_it_is_undone(world):
    old = template(world.get("canary", "crane", space=SPACE)["status"], "stable")
    with followed(world, "crane", canary()) as diary:
        world.cluster.apply(crane(3, failing=50))
        at(world, diary, 20)
        new = template(diary.last(), "candidate")
        (pod,) = by_template(world)[new]
        with loads(world, "a change that goes back", "crane", may_fail=new):
            at(world, diary, 30, lambda status: status.get("candidate", {}).get("requests", 0) > 50)
            for process in [one for one in world.processes("stand", pod) if serves(one)]:
                os.kill(process, signal.SIGUSR1)
            status = phase(world, diary, "RolledBack")
        world.log(f"    {status['message']}")
        if "kubectl rollout undo deployment/crane" not in status["message"]:
            raise Failure(status["message"])
        with loads(world, "after it went back", "crane") as outcomes:
            pods = by_template(world)
        answered = {answer.strip().rsplit("-", 1)[0] for outcome in outcomes for answer in outcome["answers"]}
        if answered != {old} or len(pods[old]) != REPLICAS or [condition(one, GATE) for one in pods[new]] != ["False"]:
            raise Failure(f"answered by {answered}, {[(name, len(some)) for name, some in pods.items()]}")
        with loads(world, "an undone change", "crane"):
            world.kubectl("-n", SPACE, "rollout", "undo", "deployment/crane")
            world.rolled_out("crane", space=SPACE)
            world.until("it is forgotten", lambda: template(diary.last(), "candidate") == old)
        if diary.last()["phase"] != "RolledBack":
            raise Failure(f"{diary.last()}")


def a_canary_that_is_deleted_holds_nobody_up(world):
    with followed(world, "crane", canary()) as diary:
        world.cluster.apply(crane(4))
        at(world, diary, 20)
        with loads(world, "a Canary that is deleted", "crane"):
            world.kubectl("-n", SPACE, "delete", "canary", "crane")
            world.rolled_out("crane", space=SPACE)
    world.kubectl("delete", "namespace", SPACE, "--wait=false")


STORIES = [
    a_change_of_a_deployment_is_a_canary_for_which_kubernetes_waits,
    a_change_that_fails_is_held_until_it_is_undone,
    a_canary_that_is_deleted_holds_nobody_up,
]
