"""The objects that stories make: a model server in two versions, and who asks it. Nothing in them knows of Penstock, but for annotations
that a story is about."""

import json

import programs
from world import SPACE, version

# In each request. No byte string of a ciphertext is like it, so whoever finds it on the wire reads plaintext.
MARKER = "digits-asked-in-team-a-0c1d6e52"
DIGIT = [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0, 0, 3, 15, 2, 0, 11, 8, 0, 0, 4, 12, 0, 0, 8, 8, 0]
DIGIT += [0, 5, 8, 0, 0, 9, 8, 0, 0, 4, 11, 0, 1, 12, 7, 0, 0, 2, 14, 5, 10, 12, 0, 0, 0, 0, 6, 13, 10, 0, 0, 0]


def asked(rows):
    return {"id": MARKER, "inputs": [{"name": "image", "shape": [rows, 64], "datatype": "FP32", "data": DIGIT * rows}]}



def namespace(name=SPACE, inject=True):
    labels = {"penstock.io/inject": "enabled"} if inject else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def stand(name, *line):
    return {"name": name, "image": programs.PAUSE, "command": ["/usr/local/bin/stand", *line]}


def account(name, space=SPACE):
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": space}}


def workload(kind, name, labels, pod, replicas=1, annotations=None, space=SPACE, **more):
    template = {"metadata": {"labels": labels, "annotations": annotations or {}}, "spec": pod}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template} | more
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name, "namespace": space}, "spec": spec}


def server(number, *line, **more):
    """The pod of a model server that has one version of the digits."""
    container = {
        "name": "server",
        "image": f"penstock.io/modelserver:{version()}",
        "args": ["--repository=/models", f"--only=digits:{number}", "--listen=0.0.0.0:8000", "--log-level=warn", *line],
        "ports": [{"name": "http", "containerPort": 8000}],
        "readinessProbe": {"httpGet": {"port": "http", "path": "/v2/health/ready"}, "periodSeconds": 1},
    }
    return {"serviceAccountName": f"digits-v{number}", "containers": [container | more.pop("container", {})]} | more


def servers(number, replicas):
    labels = {"app": "digits", "version": f"v{number}"}
    return workload("Deployment", f"digits-v{number}", labels, server(number), replicas)


# As in manifests/examples/digits: an inference changes nothing on the server, so an answer that was lost may be asked for again. Without it a
# POST that meets an application which closes its connection at that moment fails (docs/RELIABILITY.md): who knows whether it was read.
RETRY = {"penstock.io/retry": "attempts=2,on=502+503+504,budget=20%,buffer=64Ki"}


def service(name, selector, annotations=RETRY, space=SPACE, **more):
    ports = [{"name": "http", "port": 80, "targetPort": 8000, "appProtocol": "http"}]
    metadata = {"name": name, "namespace": space, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": selector, "ports": ports} | more}


def client(space=SPACE):
    """Somebody to ask from, with the requests in files."""
    volume = {"name": "request", "configMap": {"name": "request"}}
    container = stand("client", "pause") | {"volumeMounts": [{"name": "request", "mountPath": "/request"}]}
    pod = {"serviceAccountName": "client", "terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [volume]}
    return workload("Deployment", "client", {"app": "client"}, pod, space=space)


def requests(space=SPACE):
    metadata = {"name": "request", "namespace": space}
    # 64 rows are 16 KiB, from which on a sidecar has shared memory for them.
    data = {"digits.json": json.dumps(asked(1)), "rows.json": json.dumps(asked(64))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def job(name):
    """A Job that asks the model once, and ends."""
    volume = {"name": "request", "configMap": {"name": "request"}}
    line = ["get", "http://digits/v2/models/digits/infer", "/request/digits.json"]
    container = stand("client", *line) | {"volumeMounts": [{"name": "request", "mountPath": "/request"}]}
    pod = {"restartPolicy": "Never", "serviceAccountName": "client", "containers": [container], "volumes": [volume]}
    spec = {"backoffLimit": 0, "template": {"metadata": {"labels": {"app": name}}, "spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


def route(weights):
    """An HTTPRoute that shares the Service out."""
    backends = [{"name": name, "port": 80, "weight": weight} for name, weight in weights.items()]
    parents = [{"group": "", "kind": "Service", "name": "digits", "port": 80}]
    metadata = {"name": "digits", "namespace": SPACE}
    spec = {"parentRefs": parents, "rules": [{"backendRefs": backends}]}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": metadata, "spec": spec}
