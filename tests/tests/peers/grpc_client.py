"""Calls grpc_server.py and checks every promise. Prints the name of each that holds; fails at the first that does not.

Usage: grpc_client.py HOST:PORT AUTHORITY IDENTITY
IDENTITY is what the server must see as the caller's.
"""

import queue
import sys
import threading
import time

import grpc

TIMEOUT = 20


def method(kind, name):
    """A callable for a method of the test's service."""
    return getattr(channel, kind)(f"/test.Bytes/{name}")


def unary_and_metadata():
    call = method("unary_unary", "Unary").with_call
    answer, call = call(b"hello", timeout=TIMEOUT, metadata=(("x-ask", "me"),))
    assert answer == b"hello", answer
    assert ("x-initial", "me") in [(m.key, m.value) for m in call.initial_metadata()]
    trailing = {m.key: m.value for m in call.trailing_metadata()}
    assert trailing["x-trailing"] == "end" and trailing["x-bin-bin"] == b"\x00\xff", trailing
    assert trailing["x-client"] == sys.argv[3], trailing
    assert not any(key.startswith(("penstock-", "endpoint-load")) for key in trailing), trailing


def client_streaming():
    answer = method("stream_unary", "Collect")(iter([b"a", b"b", b"c"]), timeout=TIMEOUT)
    assert answer == b"a,b,c", answer


def server_streaming():
    answer = list(method("unary_stream", "Count")(b"1000", timeout=TIMEOUT))
    assert answer == [str(number).encode() for number in range(1000)], len(answer)


def bidirectional_streaming():
    sent = queue.Queue()
    answers = method("stream_stream", "Echo")(iter(sent.get, None), timeout=TIMEOUT)
    for number in range(20):
        # Each is sent only after the answer to the one before it, so nothing may be kept back.
        sent.put(str(number).encode())
        assert next(answers) == str(number).encode()
    sent.put(None)
    assert list(answers) == []
    assert answers.code() == grpc.StatusCode.OK


def status_message_and_details():
    try:
        method("unary_unary", "Fails")(b"", timeout=TIMEOUT)
        raise AssertionError("it did not fail")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
        assert error.details() == "50% of nothing: \u00fc\n", error.details()
        trailing = {m.key: m.value for m in error.trailing_metadata()}
        assert trailing["grpc-status-details-bin"] == b"\x01\x02details", trailing


def cancellation_reaches_the_server():
    call = method("unary_unary", "Hangs").future(b"", timeout=TIMEOUT)
    time.sleep(0.5)
    call.cancel()
    assert method("unary_unary", "WasCancelled")(b"", timeout=TIMEOUT) == b"yes"


def deadlines():
    left = float(method("unary_unary", "Slow")(b"", timeout=5))
    assert 0 < left < 5, left
    started = time.monotonic()
    try:
        method("unary_unary", "Slow")(b"", timeout=0.1)
        raise AssertionError("it was not too late")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    assert time.monotonic() - started < 2


def large_messages():
    message = bytes(range(256)) * 65536
    assert method("unary_unary", "Unary")(message, timeout=TIMEOUT) == message


def a_hundred_streams_at_once():
    failed = []

    def talk(number):
        sent = queue.Queue()
        answers = method("stream_stream", "Echo")(iter(sent.get, None), timeout=TIMEOUT)
        try:
            for turn in range(5):
                sent.put(f"{number}-{turn}".encode())
                assert next(answers) == f"{number}-{turn}".encode()
                everyone.wait()
            sent.put(None)
            assert list(answers) == []
        except Exception as error:  # pylint: disable=broad-except
            failed.append(f"{number}: {error}")
            everyone.abort()

    everyone = threading.Barrier(100, timeout=TIMEOUT)
    talkers = [threading.Thread(target=talk, args=(number,)) for number in range(100)]
    for talker in talkers:
        talker.start()
    for talker in talkers:
        talker.join()
    assert not failed, failed[:3]


def unknown_method():
    try:
        method("unary_unary", "Nothing")(b"", timeout=TIMEOUT)
        raise AssertionError("it did not fail")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error


channel = grpc.insecure_channel(
    sys.argv[1],
    options=[
        ("grpc.default_authority", sys.argv[2]),
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ],
)
for promise in (
    unary_and_metadata,
    client_streaming,
    server_streaming,
    bidirectional_streaming,
    status_message_and_details,
    cancellation_reaches_the_server,
    deadlines,
    large_messages,
    a_hundred_streams_at_once,
    unknown_method,
):
    promise()
    print(promise.__name__, flush=True)
