"""Control that restarts, dies, is upgraded, has no API server to ask, or another root: requests go on."""

import base64
import datetime
import json
import os
import re
import signal
import time

import images
import parts
from stories import traffic
from stories.begin import INSTALL, problems
from world import SPACE, SYSTEM, Failure, version

CONTROL = "app.kubernetes.io/component=control"
# How long the API server stays away. PENSTOCK_OUTAGE=300 is what is promised, and is tried by hand.
OUTAGE = int(os.environ.get("PENSTOCK_OUTAGE", "30"))
# Certificates live so long while the root is rotated, since the old root stays until the last of them has expired.
LEAF_SECONDS = 30


def holder(world):
    return world.get("lease", "penstock-control", space=SYSTEM)["spec"].get("holderIdentity")


def settled(world):
    """All replicas are ready, one of them leads, and a new pod gets its sidecar."""
    world.rolled_out("penstock-control", space=SYSTEM)
    names = lambda: [pod["metadata"]["name"] for pod in world.pods(CONTROL, SYSTEM)]
    world.until("a replica that runs holds the Lease", lambda: holder(world) in names())


def connected(world):
    """Every sidecar has a configuration stream."""
    for pod in world.pods("penstock.io/injected=true"):
        name = pod["metadata"]["name"]
        open_streams = lambda pod=pod: re.findall(r'^penstock_control_connected\{stream="(\w+)"\} 1$', world.metrics(pod), re.MULTILINE)
        world.until(f"{name} is connected to control", lambda ask=open_streams: set(ask()) == {"fleet", "xds"})


def control_restarts_and_no_request_notices(world):
    with world.load("a restart of control"):
        world.kubectl("-n", SYSTEM, "rollout", "restart", "deployment", "penstock-control")
        settled(world)
        connected(world)


def a_holder_of_the_lease_that_is_killed_is_followed_by_another(world):
    before = holder(world)
    pod = world.get("pod", before, space=SYSTEM)
    (process,) = world.processes("penstock-control", pod)
    with world.load("a control that is killed"):
        killed = time.time()
        os.kill(process, signal.SIGKILL)
        # The kubelet starts it again at once, under the same name; the other replica may have the Lease once it has run out.
        after = world.until("the Lease is renewed again", lambda: renewed_since(world, killed + 1))
        world.log(f"    held by {before}, then by {after}, {time.time() - killed:.0f} s later")
        settled(world)
        connected(world)
    # A pod is injected, whoever leads now.
    world.kubectl("-n", SPACE, "rollout", "restart", "deployment", "client")
    world.rolled_out("client")


def renewed_since(world, moment):
    """Who has renewed the Lease since then. Its times are UTC, with microseconds."""
    spec = world.get("lease", "penstock-control", space=SYSTEM)["spec"]
    renewed = datetime.datetime.fromisoformat(spec["renewTime"]).timestamp()
    return renewed > moment and spec["holderIdentity"]


def control_is_upgraded_under_load(world):
    """From the build before. That is this same build under another tag: what is tried is the exchange and not the difference."""
    following = f"{version()}-next"
    for name in ("control", "proxy"):
        world.cluster.load(images.archive(f"penstock.io/{name}:{following}", [world.bins / f"penstock-{name}"]))
    with world.load("an upgrade of control and then of all sidecars"):
        world.shell("penstock install --crds-only | kubectl apply -f -")
        world.shell(INSTALL.replace("install", f"install --tag {following}"))
        settled(world)
        connected(world)
        world.kubectl("-n", SPACE, "rollout", "restart", "deployment", "digits-v1", "digits-v2")
        world.rolled_out("digits-v1", "digits-v2")
    used = {one["image"] for pod in world.pods("app=digits") for one in pod["spec"]["initContainers"]}
    if used != {f"penstock.io/proxy:{following}"}:
        raise Failure(f"new pods have {used}")


def expiries(world):
    found = {}
    for pod in world.pods("penstock.io/injected=true"):
        (line,) = re.findall(r"^penstock_certificate_expiry_seconds(?:\{.*\})? (\S+)$", world.metrics(pod), re.MULTILINE)
        found[pod["metadata"]["name"]] = float(line)
    return found


def the_api_server_goes_away_and_nothing_is_lost(world):
    before = expiries(world)
    with world.load(f"{OUTAGE} s without an API server, and what comes after", traffic.by_address(world)):
        world.cluster.stop("kube-apiserver", signal.SIGKILL)
        time.sleep(OUTAGE)
        world.cluster.bring("kube-apiserver")
        settled(world)
        connected(world)
        if expiries(world) != before:
            raise Failure("certificates are others than before")
        # What is changed now is in force as ever, though Kubernetes counts the node as away until its kubelet has spoken again.
        traffic.a_share_of_traffic_is_shifted_by_an_annotation(world)
        world.kubectl("-n", SPACE, "annotate", "service", "digits", "penstock.io/traffic-split-")
        world.until("penstock check finds nothing wrong", lambda: not problems(world)[1])


def anchors(world):
    secret = world.get("secret", "penstock-ca", space=SYSTEM)
    return base64.b64decode(secret["data"]["ca.crt"]).decode()


def the_root_is_replaced_under_load(world):
    """With certificates that live for less than a minute, as the old root stays until the last one of it has expired."""
    patch = [{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": f"--leaf-lifetime={LEAF_SECONDS}s"}]
    world.kubectl("-n", SYSTEM, "patch", "deployment", "penstock-control", "--type=json", f"--patch={json.dumps(patch)}")
    settled(world)
    connected(world)
    # Those of 12 h are exchanged: each replica asks its own proxies.
    world.each_replica("/renew", method="POST")
    soon = lambda: all(moment < time.time() + LEAF_SECONDS + 5 for moment in expiries(world).values())
    world.until("every sidecar has a short-lived certificate", soon)
    old = anchors(world)
    with world.load("another root"):
        said = world.shell("penstock rotate-root")
        world.log("    " + said.stderr.strip().replace("\n", "\n    "))
    new = anchors(world)
    if old in new or new == old or new.count("BEGIN CERTIFICATE") != 1:
        raise Failure(f"the anchors are {new.count('BEGIN CERTIFICATE')}, the old one among them: {old in new}")
    map_in_pods = world.get("configmap", "penstock-anchors")["data"]["anchors.pem"]
    if map_in_pods.strip() != new.strip():
        raise Failure("the ConfigMap that pods mount has other anchors")
    # A new pod knows the new root alone, and is answered by those that were there before.
    world.kubectl("-n", SPACE, "rollout", "restart", "deployment", "client")
    world.rolled_out("client")
    world.ask(world.pod("app=client"), "http://digits/v2/models/digits/infer", "/request/digits.json")
    world.shell(INSTALL)
    settled(world)


STORIES = [
    control_restarts_and_no_request_notices,
    a_holder_of_the_lease_that_is_killed_is_followed_by_another,
    control_is_upgraded_under_load,
    the_api_server_goes_away_and_nothing_is_lost,
    the_root_is_replaced_under_load,
]
