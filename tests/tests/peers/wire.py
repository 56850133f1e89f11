"""A wire between two bridges that loses and delays what passes, for kernels that have no netem.

    wire.py TAP BRIDGE TAP BRIDGE

It makes both taps, says `made`, and copies frames until its input ends. Each line of its input, `LOSS DELAY`, holds
from then on and for both directions: the share of frames that are lost, percent, and how much later the others
arrive, milliseconds. Frames keep their order. What is lost is drawn from a fixed seed. Each line is answered by one: how
many frames have been lost or late since the one before.
"""

import collections
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time

# linux/if_tun.h
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
# A frame of a tap is no longer than the interface's MTU and a header: the kernel cuts what is.
LONGEST = 65536


def tap(name, bridge):
    """A new tap as a port of a bridge."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "master", bridge, "up"], check=True)
    return file


def main():
    one, one_bridge, other, other_bridge = sys.argv[1:]
    taps = [tap(one, one_bridge), tap(other, other_bridge)]
    across = {taps[0]: taps[1], taps[1]: taps[0]}
    chance = random.Random(9)
    loss, delay, marred = 0.0, 0.0, 0
    # When, where to, and what.
    under_way = collections.deque()
    print("made", flush=True)
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready = select.select([0, *taps], [], [], wait)[0]
        if 0 in ready:
            told = os.read(0, 4096).decode()
            if not told:
                return
            loss, delay = (float(word) for word in told.split())
            print(marred, flush=True)
            marred = 0
        for file in taps:
            if file in ready:
                frame = os.read(file, LONGEST)
                lost = chance.random() * 100 < loss
                marred += lost or delay > 0
                if not lost:
                    under_way.append((time.monotonic() + delay / 1000, across[file], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, to, frame = under_way.popleft()
            try:
                os.write(to, frame)
            except BlockingIOError:
                # A queue that is full loses frames, as anywhere.
                pass


main()
