"""Installed by two commands, and pods that get their sidecars by a label."""

import json
import re

import parts
import workloads
from world import SPACE, SYSTEM, Failure

INSTALL = "penstock install | kubectl apply -f -"


def readme():
    """The commands of the README's quick start on Kubernetes, in their two blocks, word for word."""
    text = (parts.HERE / "../../README.md").read_text(encoding="utf-8")
    section = text[text.index("## On Kubernetes") :].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [[line.split("  #")[0].strip() for line in block.splitlines()] for block in blocks]


def problems(world):
    """What `penstock check` finds wrong, by name."""
    with world.api() as api:
        said = world.shell(f"penstock check --control {api} --output json", check=False)
    checks = json.loads(said.stdout)
    return checks, {one["name"]: one["found"] for one in checks if one["verdict"] == "problem"}


def it_is_installed_by_two_commands(world):
    world.cluster.gateway_api()
    commands = readme()[0]
    if commands != ["penstock check --pre", INSTALL]:
        raise Failure(f"the README has other commands: {commands}")
    for command in commands:
        world.shell(command)
    world.rolled_out("penstock-control", space=SYSTEM)


def its_own_checks_find_nothing_wrong(world):
    checks, wrong = problems(world)
    if wrong:
        raise Failure(f"penstock check: {wrong}")
    # A cluster of one node gets warnings of it; every other one is of something that is not as it should be.
    known = {"room for two replicas", "spread", "other injectors", "proxies connected"}
    warned = {one["name"]: one["found"] for one in checks if one["verdict"] == "warning" and one["name"] not in known}
    if warned:
        raise Failure(f"penstock check warns: {warned}")
    world.log(f"    {len(checks)} checks")


def the_readmes_quick_start_does_what_it_says(world):
    said = [(command, world.shell(command).stdout) for command in readme()[1]]
    (pods,) = [text for command, text in said if command.startswith("kubectl get pods")]
    if [line.split()[1] for line in pods.splitlines()[1:]] != ["2/2"] * 5:
        raise Failure(pods)
    before, after = [json.loads(text) for command, text in said if "stand load" in command]
    versions = lambda outcome: {number for number in (1, 2) for answer in outcome["answers"] if f'"model_version":"{number}"' in answer}
    if before["failed"] or after["failed"] or (versions(before), versions(after)) != ({1}, {1, 2}):
        raise Failure(f"before {before}, after {after}")
    world.shell("kubectl config set-context --current --namespace=default; kubectl delete namespace models --wait=false")


def a_label_gives_pods_their_sidecars(world):
    names = ("client", "digits-v1", "digits-v2")
    world.cluster.apply(workloads.namespace(), *map(workloads.account, names), workloads.requests())
    world.cluster.apply(
        workloads.service("digits", {"app": "digits"}),
        *(workloads.service(f"digits-v{n}", {"app": "digits", "version": f"v{n}"}) for n in (1, 2)),
        *(workloads.servers(n, replicas=2) for n in (1, 2)),
        workloads.client(),
        workloads.workload("StatefulSet", "shards", {"app": "shards"}, workloads.server(1), serviceName="shards"),
    )
    world.rolled_out(*names, "statefulset/shards")
    pods = world.get("pods")["items"]
    if len(pods) != 6:
        raise Failure(f"{len(pods)} pods, and 6 were asked for")
    for pod in pods:
        name, spec = pod["metadata"]["name"], pod["spec"]
        containers = [one["name"] for one in spec["initContainers"] + spec["containers"]]
        if containers[:2] != ["penstock-init", "penstock-proxy"] or pod["metadata"]["labels"]["penstock.io/injected"] != "true":
            raise Failure(f"{name} has {containers}")
        if "token" in str(spec["containers"][0].get("volumeMounts", [])).replace("serviceaccount", ""):
            raise Failure(f"{name}: the application mounts the sidecar's token")


def each_pod_has_the_identity_of_its_account(world):
    # Each replica asks the sidecars that are connected to it.
    known = world.each_replica("/certs")
    named = set(re.findall(r"spiffe://[^\"\\]+", " ".join(known)))
    wanted = {f"spiffe://cluster.local/ns/{SPACE}/sa/{name}" for name in ("client", "digits-v1", "digits-v2")}
    if not wanted <= named:
        raise Failure(f"control knows of {sorted(named)}")
    answer = json.loads(world.ask(world.pod("app=client"), "http://digits/v2/models/digits/infer", "/request/digits.json"))
    logits = answer["outputs"][0]["data"]
    if logits.index(max(logits)) != 0:
        raise Failure(f"the model did not see a zero: {answer}")


STORIES = [
    it_is_installed_by_two_commands,
    its_own_checks_find_nothing_wrong,
    the_readmes_quick_start_does_what_it_says,
    a_label_gives_pods_their_sidecars,
    each_pod_has_the_identity_of_its_account,
]
