"""How the ext_proc port and the metrics port speak: transport, TLS, who may connect. Each with what renews its certificate.

Not here: what is served there (extproc, console), when they open (app).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

from epp.clock import Clock
from epp.config.options import ServeOptions
from epp.errors import ConfigError, Problem
from epp.extproc import tls
from epp.extproc.grpc_aio import GrpcServer
from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import Health
from epp.extproc.limits import Limits
from epp.extproc.server import H2Server
from epp.extproc.session import Session


def ext_proc_server(
    options: ServeOptions,
    *,
    health: Health,
    limits: H2Limits,
    session_limits: Limits,
    clock: Clock,
    new_session: Callable[[bytes], Session],
) -> tuple[H2Server | GrpcServer, tls.Reloader | None]:
    """Raises ConfigError, StartError."""
    if options.client_ca_file and not options.secure_serving:
        raise ConfigError("command line", [Problem("--client-ca-file", "needs TLS: leave --secure-serving on")])
    pair = (tls.load(options.cert_path) if options.cert_path else tls.self_signed()) if options.secure_serving else None
    server: H2Server | GrpcServer
    if options.transport == "grpc":
        server = GrpcServer(
            new_session=new_session,
            health=health,
            message_bytes_max=limits.message_bytes_max,
            streams_max=limits.streams_max,
            clock=clock,
            tls=pair,
            client_ca_file=options.client_ca_file,
        )
    else:
        server = H2Server(
            health=health,
            session_limits=session_limits,
            limits=limits,
            clock=clock,
            new_session=new_session,
            tls=tls.server_context(pair, client_ca_file=options.client_ca_file) if pair else None,
        )
    renewed = pair is not None and options.cert_path and options.enable_cert_reload
    return server, tls.Reloader(options.cert_path, pair, server.present) if pair is not None and renewed else None


def metrics_tls(options: ServeOptions) -> tuple[ssl.SSLContext | None, tls.Reloader | None]:
    """Nothing for plain HTTP. Raises StartError."""
    if not options.metrics_cert_dir:
        return None, None
    flag = "--metrics-cert-dir"
    pair = tls.load(options.metrics_cert_dir, flag=flag)
    context = tls.server_context(
        pair, client_ca_file=options.metrics_client_ca_file, client_ca_flag="--metrics-client-ca-file", protocol="http/1.1"
    )
    return context, tls.Reloader(options.metrics_cert_dir, pair, lambda renewed: tls.use(context, renewed), flag=flag)
