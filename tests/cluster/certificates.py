"""Who is who in the cluster: one authority, a certificate for each program, and a kubeconfig for each that asks the API.

Made by openssl, in a folder that only root reads, for as long as the cluster is up.
"""

import json
import subprocess

DAYS = "30"

# The users that Kubernetes' own roles are bound to, and the groups.
USERS = {
    "admin": ("kubernetes-admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", None),
    "kube-scheduler": ("system:kube-scheduler", None),
    "kube-proxy": ("system:kube-proxy", None),
    "kubelet": ("system:node:{node}", "system:nodes"),
    # With which the API server asks the kubelet for logs and commands.
    "apiserver-to-kubelet": ("kube-apiserver", "system:masters"),
}


def openssl(*arguments):
    run = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {run.stderr.strip()}")


def subject(name, group=None):
    return f"/O={group}/CN={name}" if group else f"/CN={name}"


def key(path):
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(path))
    path.chmod(0o600)


def issue(folder, name, who, extensions):
    """A key and a certificate of our authority."""
    key(folder / f"{name}.key")
    asked, conf = folder / f"{name}.csr", folder / f"{name}.ext"
    conf.write_text("\n".join(extensions) + "\n", encoding="utf-8")
    openssl("req", "-new", "-key", str(folder / f"{name}.key"), "-subj", who, "-out", str(asked))
    openssl(
        *("x509", "-req", "-in", str(asked), "-days", DAYS, "-extfile", str(conf)),
        *("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key"), "-CAcreateserial"),
        *("-out", str(folder / f"{name}.crt")),
    )
    asked.unlink()
    conf.unlink()


def make(folder, node, ip, service_ip):
    folder.mkdir(mode=0o700)
    key(folder / "ca.key")
    openssl(
        *("req", "-x509", "-new", "-key", str(folder / "ca.key"), "-days", DAYS, "-subj", subject("penstock-test-cluster")),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature", "-out", str(folder / "ca.crt")),
    )
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost", node]
    served = ",".join([*(f"DNS:{name}" for name in names), f"IP:{ip}", f"IP:{service_ip}", "IP:127.0.0.1"])
    issue(folder, "apiserver", subject("kube-apiserver"), [f"subjectAltName={served}", "extendedKeyUsage=serverAuth"])
    issue(folder, "kubelet-serving", subject(node), [f"subjectAltName=DNS:{node},IP:{ip}", "extendedKeyUsage=serverAuth"])
    for name, (user, group) in USERS.items():
        issue(folder, name, subject(user.format(node=node), group), ["extendedKeyUsage=clientAuth"])
    # What tokens of service accounts are signed with.
    key(folder / "accounts.key")
    openssl("pkey", "-in", str(folder / "accounts.key"), "-pubout", "-out", str(folder / "accounts.pub"))


def kubeconfig(folder, name, server):
    """JSON, which is YAML. The certificates are named and not copied, but for the administrator's, who takes it elsewhere."""
    path = lambda file: str(folder / file)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "penstock-test",
        "clusters": [{"name": "penstock-test", "cluster": {"server": server, "certificate-authority": path("ca.crt")}}],
        "users": [{"name": name, "user": {"client-certificate": path(f"{name}.crt"), "client-key": path(f"{name}.key")}}],
        "contexts": [{"name": "penstock-test", "context": {"cluster": "penstock-test", "user": name}}],
    }
    return json.dumps(config, indent=2) + "\n"
