"""A stock gRPC client with the policy weighted_round_robin. Calls at a constant rate, whether or not answers keep up, and prints
for each second how many calls each server answered, as one line of JSON.

Usage: weighted_client.py [--out-of-band] FOLDER RATE SECONDS HOST:PORT...
With --out-of-band it subscribes to load reports (gRFC A51) and takes no notice of those on responses. FOLDER has anchors.pem, leaf.pem and key.pem; servers prove to be `localhost` and answer with their names.
"""

import collections
import json
import sys
import threading
import time

import grpc

arguments = sys.argv[1:]
out_of_band = arguments[0] == "--out-of-band"
folder, rate, seconds, *servers = arguments[out_of_band:]
rate, seconds = float(rate), int(seconds)


def read(name):
    with open(f"{folder}/{name}", "rb") as file:
        return file.read()


# The defaults of gRFC A58, but for the times: 10 s of blackout and an update each second are for servers that stay.
POLICY = {"weighted_round_robin": {"blackoutPeriod": "0.5s", "weightUpdatePeriod": "0.1s"}}
if out_of_band:
    POLICY["weighted_round_robin"] |= {"enableOobLoadReport": True, "oobReportingPeriod": "0.1s"}
channel = grpc.secure_channel(
    "ipv4:" + ",".join(servers),
    grpc.ssl_channel_credentials(read("anchors.pem"), read("key.pem"), read("leaf.pem")),
    options=[
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [POLICY]})),
        ("grpc.ssl_target_name_override", "localhost"),
    ],
)
call = channel.unary_unary("/test.Work/Do")

answered = collections.defaultdict(collections.Counter)
lock = threading.Lock()
failures = []


def note(future):
    with lock:
        try:
            answered[int(time.monotonic() - began)][future.result().decode()] += 1
        except grpc.RpcError as error:
            failures.append(str(error))


# Both must be connected before anything is counted, or the first second tells of connecting.
names = set()
deadline = time.monotonic() + 20
while len(names) < len(servers):
    assert time.monotonic() < deadline, f"only {names} answered"
    names.add(call(b"", timeout=10, wait_for_ready=True).decode())

began = time.monotonic()
for number in range(int(rate * seconds)):
    time.sleep(max(0.0, began + number / rate - time.monotonic()))
    call.future(b"", timeout=10).add_done_callback(note)
time.sleep(1)

assert not failures, f"{len(failures)} calls failed: {failures[0]}"
for second in range(seconds):
    print(json.dumps(answered[second]))
