"""grpc.health.v1 for one picker: which services are up, as the reference picker answers.

Alone, every service name is answered alike (charts and conformance probe `inference-extension`, Envoy the ext_proc name, kubelet
`liveness` and `readiness`): up once there is a pool to route to, until draining. With leader election `liveness` is always up, the names
a gateway asks for only on the leader, and any other name is SERVICE_UNKNOWN, as the status of an answer that is OK in gRPC's terms.
`Check` and `List` are served; `Watch` is not, as in the reference.

Asked, it asks: nothing is remembered between two checks, so that what a check says is so. Not here: why a pool is not there (pools),
who leads (sources.kubernetes.election).
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from epp._pb import epp_health_pb2 as pb

LIVENESS = "liveness"
READINESS = "readiness"
EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
SERVICES = ("", LIVENESS, READINESS, "inference-extension", EXT_PROC_SERVICE)
ROUTING_SERVICES = frozenset(("", READINESS, EXT_PROC_SERVICE))
"""Those that say whether requests may be sent here: plugins count, and leadership where there is an election."""

_Status = pb.HealthCheckResponse


def _yes() -> bool:
    return True


class Health:
    """`ready` once the picker has started and there is a pool to route to (empty or not); `draining` from SIGTERM on.

    `leading`: None without leader election, else whether this replica leads. The callables are asked with every check and must be cheap.
    """

    def __init__(
        self,
        *,
        live: Callable[[], bool] = _yes,
        protocol_matches: Callable[[], bool] = _yes,
        plugins_ready: Callable[[], bool] = _yes,
        leading: bool | None = None,
    ) -> None:
        """`live`: the pool was synced. `protocol_matches`: some parser speaks the pool's appProtocol. `plugins_ready`: all that have a say are."""
        self.ready = False
        self.draining = False
        self.live = live
        self.protocol_matches = protocol_matches
        self.plugins_ready = plugins_ready
        self.leading = leading

    def serving(self, service: str) -> bool:
        return self._status(service) == _Status.SERVING

    def check(self, request: bytes) -> bytes:
        """grpc.health.v1.Health/Check. Raises ValueError when the request can't be read."""
        try:
            service = pb.HealthCheckRequest.FromString(request).service
        except DecodeError as error:
            raise ValueError(str(error)) from None
        return pb.HealthCheckResponse(status=self._status(service)).SerializeToString()

    def list(self, _request: bytes) -> bytes:
        """grpc.health.v1.Health/List: the names that are known."""
        response = pb.HealthListResponse()
        for service in SERVICES:
            status = self._status(service)
            if status != _Status.SERVICE_UNKNOWN:
                response.statuses[service].status = status
        return response.SerializeToString()

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus:
        if self.leading is not None:
            if service == LIVENESS:
                return _Status.SERVING
            if service not in ROUTING_SERVICES:
                return _Status.SERVICE_UNKNOWN
        up = (
            self.ready
            and not self.draining
            and self.leading is not False
            and self.live()
            and self.protocol_matches()
            and (service not in ROUTING_SERVICES or self.plugins_ready())
        )
        return _Status.SERVING if up else _Status.NOT_SERVING


def is_serving(response: bytes) -> bool:
    """What a client of `check` learns."""
    return pb.HealthCheckResponse.FromString(response).status == pb.HealthCheckResponse.SERVING


def check_request(service: str) -> bytes:
    return pb.HealthCheckRequest(service=service).SerializeToString()
