"""Two rows of `rowsum` through a real client: client.py CLIENT ADDRESS MODEL [HOST [TIMES]]

CLIENT is triton-http, triton-http-async, triton-grpc, triton-shm or kserve. Prints the totals, which must be the same all
TIMES (once, unless said otherwise). HOST is the host that is asked for, where that is another than ADDRESS.
"""

import asyncio
import os
import sys

import numpy as np

VALUES = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
FACTOR = np.array([[1], [-2]], np.int64)
SHM_BYTES = 4096


def triton_http(address, model, headers):
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(address)
    answer = client.infer(model, inputs(InferInput), outputs=[InferRequestedOutput("total")], headers=headers)
    return answer.as_numpy("total")


def triton_http_async(address, model, headers):
    """Ten at a time over one client."""
    from tritonclient.http.aio import InferenceServerClient, InferInput, InferRequestedOutput

    async def ask():
        async with InferenceServerClient(address, conn_limit=10) as client:
            outputs = [InferRequestedOutput("total", binary_data=False)]
            asked = (client.infer(model, inputs(InferInput), outputs=outputs, headers=headers) for _ in range(10))
            answers = [answer.as_numpy("total") for answer in await asyncio.gather(*asked)]
        assert all((answer == answers[0]).all() for answer in answers), answers
        return answers[0]

    return asyncio.run(ask())


def triton_grpc(address, model, headers):
    from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

    authority = [("grpc.default_authority", headers["host"])] if headers else None
    client = InferenceServerClient(address, channel_args=authority)
    return client.infer(model, inputs(InferInput), outputs=[InferRequestedOutput("total")]).as_numpy("total")


def triton_shm(address, model, headers):
    """The values lie in system shared memory."""
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    from tritonclient.utils import shared_memory

    client = InferenceServerClient(address)
    # Other clients of the server have regions too.
    name = f"penstock-test-client-{os.getpid()}"
    region = shared_memory.create_shared_memory_region(name, f"/{name}", SHM_BYTES)
    try:
        shared_memory.set_shared_memory_region(region, [VALUES])
        client.register_system_shared_memory(name, f"/{name}", SHM_BYTES, headers=headers)
        values, factor = inputs(InferInput)
        values = InferInput("values", VALUES.shape, "FP32")
        values.set_shared_memory(name, VALUES.nbytes)
        answer = client.infer(model, [values, factor], outputs=[InferRequestedOutput("total")], headers=headers)
        client.unregister_system_shared_memory(name, headers=headers)
        return answer.as_numpy("total")
    finally:
        shared_memory.destroy_shared_memory_region(region)


def inputs(kind):
    tensors = [kind("values", VALUES.shape, "FP32"), kind("factor", FACTOR.shape, "INT64")]
    for tensor, data in zip(tensors, (VALUES, FACTOR)):
        tensor.set_data_from_numpy(data)
    return tensors


def kserve(address, model, headers):
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    tensors = [InferInput("values", list(VALUES.shape), "FP32"), InferInput("factor", list(FACTOR.shape), "INT64")]
    for tensor, data in zip(tensors, (VALUES, FACTOR)):
        tensor.set_data_from_numpy(data, binary_data=False)

    async def ask():
        client = InferenceRESTClient(RESTConfig(protocol="v2"))
        answer = await client.infer(f"http://{address}", InferRequest(model, tensors), headers=headers, model_name=model)
        return next(output for output in answer.outputs if output.name == "total").as_numpy()

    return asyncio.run(ask())


WAYS = {
    "triton-http": triton_http,
    "triton-http-async": triton_http_async,
    "triton-grpc": triton_grpc,
    "triton-shm": triton_shm,
    "kserve": kserve,
}


def main(client, address, model, host=None, times="1"):
    headers = {"host": host} if host else None
    totals = [WAYS[client](address, model, headers) for _ in range(int(times))]
    if not all((one == totals[0]).all() for one in totals):
        sys.exit(f"not the same each time: {totals}")
    print(totals[0].reshape(-1).tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
