"""Whether the cluster is one: python3 smoke.py [--name NAME]

Each check is what a part of Penstock, or of its tests, leans on. They guard the cluster, and say nothing of Penstock. Prints a line
for each; exit status 1 if one does not hold.
"""

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import time
import pathlib

import certificates
import parts
import programs
from cluster import Cluster
from parts import Failure

SPACE = "smoke"
# Far more than any of it takes.
PATIENCE = 60


def stand(*arguments, name="stand"):
    return {"name": name, "image": programs.PAUSE, "command": ["/usr/local/bin/stand", *arguments]}


def pod(name, *containers, labels=None, **spec):
    metadata = {"name": name, "namespace": SPACE, "labels": {"app": name} | (labels or {})}
    spec = {"terminationGracePeriodSeconds": 1, "containers": list(containers)} | spec
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def service(name, port, target):
    spec = {"selector": {"app": name}, "ports": [{"port": port, "targetPort": target}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


class Smoke:
    """A cluster, and the words to ask it with."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.kubectl = cluster.kubectl

    def get(self, *what):
        return json.loads(self.kubectl("-n", SPACE, "get", *what, "-o", "json").stdout)

    def create(self, thing):
        """The answer to a question that is asked by creating it."""
        return json.loads(self.kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(thing)).stdout)

    def ready(self, *names):
        self.kubectl("-n", SPACE, "wait", "--for=condition=Ready", f"--timeout={PATIENCE}s", *(f"pod/{name}" for name in names))

    def inside(self, name, *arguments):
        return self.kubectl("-n", SPACE, "exec", name, "-c", "stand", "--", "/usr/local/bin/stand", *arguments).stdout.strip()

    def until(self, what, holds):
        end = time.monotonic() + PATIENCE
        while True:
            seen = holds()
            if seen:
                return seen
            if time.monotonic() > end:
                raise Failure(f"{what}: not within {PATIENCE} s")
            time.sleep(0.2)

    # The checks, in the order in which they build on each other.

    def a_pod_runs_and_is_ready_by_its_probe(self):
        served = stand("serve", ":8080")
        served["readinessProbe"] = {"httpGet": {"port": 8080, "path": "/"}, "periodSeconds": 1}
        self.cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
            pod("server", served),
            pod("client", stand("pause")),
            service("server", 80, 8080),
        )
        self.ready("server", "client")

    def pods_reach_each_other_by_their_addresses(self):
        ip = self.get("pod", "server")["status"]["podIP"]
        assert self.inside("client", "get", f"http://{ip}:8080/") == "server"

    def a_service_leads_to_its_pods(self):
        ip = self.get("service", "server")["spec"]["clusterIP"]
        rules = self.cluster.run("nft", "list", "table", "ip", "kube-proxy", capture_output=True, text=True).stdout
        assert ip in rules, "kube-proxy wrote no rule of nftables for it"
        assert self.inside("client", "get", f"http://{ip}/") == "server"

    def a_pod_reaches_itself_through_its_service(self):
        # By its whole name: the short one is its own, in /etc/hosts.
        assert self.inside("server", "get", f"http://server.{SPACE}.svc/") == "server"

    def names_of_services_are_known(self):
        ip = self.get("service", "server")["spec"]["clusterIP"]
        assert self.inside("client", "lookup", f"server.{SPACE}.svc.{programs.DOMAIN}") == ip
        assert self.inside("client", "get", "http://server/") == "server"

    def endpoint_slices_tell_who_is_ready(self):
        slices = self.get("endpointslices", "-l", "kubernetes.io/service-name=server")["items"]
        endpoints = [endpoint for one in slices for endpoint in one["endpoints"]]
        assert [endpoint["conditions"]["ready"] for endpoint in endpoints] == [True], endpoints
        assert endpoints[0]["targetRef"]["name"] == "server"

    def logs_are_read_through_the_api(self):
        self.cluster.apply(pod("speaker", stand("get", "http://server/"), restartPolicy="Never"))
        done = lambda: self.get("pod", "speaker")["status"]["phase"] == "Succeeded"
        self.until("the pod ends", done)
        assert self.kubectl("-n", SPACE, "logs", "speaker").stdout.strip() == "server"

    def a_native_sidecar_starts_first_and_does_not_keep_a_job_from_ending(self):
        # The job's own container asks the sidecar once: it would fail if that were not there yet.
        sidecar = stand("serve", ":9090", name="sidecar") | {"restartPolicy": "Always"}
        sidecar["startupProbe"] = {"httpGet": {"port": 9090, "path": "/"}, "periodSeconds": 1}
        work = {"restartPolicy": "Never", "initContainers": [sidecar], "containers": [stand("get", "http://127.0.0.1:9090/")]}
        work["terminationGracePeriodSeconds"] = 1
        job = {"backoffLimit": 0, "template": {"spec": work}}
        self.cluster.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job", "namespace": SPACE}, "spec": job})
        self.kubectl("-n", SPACE, "wait", "--for=condition=Complete", f"--timeout={PATIENCE}s", "job/job")

    def a_webhook_behind_a_service_changes_pods_and_fails_closed(self):
        with tempfile.TemporaryDirectory() as folder:
            pki = pathlib.Path(folder)
            for name in ("ca.crt", "ca.key"):
                (pki / name).write_bytes((self.cluster.state / "pki" / name).read_bytes())
            named = f"webhook.{SPACE}.svc"
            certificates.issue(pki, "webhook", f"/CN={named}", [f"subjectAltName=DNS:{named}"])
            read = lambda name: base64.b64encode((pki / name).read_bytes()).decode()
            data = {"tls.crt": read("webhook.crt"), "tls.key": read("webhook.key")}
            authority = read("ca.crt")
        served = stand("webhook", ":9443", "/tls/tls.crt", "/tls/tls.key") | {"volumeMounts": [{"name": "tls", "mountPath": "/tls"}]}
        served["readinessProbe"] = {"tcpSocket": {"port": 9443}, "periodSeconds": 1}
        tls = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": "tls", "namespace": SPACE}, "data": data}
        self.cluster.apply(
            tls,
            pod("webhook", served, volumes=[{"name": "tls", "secret": {"secretName": "tls"}}]),
            service("webhook", 443, 9443),
        )
        self.ready("webhook")
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}
        hook = {
            "name": "smoke.penstock.io",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "timeoutSeconds": 5,
            "clientConfig": {"service": {"name": "webhook", "namespace": SPACE, "path": "/", "port": 443}, "caBundle": authority},
            "rules": [rule],
            "objectSelector": {"matchLabels": {"asked": "yes"}},
        }
        kind = "MutatingWebhookConfiguration"
        self.cluster.apply(
            {"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": "smoke"}, "webhooks": [hook]}
        )
        tried = pod("tried", stand("pause"), labels={"asked": "yes"})

        def admitted():
            # Asked for without effect, as the webhook says that it has none.
            run = self.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(tried), check=False)
            return json.loads(run.stdout)["metadata"]["labels"].get("stand") if run.returncode == 0 else None

        assert self.until("the webhook is asked", admitted) == "admitted"
        self.kubectl("-n", SPACE, "delete", "pod", "webhook", "--now")
        refused = self.until("pods are refused without it", lambda: self.refused(tried))
        assert "smoke.penstock.io" in refused, refused
        # Whoever did not ask for it notices nothing.
        self.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod("other", stand("pause"))))

    def refused(self, thing):
        run = self.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(thing), check=False)
        return run.stderr if run.returncode != 0 else None

    def a_definition_refuses_what_its_schema_and_its_rules_do_not_allow(self):
        weight = {"type": "integer", "minimum": 0, "x-kubernetes-validations": [{"rule": "self <= 100", "message": "too heavy"}]}
        spec = {"type": "object", "required": ["weight"], "properties": {"weight": weight}}
        schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
        names = {"plural": "scales", "singular": "scale", "kind": "Scale"}
        versions = [{"name": "v1", "served": True, "storage": True, "schema": schema}]
        self.cluster.apply(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": "scales.smoke.penstock.io"},
                "spec": {"group": "smoke.penstock.io", "scope": "Namespaced", "names": names, "versions": versions},
            }
        )
        self.kubectl("wait", "--for=condition=Established", f"--timeout={PATIENCE}s", "crd/scales.smoke.penstock.io")

        def scale(value):
            metadata = {"name": "one", "namespace": SPACE}
            return {"apiVersion": "smoke.penstock.io/v1", "kind": "Scale", "metadata": metadata, "spec": {"weight": value}}

        # An API server takes a moment to serve what is established.
        self.until("a good one is taken", lambda: self.refused(scale(90)) is None)
        assert "too heavy" in self.refused(scale(101))
        assert "must be of type integer" in self.refused(scale("much"))

    def a_token_speaks_for_its_pod_and_its_audience_alone(self):
        volume = {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"audience": "penstock.io", "path": "token"}}]}}
        holder = stand("serve", ":8080") | {"volumeMounts": [{"name": "token", "mountPath": "/token"}]}
        self.cluster.apply(pod("holder", holder, volumes=[volume]))
        self.ready("holder")
        uid = self.get("pod", "holder")["metadata"]["uid"]
        # The kubelet wrote it; there is no shell in the image, so it is read where it lies.
        path = f"/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/token/token"
        token = self.cluster.run("cat", path, capture_output=True, text=True).stdout

        def review(audience):
            spec = {"token": token, "audiences": [audience]}
            return self.create({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec})["status"]

        said = review("penstock.io")
        assert said["authenticated"] and said["audiences"] == ["penstock.io"], said
        assert said["user"]["username"] == f"system:serviceaccount:{SPACE}:default"
        extra = {key.rsplit("/", 1)[1]: value for key, value in said["user"]["extra"].items()}
        assert (extra["pod-name"], extra["pod-uid"], extra["node-name"]) == (["holder"], [uid], [programs.NODE]), extra
        assert not review("https://elsewhere.example").get("authenticated")
        self.kubectl("-n", SPACE, "delete", "pod", "holder", "--now")
        self.until("the token ends with its pod", lambda: not review("penstock.io").get("authenticated"))

    def a_lease_is_written_by_one_of_two(self):
        metadata = {"name": "lease", "namespace": SPACE}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": {"holderIdentity": "first"}}
        made = self.create(lease)
        replace = lambda thing: self.kubectl("replace", "-f", "-", stdin=json.dumps(thing), check=False)
        made["spec"]["holderIdentity"] = "second"
        assert replace(made).returncode == 0
        made["spec"]["holderIdentity"] = "third"
        assert "the object has been modified" in replace(made).stderr
        assert self.get("lease", "lease")["spec"]["holderIdentity"] == "second"

    def what_changes_in_a_config_map_reaches_the_pods_that_mount_it(self):
        config = lambda text: {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "anchors", "namespace": SPACE},
            "data": {"anchors.pem": text},
        }
        mounted = stand("pause") | {"volumeMounts": [{"name": "anchors", "mountPath": "/anchors"}]}
        self.cluster.apply(config("old"), pod("reader", mounted, volumes=[{"name": "anchors", "configMap": {"name": "anchors"}}]))
        self.ready("reader")
        uid = self.get("pod", "reader")["metadata"]["uid"]
        path = f"/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~configmap/anchors/anchors.pem"
        read = lambda: self.cluster.run("cat", path, capture_output=True, text=True).stdout
        assert read() == "old"
        self.cluster.apply(config("new"))
        self.until("the new text is in the pod", lambda: read() == "new")

    def a_namespace_goes_with_all_that_is_in_it(self):
        self.kubectl("delete", "mutatingwebhookconfiguration/smoke", "crd/scales.smoke.penstock.io")
        self.kubectl("delete", "namespace", SPACE, f"--timeout={PATIENCE}s")


CHECKS = [check for name, check in vars(Smoke).items() if name.startswith(("a_", "pods_", "names_", "endpoint_", "logs_", "what_"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="test")
    smoke, failed, began = Smoke(Cluster(parser.parse_args().name)), 0, time.monotonic()
    for check in CHECKS:
        words, since, why = check.__name__.replace("_", " "), time.monotonic(), ""
        try:
            check(smoke)
        except (AssertionError, Failure, KeyError, subprocess.CalledProcessError) as error:
            failed, why = failed + 1, f": {type(error).__name__} {error}"
        print(f"{'FAILED' if why else 'ok':<8}{words}, {time.monotonic() - since:.1f} s{why}", flush=True)
    print(f"cluster: {len(CHECKS) - failed} passed, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
