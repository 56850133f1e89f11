"""A gRPC server of plain bytes: it answers what a test needs to see. Usage: grpc_server.py HOST:PORT"""

import sys
import threading
import time
from concurrent import futures

import grpc

cancelled = threading.Event()


def unary(request, context):
    """Sends back the message and, as metadata, the caller's metadata and identity."""
    metadata = dict(context.invocation_metadata())
    context.send_initial_metadata((("x-initial", metadata.get("x-ask", "none")),))
    context.set_trailing_metadata(
        (("x-trailing", "end"), ("x-bin-bin", b"\x00\xff"), ("x-client", metadata.get("penstock-client-id", "none")))
    )
    return request


def fails(request, context):
    """Fails with a status, a message that needs encoding, and details."""
    context.set_trailing_metadata((("grpc-status-details-bin", b"\x01\x02details"),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "50% of nothing: \u00fc\n")


def hangs(request, context):
    """Answers only when it is cancelled."""
    ended = threading.Event()
    context.add_callback(ended.set)
    ended.wait(30)
    cancelled.set()
    return b""


def was_cancelled(request, context):
    """Whether a call of `hangs` has ended within a while."""
    return b"yes" if cancelled.wait(10) else b"no"


def slow(request, context):
    """Answers after a while; says how much time the client gave it."""
    time.sleep(0.3)
    return str(context.time_remaining() or 0).encode()


def collect(requests, context):
    """Client streaming: joins all messages."""
    return b",".join(requests)


def count(request, context):
    """Server streaming: counts up to the number."""
    for number in range(int(request)):
        yield str(number).encode()


def echo(requests, context):
    """Bidirectional: each message at once."""
    yield from requests


def main():
    """Serves until it is killed."""
    server = grpc.server(
        futures.ThreadPoolExecutor(160),
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Fails": grpc.unary_unary_rpc_method_handler(fails),
        "Hangs": grpc.unary_unary_rpc_method_handler(hangs),
        "WasCancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
        "Slow": grpc.unary_unary_rpc_method_handler(slow),
        "Collect": grpc.stream_unary_rpc_method_handler(collect),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Bytes", handlers),))
    server.add_insecure_port(sys.argv[1])
    server.start()
    server.wait_for_termination()


main()
