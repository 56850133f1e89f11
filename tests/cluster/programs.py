"""What runs on the node, in the order in which it is started: each program's command line, its files, and how one sees that it works."""

import json
import pathlib

import certificates
import parts

NODE = "node"
DOMAIN = "cluster.local"
# In the node's own network, so that they meet nothing of the machine's.
SERVICES, SERVICE_IP, DNS_IP = "10.96.0.0/16", "10.96.0.1", "10.96.0.10"
PODS = "10.244.0.0/16"
PAUSE = "penstock.io/stand:test"
SOCKET = "/run/containerd/containerd.sock"

CONTROL_PLANE = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"]
WORKER = ["containerd", "kubelet", "kube-proxy"]


def containerd(state):
    """Its defaults are the node's own places (node.py); no registry is asked for anything."""
    return f"""version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  disable_apparmor = true
  # A root without CAP_SYS_RESOURCE, as in many sandboxes, may raise the score by which the kernel chooses whom to end, and not lower it.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{state}/cni"
"""


def network():
    """Every pod is at the end of a cable of its own, and what it sends is routed, so that all of it passes the node's rules
    without a bridge having to be told to."""
    addresses = {"type": "host-local", "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]}
    return {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": addresses}],
    }


def kubelet(state, cgroup):
    pki = state / "pki"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(pki / "kubelet-serving.crt"),
        "tlsPrivateKeyFile": str(pki / "kubelet-serving.key"),
        "clusterDNS": [DNS_IP],
        "clusterDomain": DOMAIN,
        "resolvConf": str(state / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        # The disk is the machine's, and others fill it: no pod is evicted and no image is taken away for that.
        "evictionHard": {"memory.available": "64Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        # As soon as it can: a test waits for each pod.
        "serializeImagePulls": False,
        "registryPullQPS": 0,
        "kubeAPIQPS": 200,
        "kubeAPIBurst": 400,
        # Secrets and ConfigMaps that change are in the pods within seconds.
        "syncFrequency": "10s",
    }


def kube_proxy(state):
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": PODS,
        "hostnameOverride": NODE,
        "clientConnection": {"kubeconfig": str(state / "pki/kube-proxy.yaml")},
        # The table of connections is the machine's to size.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        # Endpoints that change are in force at once, as on a cluster where little changes.
        "nftables": {"minSyncPeriod": "100ms"},
    }


def write(state, ip, cgroup):
    """All files of all programs."""
    certificates.make(state / "pki", NODE, ip, SERVICE_IP)
    for name in certificates.USERS:
        at = state / "pki" / f"{name}.yaml"
        # The node's own programs stay on the node; an administrator comes from outside.
        server = f"https://{ip if name == 'admin' else '127.0.0.1'}:6443"
        at.write_text(certificates.kubeconfig(state / "pki", name, server), encoding="utf-8")
    (state / "kubeconfig").symlink_to("pki/admin.yaml")
    (state / "cni").mkdir()
    (state / "cni/pods.conflist").write_text(json.dumps(network(), indent=2), encoding="utf-8")
    (state / "containerd.toml").write_text(containerd(state), encoding="utf-8")
    (state / "kubelet.yaml").write_text(json.dumps(kubelet(state, cgroup), indent=2), encoding="utf-8")
    (state / "kube-proxy.yaml").write_text(json.dumps(kube_proxy(state), indent=2), encoding="utf-8")
    # For pods that ask the node's own server of names: there is none.
    (state / "resolv.conf").write_text("nameserver 127.0.0.1\n", encoding="utf-8")


def command(name, state, ip):
    """The command line of a program."""
    pki: pathlib.Path = state / "pki"
    user = lambda who: str(pki / f"{who}.yaml")
    lines = {
        "etcd": [
            "etcd",
            f"--data-dir={state}/etcd",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=default=http://127.0.0.1:2380",
            # What it holds is gone with the cluster.
            "--unsafe-no-fsync",
        ],
        "kube-apiserver": [
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={ip}",
            "--secure-port=6443",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--client-ca-file={pki}/ca.crt",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            f"--kubelet-client-certificate={pki}/apiserver-to-kubelet.crt",
            f"--kubelet-client-key={pki}/apiserver-to-kubelet.key",
            "--kubelet-preferred-address-types=InternalIP",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
            f"--service-account-signing-key-file={pki}/accounts.key",
            f"--service-account-key-file={pki}/accounts.pub",
            f"--service-cluster-ip-range={SERVICES}",
            "--allow-privileged=true",
        ],
        "kube-controller-manager": [
            f"--kubeconfig={user('kube-controller-manager')}",
            f"--authentication-kubeconfig={user('kube-controller-manager')}",
            f"--authorization-kubeconfig={user('kube-controller-manager')}",
            f"--service-account-private-key-file={pki}/accounts.key",
            f"--root-ca-file={pki}/ca.crt",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ],
        "kube-scheduler": [
            f"--kubeconfig={user('kube-scheduler')}",
            f"--authentication-kubeconfig={user('kube-scheduler')}",
            f"--authorization-kubeconfig={user('kube-scheduler')}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ],
        "containerd": ["containerd", f"--config={state}/containerd.toml"],
        "kubelet": [
            f"--config={state}/kubelet.yaml",
            f"--kubeconfig={user('kubelet')}",
            f"--hostname-override={NODE}",
            f"--node-ip={ip}",
        ],
        "kube-proxy": [f"--config={state}/kube-proxy.yaml"],
    }
    line = lines[name]
    # Kubernetes' own are ours, built; the others are Debian's.
    return line if name in ("etcd", "containerd") else [str(parts.program(name)), *line]


# Where each tells that it works: a URL, asked on the node.
HEALTH = {
    "etcd": "http://127.0.0.1:2379/health",
    "kube-controller-manager": "https://127.0.0.1:10257/healthz",
    "kube-scheduler": "https://127.0.0.1:10259/healthz",
    "kubelet": "http://127.0.0.1:10248/healthz",
    "kube-proxy": "http://127.0.0.1:10256/healthz",
}
