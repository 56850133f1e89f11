"""Two rows of `rowsum` through a real client: client.py triton-http|triton-grpc|triton-shm|kserve ADDRESS MODEL [HOST]

Prints the totals. HOST is the Host header for those that can send one.
"""

import asyncio
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


def triton_grpc(address, model, _headers):
    from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(address)
    return client.infer(model, inputs(InferInput), outputs=[InferRequestedOutput("total")]).as_numpy("total")


def triton_shm(address, model, headers):
    """The values lie in system shared memory."""
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    from tritonclient.utils import shared_memory

    client = InferenceServerClient(address)
    key = f"/penstock-test-client-{id(client)}"
    region = shared_memory.create_shared_memory_region("values", key, SHM_BYTES)
    try:
        shared_memory.set_shared_memory_region(region, [VALUES])
        client.register_system_shared_memory("values", key, SHM_BYTES, headers=headers)
        values, factor = inputs(InferInput)
        values = InferInput("values", VALUES.shape, "FP32")
        values.set_shared_memory("values", VALUES.nbytes)
        answer = client.infer(model, [values, factor], outputs=[InferRequestedOutput("total")], headers=headers)
        client.unregister_system_shared_memory("values", headers=headers)
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


def main(client, address, model, host=None):
    ways = {"triton-http": triton_http, "triton-grpc": triton_grpc, "triton-shm": triton_shm, "kserve": kserve}
    totals = ways[client](address, model, {"host": host} if host else None)
    print(totals.reshape(-1).tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
