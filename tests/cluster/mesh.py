"""Penstock on a Kubernetes, from its installation to its end: python3 mesh.py [--name NAME] [--bins DIR] [--tale TALE] [--from STORY] [--only STORY]

On a cluster that is up and has the images (cluster.py up, cluster.py images). Prints a line for each story; the first that fails ends
it, with the last words of all programs, since each stands on those before it. Exit status 1 then.
"""

import argparse
import subprocess
import sys
import time

from cluster import Cluster
from stories import begin, canary, control, deployment, end, flagger, gpu, secrecy, traffic
from world import Failure, World

STORIES = [story for part in (begin, secrecy, traffic, gpu, control, canary, deployment, end) for story in part.STORIES]
# Tales that begin on a cluster of their own.
TALES = {"mesh": STORIES, "flagger": flagger.STORIES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="test", help="the cluster's")
    parser.add_argument("--bins", default="target/debug", help="where `penstock` is")
    parser.add_argument("--tale", choices=TALES, default="mesh", help="which stories: of the mesh, or of a Flagger on it")
    parser.add_argument("--from", dest="first", metavar="STORY", help="begin with this one: what it stands on is there")
    parser.add_argument("--only", metavar="STORY", help="this one alone")
    chosen = parser.parse_args()
    told = TALES[chosen.tale]
    names = [story.__name__ for story in told]
    for name in filter(None, (chosen.first, chosen.only)):
        if name not in names:
            sys.exit(f"there is no story {name}; there are {', '.join(names)}")
    stories = told[names.index(chosen.first) :] if chosen.first else told
    stories = [story for story in stories if chosen.only in (None, story.__name__)]
    world, began = World(Cluster(chosen.name), chosen.bins, lambda line: print(line, flush=True)), time.monotonic()
    for number, story in enumerate(stories):
        words, since = story.__name__.replace("_", " "), time.monotonic()
        try:
            story(world)
        except (Failure, AssertionError, KeyError, IndexError, ValueError, subprocess.SubprocessError) as error:
            print(f"FAILED  {words}, {time.monotonic() - since:.1f} s: {type(error).__name__}: {error}", flush=True)
            print(world.last_words())
            print(f"{chosen.tale}: {number} passed, 1 failed, {len(stories) - number - 1} not tried, {time.monotonic() - began:.0f} s")
            return 1
        print(f"ok      {words}, {time.monotonic() - since:.1f} s", flush=True)
    print(f"{chosen.tale}: {len(stories)} passed, {world.asked} requests under load and none failed, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
