"""A WebSocket server that sends back what it hears: python ws_echo.py HOST PORT"""

import asyncio
import sys

from websockets.asyncio.server import serve


async def echo(connection):
    async for message in connection:
        await connection.send(message)


async def main(host, port):
    # As the suite wants it: messages of any size, and a client that is silent is left alone.
    async with serve(echo, host, int(port), max_size=None, ping_interval=None, close_timeout=5) as server:
        print("listening", flush=True)
        await server.serve_forever()


asyncio.run(main(*sys.argv[1:]))
