"""Uninstalled, as the documentation says: pods go on, and nothing of Penstock is left once they have been made anew."""

import json

from world import SPACE, SYSTEM, Failure

UNINSTALL = "penstock uninstall --crds | kubectl delete --ignore-not-found -f -"
# What there may be of us, and how it is told.
KINDS = "namespaces,clusterroles,clusterrolebindings,crds,mutatingwebhookconfigurations,validatingwebhookconfigurations,apiservices"
HOME = "deployments,services,configmaps,secrets,leases,roles,rolebindings,serviceaccounts,networkpolicies,poddisruptionbudgets"


def left(world):
    """What is there that is ours, by its label or its name."""
    found = json.loads(world.kubectl("get", f"{KINDS},{HOME}", "-A", "-o", "json").stdout)["items"]
    ours = []
    for one in found:
        metadata = one["metadata"]
        named = "penstock" in metadata["name"] or metadata["name"].endswith("penstock.io") or metadata.get("namespace") == SYSTEM
        if named or metadata.get("labels", {}).get("app.kubernetes.io/part-of") == "penstock":
            ours.append(f"{one['kind']} {metadata.get('namespace', '')}/{metadata['name']}")
    return ours


def it_is_uninstalled_and_pods_go_on(world):
    before = {pod["metadata"]["name"] for pod in world.pods("app")}
    with world.load("an uninstallation"):
        said = world.shell(UNINSTALL)
        world.until("its namespace is gone", lambda: world.kubectl("get", "namespace", SYSTEM, check=False).returncode != 0)
    # Who uninstalls is told whose sidecars remain.
    if SPACE not in said.stderr or "rollout restart" not in said.stderr:
        raise Failure(f"who uninstalls is not told whose sidecars remain: {said.stderr}")
    if {pod["metadata"]["name"] for pod in world.pods("app")} != before:
        raise Failure("pods went with it")


def nothing_of_it_is_left_once_pods_are_made_anew(world):
    world.kubectl("label", "namespace", SPACE, "penstock.io/inject-")
    world.kubectl("-n", SPACE, "rollout", "restart", "deployment,statefulset")
    world.rolled_out("client", "digits-v1", "digits-v2", "statefulset/shards")
    world.until("the old pods are gone", lambda: not world.get("pods", "-l", "penstock.io/injected=true")["items"])
    for pod in world.pods("app"):
        if "initContainers" in pod["spec"]:
            raise Failure(f"{pod['metadata']['name']} still has a sidecar")
    world.ask(world.pod("app=client"), "http://digits/v2/models/digits/infer", "/request/digits.json")
    remains = left(world)
    if remains:
        raise Failure(f"these are left: {', '.join(remains)}")


STORIES = [it_is_uninstalled_and_pods_go_on, nothing_of_it_is_left_once_pods_are_made_anew]
