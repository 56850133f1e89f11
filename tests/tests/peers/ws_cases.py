"""Autobahn's test cases for WebSocket servers, one line for each: python ws_cases.py HOST:PORT

The cases are those of the Autobahn TestSuite itself; kosoku runs them, since their own runner needs Python 2. A line is the
case, how the peer behaved and how it closed, in Autobahn's words. Exit status 0 also if cases fail: whoever calls this
compares. Groups 12 and 13 (compression) are run as far as --thorough says.
"""

import asyncio
import os
import sys

from kosoku import FailureError, run_fuzzingclient

# 9.* and 12.* move up to 16 MiB in ever smaller pieces, for minutes; a few of them stand for the others.
SHORT = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.1.1", "9.1.4", "9.2.1", "9.3.5", "9.4.5", "9.5.6",
         "9.6.6", "9.7.1", "9.8.1", "10.*", "12.1.1", "12.1.10", "12.2.5", "12.3.5", "12.5.5", "13.1.5", "13.3.5", "13.7.5"]


async def main(address, *options):
    include = None if "--thorough" in options else SHORT
    try:
        results = await run_fuzzingclient(address, include, None, concurrency=1)
    except FailureError as failure:
        results = failure.results
    for result in results:
        print(result.case_id, result.behavior.value, result.behavior_close.value, sep="\t")


asyncio.run(main(*sys.argv[1:]))
# All is said. The compiled part of a library has been seen to abort while Python takes itself down.
sys.stdout.flush()
os._exit(0)
