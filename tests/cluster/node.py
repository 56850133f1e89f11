"""The first process of the node: python3 node.py STATE, in namespaces of its own (network, mounts, processes, host name).

It makes the node's inside what a node is, then takes in processes whose parents are gone, as the first process has to.
When it is killed the kernel ends everything in the node, and takes back mounts, links, rules and routes with it.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys

# What the node has of its own where the machine has the same: the kubelet's, containerd's and the plugins' state, logs, sockets.
OWN = {"var-lib": "/var/lib", "var-log": "/var/log", "run": "/run"}

# The kubelet wants these on the whole machine and would set them. The node sees them as set; the machine stays as it was.
TUNED = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def prepare(state, host_name):
    # Volumes that are mounted for a container later are to be seen in it; nothing gets back to the machine, whose mounts are others.
    mount("--make-rshared", "/")
    mount("-t", "proc", "proc", "/proc")
    for name, place in OWN.items():
        own = state / "fs" / name
        own.mkdir(parents=True)
        mount("--bind", str(own), place)
    for folder in ["/run/netns", "/var/lib/kubelet", "/var/log/pods"]:
        os.makedirs(folder)
    for name, value in TUNED.items():
        file = state / "fs" / "tuned" / name.replace("/", "-")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{value}\n", encoding="utf-8")
        mount("--bind", str(file), f"/proc/sys/{name}")
    socket.sethostname(host_name)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="utf-8")


def main(state, host_name):
    # The machine's number of this process: its /proc is still the one that is seen here.
    pid = os.readlink("/proc/self")
    prepare(state, host_name)
    whole = state / "node.pid.new"
    whole.write_text(pid, encoding="utf-8")
    whole.rename(state / "node.pid")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        signal.sigwait([signal.SIGCHLD])
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
