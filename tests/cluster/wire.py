"""Packets between pods, as whoever sits on the node's end of a pod's cable sees them: python3 wire.py INTERFACE FILE writes them until it
is ended, and the functions here read them.

Sockets of packets and not tcpdump: there is nothing to install, and the test reads bytes and not another program's opinion of them.
"""

import collections
import contextlib
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time

HANDSHAKE, APPLICATION_DATA, CHANGE_CIPHER_SPEC, ALERT = 22, 23, 20, 21
SERVER_HELLO, SUPPORTED_VERSIONS, TLS_1_3 = 2, 43, 0x0304


def record(interface, file):
    """Writes every packet behind its length."""
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as packets, open(file, "wb") as out:
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        packets.bind((interface, 0))
        packets.settimeout(0.1)
        print("ready", flush=True)
        while not ended:
            with contextlib.suppress(TimeoutError):
                packet = packets.recv(1 << 18)
                out.write(struct.pack(">I", len(packet)) + packet)


@contextlib.contextmanager
def captured(cluster, address, file):
    """What passes the node's end of the cable of the pod with this address, while the body runs."""
    told = cluster.run("ip", "route", "get", address, capture_output=True, text=True).stdout.split()
    line = cluster.inside(sys.executable, __file__, told[told.index("dev") + 1], str(file))
    recorder = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert recorder.stdout.readline() == "ready\n", "nothing is recorded"
        yield
        # What is on its way yet.
        time.sleep(0.3)
    finally:
        # The recorder itself, and not nsenter, which would not hand the signal on.
        children = pathlib.Path(f"/proc/{recorder.pid}/task/{recorder.pid}/children").read_text(encoding="utf-8").split()
        for child in children:
            subprocess.run(["kill", "-TERM", child], check=False)
        recorder.wait(10)


def packets(file):
    data, at = pathlib.Path(file).read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 4 + length]
        at += 4 + length


def flows(file):
    """The bytes of each direction of each TCP connection over IPv4, in their order: (address, port, address, port) to bytes."""
    pieces = collections.defaultdict(dict)
    for packet in packets(file):
        if packet[12:14] != b"\x08\x00" or packet[14] >> 4 != 4 or packet[23] != 6:
            continue
        header = 14 + (packet[14] & 15) * 4
        end = 14 + struct.unpack_from(">H", packet, 16)[0]
        source, target, number = struct.unpack_from(">HHI", packet, header)
        payload = packet[header + (packet[header + 12] >> 4) * 4 : end]
        if payload:
            key = (socket.inet_ntoa(packet[26:30]), source, socket.inet_ntoa(packet[30:34]), target)
            pieces[key][number] = max(payload, pieces[key].get(number, b""), key=len)
    return {key: joined(found) for key, found in pieces.items()}


def joined(pieces):
    """From the first byte that was seen, as far as there is no gap; numbers of the sequence wrap around. Sent twice counts once."""
    first = min(pieces, key=lambda number: (number - next(iter(pieces)) + (1 << 31)) % (1 << 32))
    whole = b""
    for number in sorted(pieces, key=lambda number: (number - first) % (1 << 32)):
        at = (number - first) % (1 << 32)
        if at > len(whole):
            raise ValueError(f"a gap of {at - len(whole)} bytes: the capture lost packets")
        whole += pieces[number][len(whole) - at :]
    return whole


def records(data):
    """TLS records: (kind, content). Anything else is an error; the last may be cut."""
    at = 0
    while at + 5 <= len(data):
        kind, version, length = struct.unpack_from(">BHH", data, at)
        if kind not in (HANDSHAKE, APPLICATION_DATA, CHANGE_CIPHER_SPEC, ALERT) or version not in (0x0301, 0x0303) or length > 16640:
            raise ValueError(f"no TLS record at byte {at}: {data[at : at + 40]!r}")
        yield kind, data[at + 5 : at + 5 + length]
        at += 5 + length


def chosen_version(hello):
    """What a ServerHello says in its extension supported_versions, which is where TLS 1.3 is told (RFC 8446, 4.2.1)."""
    at = 4 + 2 + 32
    at += 1 + hello[at] + 2 + 1
    (length,) = struct.unpack_from(">H", hello, at)
    at, end = at + 2, at + 2 + length
    while at < end:
        kind, length = struct.unpack_from(">HH", hello, at)
        if kind == SUPPORTED_VERSIONS:
            return struct.unpack_from(">H", hello, at + 4)[0]
        at += 4 + length
    return None


if __name__ == "__main__":
    record(sys.argv[1], sys.argv[2])
