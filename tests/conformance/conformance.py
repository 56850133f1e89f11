"""The Gateway API's own conformance suite, on a cluster with Penstock: python3 conformance.py [--name NAME] [--bins DIR] [--out DIR] [--only TEST]

On a cluster that is up and has Penstock's images (cluster.py up, cluster.py images; `make conformance` does all of it). Installs
Penstock if it is not there, runs the suite's mesh profiles, prints a line for each test that ran, and writes what the suite reports,
and a table of its tests, into docs/conformance (or --out). Exit status 1 if a test failed; the suite's whole output is kept then.

--only TEST runs one test and writes nothing.
"""

import argparse
import collections
import os
import pathlib
import re
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "cluster"))

# pylint: disable=wrong-import-position
import images
import parts
import pools
from cluster import Cluster
from stories import begin
from world import SYSTEM, Failure, World, version

GATEWAY_API, ISTIO = "sigs.k8s.io/gateway-api", "istio.io/istio"
DOCS = HERE.parent.parent / "docs/conformance"
INJECT = "penstock.io/inject=enabled"
PROFILES = ["MESH-HTTP", "MESH-GRPC"]
# All that the profiles call extended, and what tests of the mesh want beside it: these two are features of HTTPRoute, which the
# profiles do not count.
FEATURES = [
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteNamedRouteRule",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteParentRefPort",
]
# Of these, the profiles count the first.
EXTENDED = 9
# A run that passes takes half a minute; the suite gives up on each request of each test after 30 s.
PATIENCE = 300


def module(name, at):
    """Where the sources of a module are, in the version that a go.mod requires."""
    subprocess.run([parts.go(), "mod", "download", name], cwd=at, check=True)
    found = subprocess.run([parts.go(), "list", "-m", "-f", "{{.Dir}}", name], cwd=at, check=True, capture_output=True, text=True)
    return pathlib.Path(found.stdout.strip())


def required(name, at):
    """The version of a module that a go.mod requires."""
    return parts.required(name, at / "go.mod")


def built():
    """The folder with the suite and the programs of its pods, made once for their versions: some minutes on two cores."""
    number = f"{required(GATEWAY_API, HERE)}-{required(ISTIO, HERE / 'echo')}"
    folder = parts.cache() / f"conformance-{number}"
    with parts.locked(f"conformance-{number}"):
        if not (folder / "suite").exists():
            suite(folder / "suite")
        for name in ("server", "client"):
            if not (folder / name).exists():
                parts.compile_go(f"{ISTIO}/pkg/test/echo/cmd/{name}", folder / name, at=HERE / "echo")
    return folder


def suite(out):
    """Compiles the suite's own test, as it is in its module."""
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f".{out.name}.{os.getpid()}")
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    command = [parts.go(), "test", "-c", "-ldflags", "-s -w", "-o", str(made), f"{GATEWAY_API}/conformance"]
    try:
        subprocess.run(command, cwd=HERE, env=environment, check=True)
        made.rename(out)
    finally:
        made.unlink(missing_ok=True)
    print(f"built {out.name} in {time.monotonic() - began:.0f} s: {out}", flush=True)


def manifests():
    """The suite's own pods and Services."""
    return (module(GATEWAY_API, HERE) / "conformance/mesh/manifests.yaml").read_text(encoding="utf-8")


def load_image(cluster, programs):
    """The image that the suite's pods name, of the programs that it is made of (Istio's echo, with a certificate of its tests)."""
    names = sorted(set(re.findall(r"image: (\S+)", manifests())))
    certificates = module(ISTIO, HERE / "echo") / "tests/testdata/certs/dns"
    extra = {"cert.crt": certificates / "cert-chain.pem", "cert.key": certificates / "key.pem"}
    for name in names:
        cluster.load(images.archive(name, [programs / "server", programs / "client"], extra))
        print(f"{name}: of {ISTIO} {required(ISTIO, HERE / 'echo')}", flush=True)


def installed(world):
    """Penstock on the cluster, by the commands of the README."""
    world.kubectl("apply", "--server-side", f"--filename={pools.definitions()}")
    if world.kubectl("get", "namespace", SYSTEM, check=False).returncode != 0:
        begin.it_is_installed_by_two_commands(world)


def prepare(world):
    """Brings the suite's pods up before it does. By itself it waits until all pods that there are are ready, also where there are none
    yet, and its first tests fail then."""
    named = r"(kind: Namespace\nmetadata:\n  name: (\S+)\n  labels:\n)"
    labelled, spaces = re.sub(named, rf"\1    {INJECT.replace('=', ': ')}\n", manifests()), re.findall(named, manifests())
    # After an earlier run its namespaces may be on their way out still.
    world.until("the suite's pods are made", lambda: world.kubectl("apply", "-f", "-", stdin=labelled))
    for _, space in spaces:
        names = [f"deployment/{one['metadata']['name']}" for one in world.get("deployments", space=space)["items"]]
        world.rolled_out(*names, space=space)
        for pod in world.pods("app=echo", space):
            if pod["metadata"].get("labels", {}).get("penstock.io/injected") != "true":
                raise Failure(f"{space}/{pod['metadata']['name']} has no sidecar")


