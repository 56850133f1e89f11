"""The shape of a pod with a GPU: sidecar and model server share memory, and tensors are handed over in it.

The GPU is SIMULATED: a number on the node, as Kubernetes' documentation has one advertise an extended resource. What is tried is what the
injector does with a pod that asks for one, and that both containers really meet in that memory.
"""

import json
import re

import workloads
from world import SPACE, Failure

NAME = "digits-gpu"


def advertised(world):
    """One GPU more than there is."""
    patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "1"}]
    world.kubectl("patch", "node", "node", "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}")
    allocatable = lambda: json.loads(world.kubectl("get", "node", "node", "-o", "json").stdout)["status"]["allocatable"]
    world.until("the kubelet takes the SIMULATED GPU up", lambda: allocatable().get("nvidia.com/gpu") == "1")


def a_pod_with_a_gpu_hands_tensors_over_in_shared_memory(world):
    advertised(world)
    # Its own account and name, so that nothing of other stories is disturbed.
    pod = workloads.server(2, "--shared-memory", container={"resources": {"limits": {"nvidia.com/gpu": "1"}}})
    labels = {"app": NAME}
    batched = workloads.RETRY | {"penstock.io/batch": "max=256"}
    world.cluster.apply(workloads.workload("Deployment", NAME, labels, pod), workloads.service(NAME, labels, batched))
    world.rolled_out(NAME)
    (made,) = world.pods(f"app={NAME}")
    spec = made["spec"]
    volume = next((one for one in spec["volumes"] if one.get("emptyDir", {}).get("medium") == "Memory"), None)
    if volume is None:
        raise Failure(f"the pod has no memory to share: {[one['name'] for one in spec['volumes']]}")
    for container in [spec["initContainers"][1], spec["containers"][0]]:
        if not any((one["name"], one["mountPath"]) == (volume["name"], "/dev/shm") for one in container["volumeMounts"]):
            raise Failure(f"{container['name']} does not mount {volume['name']} at /dev/shm")
    with world.load("tensors to a pod with a GPU, SIMULATED", f"http://{NAME}/v2/models/digits/infer", rate=5, file="rows.json"):
        world.until("tensors are handed over in shared memory", lambda: placed(world, made) > 0, 30)
    world.log(f"    {placed(world, made):.0f} executions had their tensors in shared memory")
    world.kubectl("-n", SPACE, "delete", "deployment,service", NAME)


def placed(world, pod):
    found = re.search(r"^penstock_executions_placed_total (\S+)$", world.metrics(pod), re.MULTILINE)
    return float(found.group(1)) if found else 0


STORIES = [a_pod_with_a_gpu_hands_tensors_over_in_shared_memory]
