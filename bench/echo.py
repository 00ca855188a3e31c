"""The baseline of `overhead`: the least an ext_proc server on grpc.aio can do and still be one.

It takes the whole body, answers with a fixed endpoint in header and metadata, gives the body back, then answers the response headers
and echoes each response chunk. No JSON, no prefix index, no choice, no metrics: what is left is the stock Python gRPC stack with
protobuf's C runtime. Nothing in it is slowed down on purpose: answers that never change are built once, the read/write API is used
(the generator API costs a little more), and a handler runs from message to message without tasks of its own.
"""

import argparse
import asyncio
import importlib.util
import json
import signal
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.struct_pb2 import Struct

from epp._pb.epp_ext_proc_pb2 import (
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HeaderValue,
    HeaderValueOption,
    ProcessingRequest,
    ProcessingResponse,
    StreamedBodyResponse,
)

DESCRIPTION = """\
An ext_proc server on grpc.aio that sends every request to one fixed endpoint. `overhead` starts it by itself; started by hand it
can be put behind a real Envoy. Prints {"port": N} when it is ready and runs until SIGTERM or SIGINT."""

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
DESTINATION_HEADER = "x-gateway-destination-endpoint"
REPLY_BODY_BYTES_MAX = 62_000
MESSAGE_BYTES_MAX = 64 * 1024 * 1024


def _destination_reply(endpoint: str) -> ProcessingResponse:
    lb = Struct()
    lb.update({DESTINATION_HEADER: endpoint})
    metadata = Struct()
    metadata.fields["envoy.lb"].struct_value.CopyFrom(lb)
    header = HeaderValueOption(
        header=HeaderValue(key=DESTINATION_HEADER, raw_value=endpoint.encode()),
        append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    return ProcessingResponse(
        request_headers=HeadersResponse(response=CommonResponse(header_mutation=HeaderMutation(set_headers=[header]))),
        dynamic_metadata=metadata,
    )


def _fill(streamed: StreamedBodyResponse, body: bytes, *, last: bool) -> None:
    """Written in place: a nested message passed to a constructor is copied, body and all, once a level."""
    streamed.body = body
    streamed.end_of_stream = last


def handler(endpoint: str) -> grpc.GenericRpcHandler:
    destination = _destination_reply(endpoint)
    response_headers_reply = ProcessingResponse(response_headers=HeadersResponse())

    async def process(_requests: Any, context: Any) -> None:
        read, write = context.read, context.write
        parts: list[bytes] = []
        while (message := await read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("request")
            if kind == "response_body":
                chunk = message.response_body
                reply = ProcessingResponse()
                _fill(reply.response_body.response.body_mutation.streamed_response, chunk.body, last=chunk.end_of_stream)
                await write(reply)
            elif kind == "request_body":
                parts.append(message.request_body.body)
                if message.request_body.end_of_stream:
                    await write(destination)
                    body = b"".join(parts)
                    parts.clear()
                    last_start = max(0, len(body) - 1) // REPLY_BODY_BYTES_MAX * REPLY_BODY_BYTES_MAX
                    for start in range(0, last_start + 1, REPLY_BODY_BYTES_MAX):
                        reply = ProcessingResponse()
                        streamed = reply.request_body.response.body_mutation.streamed_response
                        _fill(streamed, body[start : start + REPLY_BODY_BYTES_MAX], last=start == last_start)
                        await write(reply)
            elif kind == "response_headers":
                await write(response_headers_reply)
            elif kind == "request_headers" and message.request_headers.end_of_stream:
                await write(destination)

    method = grpc.stream_stream_rpc_method_handler(
        process, request_deserializer=ProcessingRequest.FromString, response_serializer=ProcessingResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Process": method})


async def start(port: int, endpoint: str) -> tuple[Any, int]:
    """A running server and its port; await its `stop(grace)` afterwards."""
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]
    )
    server.add_generic_rpc_handlers((handler(endpoint),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, bound


async def _serve(port: int, endpoint: str) -> None:
    server, bound = await start(port, endpoint)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    print(json.dumps({"port": bound}), flush=True)
    await stopping.wait()
    await server.stop(None)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=0, help="listen here on 127.0.0.1, plaintext (default: a free port)")
    parser.add_argument(
        "--endpoint", default="127.0.0.1:8000", metavar="HOST:PORT", help="the endpoint every answer names (default: %(default)s)"
    )
    parser.add_argument(
        "--loop",
        choices=("auto", "asyncio", "uvloop"),
        default="auto",
        help="event loop (default: uvloop where it is installed, as the picker)",
    )


def _loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if choice == "asyncio" or (choice == "auto" and importlib.util.find_spec("uvloop") is None):
        return None
    import uvloop

    return uvloop.new_event_loop


def run(args: argparse.Namespace) -> int:
    with asyncio.Runner(loop_factory=_loop_factory(args.loop)) as runner:
        runner.run(_serve(args.port, args.endpoint))
    return 0