def ran(world, programs, report, only):
    """Runs the suite, and answers all that it says."""
    options = {
        "supported-features": ",".join(FEATURES),
        "conformance-profiles": ",".join(PROFILES),
        "namespace-labels": INJECT,
        "mode": "default",
        "organization": "penstock",
        "project": "penstock",
        # The suite wants both of a report; there is nothing of the project outside of its repository.
        "url": "https://penstock.io",
        "contact": "penstock",
        "version": version(),
    }
    if only:
        options |= {"run-test": only}
    else:
        options |= {"report-output": str(report)}
    command = [str(programs / "suite"), "-test.v", f"-test.timeout={PATIENCE}s", *(f"--{name}={value}" for name, value in options.items())]
    run = subprocess.run(command, env=world.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return run.returncode, run.stdout


Test = collections.namedtuple("Test", "name verdict features why")


def tests(said):
    """Each test of the suite, how it ended, which features it needs, and why it did not run."""
    why = dict(re.findall(r"Skipping (\w+): (.+)$", said, re.MULTILINE))
    needs = dict(re.findall(r"Running (\w+), relying on the following features: (.+)$", said, re.MULTILINE))
    found = re.findall(r"^    --- (PASS|FAIL|SKIP): TestConformance/(\w+) ", said, re.MULTILINE)
    # "Mesh-standard, HTTPRoute-standard"
    features = lambda name: [word.rsplit("-", 1)[0] for word in needs.get(name, "").split(", ")]
    return [Test(name, verdict, features(name), why.get(name, "")) for verdict, name in found]


def page(all_tests):
    """What ran and what did not, for the documentation."""
    lines = [
        "# Each test of the suite",
        "",
        f"Written by `make conformance`: version {required(GATEWAY_API, HERE)} of the suite. What each line means is in [README.md](README.md).",
        "",
        "| Test | | Beside Mesh it needs | Counts for |",
        "|---|---|---|---|",
    ]
    for test in all_tests:
        if test.verdict != "SKIP":
            needs = [name for name in test.features if name != "Mesh"]
            counts = [f"MESH-{kind}" for kind in ("HTTP", "GRPC") if set(needs) <= set(FEATURES[:EXTENDED] + [f"{kind}Route"])]
            verdict = "passed" if test.verdict == "PASS" else "**failed**"
            lines.append(f"| {test.name} | {verdict} | {', '.join(needs) or '-'} | {', '.join(counts) or 'no profile'} |")
    lines += ["", "Did not run, as the suite says:", ""]
    skipped = sorted({test.why for test in all_tests if test.verdict == "SKIP"})
    for why in skipped:
        names = [test.name for test in all_tests if test.why == why]
        lines.append(f"- {why} ({len(names)}): {', '.join(names)}")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="conf", help="the cluster's")
    parser.add_argument("--bins", default="target/debug", help="where `penstock` is")
    parser.add_argument("--out", type=pathlib.Path, default=DOCS, help="where the report goes")
    parser.add_argument("--only", metavar="TEST", help="this one alone")
    chosen = parser.parse_args()
    programs, cluster = built(), Cluster(chosen.name)
    world = World(cluster, chosen.bins)
    load_image(cluster, programs)
    installed(world)
    prepare(world)
    chosen.out.mkdir(parents=True, exist_ok=True)
    report = chosen.out.resolve() / f"standard-{version()}-default-report.yaml"
    began = time.monotonic()
    status, said = ran(world, programs, report, chosen.only)
    all_tests = tests(said)
    for test in all_tests:
        if test.verdict != "SKIP":
            print(f"{'ok    ' if test.verdict == 'PASS' else 'FAILED'}  {test.name}", flush=True)
    count = collections.Counter(test.verdict for test in all_tests)
    print(f"conformance: {count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} not for a mesh, {time.monotonic() - began:.0f} s")
    # The suite's own namespaces are gone by now, so these are alone.
    failed = 0 if chosen.only else pools.run(world)
    if status != 0 or count["PASS"] == 0 or failed:
        kept = pathlib.Path(f"/tmp/penstock-conformance-{chosen.name}.log")
        kept.write_text(said + world.last_words(), encoding="utf-8")
        print(f"all that was said: {kept}", file=sys.stderr)
        return 1
    if not chosen.only:
        # The suite lets nobody but its user read it.
        report.chmod(0o644)
        (chosen.out / "tests.md").write_text(page(all_tests), encoding="utf-8")
        print(f"the report: {report}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"conformance: {failure}")
