"""What passes between pods is TLS 1.3 and nothing else."""

import json
import tempfile

import wire
import workloads
from world import Failure

ASKED = "http://digits-v1/v2/models/digits/infer"
PLAIN = "plain"


def asked(world, space, seen):
    """The connections between a new client and the servers of a namespace, as the node sees them."""
    pods = [pod for pod in world.get("pods", space=space)["items"] if "deletionTimestamp" not in pod["metadata"]]
    client = next(pod for pod in pods if pod["metadata"]["labels"]["app"] == "client")
    servers = {pod["status"]["podIP"] for pod in pods if pod["metadata"]["labels"]["app"] == "digits"}
    # A client without a sidecar speaks to the Service's address, which the node exchanges behind the cable.
    servers.add(world.get("service", "digits-v1", space=space)["spec"]["clusterIP"])
    with wire.captured(world.cluster, client["status"]["podIP"], seen):
        line = ("/usr/local/bin/stand", "get", ASKED.replace("digits-v1", f"digits-v1.{space}"), "/request/digits.json")
        for _ in range(3):
            answer = world.kubectl("-n", space, "exec", client["metadata"]["name"], "-c", "client", "--", *line).stdout
    if json.loads(answer)["id"] != workloads.MARKER:
        raise Failure(f"another answer: {answer}")
    found = wire.flows(seen)
    return {key: data for key, data in found.items() if {key[0], key[2]} & servers}


def without_the_mesh_the_node_reads_everything(world):
    """So that what is not found below would have been."""
    world.cluster.apply(workloads.namespace(PLAIN, inject=False), workloads.requests(PLAIN))
    world.cluster.apply(*(workloads.account(name, PLAIN) for name in ("client", "digits-v1")))
    server = workloads.servers(1, 1)
    server["metadata"]["namespace"] = PLAIN
    world.cluster.apply(server, workloads.service("digits-v1", {"app": "digits"}, space=PLAIN), workloads.client(PLAIN))
    world.rolled_out("digits-v1", "client", space=PLAIN)
    with tempfile.NamedTemporaryFile() as seen:
        found = asked(world, PLAIN, seen.name)
    if not any(workloads.MARKER.encode() in data for data in found.values()):
        raise Failure("the capture does not see plaintext where there is some, so it proves nothing")


def between_pods_of_the_mesh_there_is_tls_1_3_and_nothing_else(world):
    # New connections, so that their beginning is seen: a client that has just started has none.
    world.kubectl("-n", "team-a", "delete", "pod", "-l", "app=client", "--wait=true")
    world.rolled_out("client")
    with tempfile.NamedTemporaryFile() as seen:
        found = asked(world, "team-a", seen.name)
        whole = b"".join(wire.packets(seen.name))
    if workloads.MARKER.encode() in whole or b"/v2/models" in whole:
        raise Failure("a request was on the wire in plaintext")
    hellos = []
    for (source, port, target, to), data in found.items():
        try:
            kinds = list(wire.records(data))
        except ValueError as error:
            raise Failure(f"{source}:{port} to {target}:{to}: {error}") from error
        hellos += [wire.chosen_version(content) for kind, content in kinds if kind == wire.HANDSHAKE and content[0] == wire.SERVER_HELLO]
        if not any(kind == wire.APPLICATION_DATA for kind, _ in kinds):
            raise Failure(f"{source}:{port} to {target}:{to}: no encrypted byte in {len(data)}")
    if not hellos or set(hellos) != {wire.TLS_1_3}:
        raise Failure(f"{len(found)} directions, and the servers chose {hellos}")
    world.log(f"    {len(hellos)} handshakes, {sum(map(len, found.values()))} bytes in {len(found)} directions")


def who_is_not_in_the_mesh_is_refused(world):
    """The other namespace's client has no sidecar and no identity."""
    client = world.pod("app=client", space=PLAIN)
    line = ("/usr/local/bin/stand", "get", ASKED.replace("digits-v1", "digits-v1.team-a"), "/request/digits.json")
    said = world.kubectl("-n", PLAIN, "exec", client, "-c", "client", "--", *line, check=False)
    if said.returncode == 0 or "403" not in said.stderr:
        raise Failure(f"it was answered: {said.stdout}{said.stderr}")
    world.kubectl("delete", "namespace", PLAIN, "--wait=false")


STORIES = [
    without_the_mesh_the_node_reads_everything,
    between_pods_of_the_mesh_there_is_tls_1_3_and_nothing_else,
    who_is_not_in_the_mesh_is_refused,
]
