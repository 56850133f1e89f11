"""Shares that are shifted, and pods that come and go under load."""

import json

import workloads
from world import SPACE, Failure


def by_address(world):
    """The model by the Service's address: needs no DNS, which Kubernetes takes away while it counts the node of its pod as away."""
    return f"http://{world.get('service', 'digits')['spec']['clusterIP']}/v2/models/digits/infer"


def answers(world, client):
    """What about 200 requests are answered, by its beginning, which has the version."""
    line = f"load {by_address(world)} 2 100 /request/digits.json"
    outcome = json.loads(world.inside(client, "/usr/local/bin/stand", *line.split()))
    if outcome["failed"] or outcome["requests"] < 100:
        raise Failure(f"{outcome}")
    return outcome["answers"]


def shares(world, client):
    """Which part of them the second version answers."""
    found = answers(world, client)
    return sum(count for answer, count in found.items() if '"model_version":"2"' in answer) / sum(found.values())


def shifted(world, what, change, wanted):
    """Makes a change and waits until requests are shared so. 200 draws of one in ten are within 0.03 and 0.19 but once in 10,000 times."""
    client = world.pod("app=client")
    change()
    near = lambda: abs(shares(world, client) - wanted) <= (0 if wanted in (0, 1) else 0.1)
    world.until(f"{what}: {wanted:.0%} for the second version", near, 30)


def a_share_of_traffic_is_shifted_by_an_annotation(world):
    def split(first, second):
        text = f"penstock.io/traffic-split=digits-v1={first},digits-v2={second}"
        return lambda: world.kubectl("-n", SPACE, "annotate", "--overwrite", "service", "digits", text)

    for first, second in [(100, 0), (90, 10), (50, 50), (0, 100)]:
        shifted(world, f"{first}:{second}", split(first, second), second / 100)


def a_route_of_the_gateway_api_shares_traffic_too(world):
    for first, second in [(1, 0), (1, 3)]:
        apply = lambda first=first, second=second: world.cluster.apply(workloads.route({"digits-v1": first, "digits-v2": second}))
        shifted(world, f"{first}:{second}", apply, second / (first + second))
    world.kubectl("-n", SPACE, "delete", "httproute", "digits")
    world.kubectl("-n", SPACE, "annotate", "service", "digits", "penstock.io/traffic-split-")
    # Neither is left: the Service's own pods, and whoever of them answers soonest.
    world.until("the Service's own pods answer", lambda: sum(answers(world, world.pod("app=client")).values()) > 100)


def scaling_from_two_to_eight_and_back_fails_no_request(world):
    scale = lambda replicas: world.kubectl("-n", SPACE, "scale", "deployment", "digits-v2", f"--replicas={replicas}")
    with world.load("2 to 8 and back"):
        scale(8)
        world.rolled_out("digits-v2")
        scale(2)
        world.until("six pods are gone", lambda: len(world.get("pods", "-l", "version=v2")["items"]) == 2)


def a_rollout_fails_no_request(world):
    with world.load("a rollout of both versions"):
        world.kubectl("-n", SPACE, "rollout", "restart", "deployment", "digits-v1", "digits-v2")
        world.rolled_out("digits-v1", "digits-v2")
        world.until("the old pods are gone", lambda: len(world.get("pods", "-l", "app=digits")["items"]) == 4)


def a_job_with_a_sidecar_ends(world):
    world.cluster.apply(workloads.job("ask-once"))
    world.kubectl("-n", SPACE, "wait", "--for=condition=Complete", "job/ask-once", "--timeout=60s")
    pod = world.get("pods", "-l", "app=ask-once")["items"][0]
    sidecar = next(one for one in pod["status"]["initContainerStatuses"] if one["name"] == "penstock-proxy")
    if pod["status"]["phase"] != "Succeeded" or sidecar["state"]["terminated"]["exitCode"] != 0:
        raise Failure(f"the pod is {pod['status']['phase']}, and its sidecar {sidecar['state']}")
    if world.processes("penstock-proxy", pod):
        raise Failure("the sidecar runs on")
    said = world.kubectl("-n", SPACE, "logs", "job/ask-once", "-c", "client").stdout
    if json.loads(said)["id"] != workloads.MARKER:
        raise Failure(f"the Job was answered {said}")
    world.kubectl("-n", SPACE, "delete", "job", "ask-once")


STORIES = [
    a_share_of_traffic_is_shifted_by_an_annotation,
    a_route_of_the_gateway_api_shares_traffic_too,
    scaling_from_two_to_eight_and_back_fails_no_request,
    a_rollout_fails_no_request,
    a_job_with_a_sidecar_ends,
]
