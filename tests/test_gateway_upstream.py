"""When the gateway sends a request again, before a server that refuses as Triton does while it starts or is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_servers import listening
from tritonclient.grpc import service_pb2, service_pb2_grpc

from volcast.runtime.interface import text_of
from volcast.triton_repo.gateway import upstream
from volcast.triton_repo.gateway.refusal import Refusal
from volcast.triton_repo.gateway.upstream import Upstream


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`says` is a line for each stream: an error's text, "volume", "broken" (the connection) or "lost" (an answer first)."""

    def __init__(self, *says: str) -> None:
        self.says = list(says)

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.RepositoryIndexResponse()

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = service_pb2.ModelMetadataResponse()
        for name in ("seed", "ticket", "cancel"):
            answer.inputs.add(name=name, datatype="UINT64", shape=[1])
        return answer

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            if any(one.name == "cancel" for one in request.inputs):
                continue
            said = self.says.pop(0)
            if said == "broken":
                context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core")
            if said in ("volume", "lost"):
                answer = service_pb2.ModelInferResponse(id=request.id)
                answer.outputs.add(name="kind", datatype="UINT8", shape=[6])
                answer.raw_output_contents.append(b"volume")
                yield service_pb2.ModelStreamInferResponse(infer_response=answer)
            else:
                yield service_pb2.ModelStreamInferResponse(error_message=said)
            if said == "lost":
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def ask(server: Server, **options: Any) -> list[str]:
    """The kinds of all answers."""

    async def kinds(address: str) -> list[str]:
        one = Upstream(address, "model", patience_s=60)
        try:
            return [text_of(answer["kind"]) async for answer in one.answers({}, **options)]
        finally:
            await one.close()

    with listening(server) as address:
        return asyncio.run(kinds(address))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "LOST", 1)


STARTS = "Request for model is not at ready state"


def test_a_server_that_starts_may_refuse_many_times() -> None:
    assert ask(Server(STARTS, STARTS, STARTS, "volume")) == ["volume"]
    assert ask(Server("broken", "volume")) == ["volume"]
    assert (
        ask(Server("lost", STARTS, "[batcher] 9 samples wait already; retry in 0.1 s", "volume"))
        == ["volume"] * 2
    )


def test_a_request_that_ends_servers_is_given_up() -> None:
    server = Server("lost", "lost", "volume")
    with pytest.raises(Refusal, match="the server is away") as caught:
        ask(server)
    assert caught.value.code == "unavailable" and server.says == ["volume"]


@pytest.mark.parametrize(
    ("said", "code", "retry_s"),
    [("[batcher] 9 samples wait already; retry in 2.5 s", "unavailable", 2.5), ("[sample] steps=0: need 1..9", "invalid", None),
     ("[sample] after 3 of 9 steps: its deadline cannot be met any more", "unavailable", 1.0),
     ("bad allocation in /srv/model", "internal", None), ("[request] cancelled", "cancelled", None)],
)  # fmt: skip
def test_what_a_server_says_has_a_code(said: str, code: str, retry_s: float | None) -> None:
    server = Server(said, "volume")
    with pytest.raises(Refusal) as caught:
        ask(server)
    assert (caught.value.code, caught.value.retry_s) == (code, retry_s) and server.says == ["volume"]


def test_a_probe_is_not_sent_again() -> None:
    server = Server(STARTS, "volume")
    with pytest.raises(Refusal, match="the server is away"):
        ask(server, resend=False)
    assert server.says == ["volume"]
