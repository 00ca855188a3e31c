"""grpc.health.v1 for one picker: which services are up.

Any service name is answered (charts and conformance probe `inference-extension`, Envoy the ext_proc name, kubelet `liveness` and
`readiness`): the reference picker does so when it runs without leader election. Draining turns all but `liveness` NOT_SERVING.
`Check` and `List` are served; `Watch` is not, as in the reference.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from epp._pb import epp_health_pb2 as pb

LIVENESS = "liveness"
EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
SERVICES = ("", LIVENESS, "readiness", "inference-extension", EXT_PROC_SERVICE)


class Health:
    """`ready` once there is a pool to route to (empty or not); `draining` from SIGTERM on."""

    def __init__(self) -> None:
        self.ready = False
        self.draining = False

    def serving(self, service: str) -> bool:
        return self.ready and (not self.draining or service == LIVENESS)

    def check(self, request: bytes) -> bytes:
        """grpc.health.v1.Health/Check. Raises ValueError when the request can't be read."""
        try:
            service = pb.HealthCheckRequest.FromString(request).service
        except DecodeError as error:
            raise ValueError(str(error)) from None
        return pb.HealthCheckResponse(status=self._status(service)).SerializeToString()

    def list(self, _request: bytes) -> bytes:
        """grpc.health.v1.Health/List."""
        response = pb.HealthListResponse()
        for service in SERVICES:
            response.statuses[service].status = self._status(service)
        return response.SerializeToString()

    def _status(self, service: str) -> pb.HealthCheckResponse.ServingStatus:
        return pb.HealthCheckResponse.SERVING if self.serving(service) else pb.HealthCheckResponse.NOT_SERVING


def is_serving(response: bytes) -> bool:
    """What a client of `check` learns."""
    return pb.HealthCheckResponse.FromString(response).status == pb.HealthCheckResponse.SERVING


def check_request(service: str) -> bytes:
    return pb.HealthCheckRequest(service=service).SerializeToString()
