"""The flags of `epp serve`: the reference picker's spellings and values, what they mean, and what is said of those without effect."""

import argparse

import pytest

from epp.config.compat_flags import REMOVED
from epp.config.options import MEBIBYTE, ServeOptions, add_picker_arguments, add_serve_arguments, ignored_flags, serve_options
from epp.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    serve = argparse.ArgumentParser(prog="epp serve")
    add_serve_arguments(serve)
    return serve


def options(*argv: str) -> ServeOptions:
    return serve_options(parser().parse_args(argv))


def ignored(*argv: str) -> list[str]:
    return [warning.split(" ")[0] for warning in ignored_flags(parser().parse_args(argv))]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        parser().parse_args(argv)
    assert raised.value.code == 2
    return capsys.readouterr().err


def clashes(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        options(*argv)
    return [str(problem) for problem in raised.value.problems]


def test_no_flags_are_the_defaults_of_the_options() -> None:
    assert options() == ServeOptions()
    assert ignored() == []


def test_the_shared_flags_alone_are_enough() -> None:
    up = argparse.ArgumentParser()
    add_picker_arguments(up)
    assert serve_options(up.parse_args(["--endpoint", "10.0.0.1:1"])) == ServeOptions(endpoints=("10.0.0.1:1",))
    assert ignored_flags(up.parse_args([])) == []


HELM = """
--pool-name vllm-qwen --pool-namespace default --pool-group inference.networking.k8s.io --zap-encoder json
--config-file /config/default-plugins.yaml --grpc-port 9002 --grpc-health-port=9003 --metrics-port=9090 --tracing=false --v=1
"""


def test_the_arguments_of_a_chart() -> None:
    argv = HELM.split()
    found = options(*argv)
    assert (found.pool_names, found.pool_namespace, found.pool_group) == (("vllm-qwen",), "default", "inference.networking.k8s.io")
    assert (found.config_file, found.zap_encoder, found.verbosity) == ("/config/default-plugins.yaml", "json", 1)
    assert ignored(*argv) == []


@pytest.mark.parametrize("argv", [["-pool-name=x"], ["-pool-name", "x"], ["--pool-name=x"], ["--pool-name", "x"]])
def test_one_dash_or_two(argv: list[str]) -> None:
    assert options(*argv).pool_names == ("x",)


@pytest.mark.parametrize(
    "argv", [["-v4"], ["-v=4"], ["-v", "4"], ["--v=4"], ["--v", "4"], ["-zap-log-level=debug"], ["--zap-log-level", "4"]]
)
def test_verbosity(argv: list[str]) -> None:
    assert options(*argv).verbosity == 4


@pytest.mark.parametrize(("level", "verbosity"), [("info", 1), ("INFO", 1), ("error", 0), ("panic", 0), ("debug", 4), ("7", 7)])
def test_levels_of_the_other_logger(level: str, verbosity: int) -> None:
    assert options("--zap-log-level", level).verbosity == verbosity


@pytest.mark.parametrize(("text", "value"), [("", True), ("=true", True), ("=T", True), ("=1", True), ("=false", False), ("=0", False)])
def test_switches(text: str, value: bool) -> None:
    found = options(
        f"--emit-endpoint-scores{text}", f"--allow-experimental-plugins{text}", f"-config-reload{text}", f"--secure-serving{text}"
    )
    assert (found.emit_endpoint_scores, found.allow_experimental_plugins, found.config_reload, found.secure_serving) == (value,) * 4


def test_a_switch_does_not_take_the_next_flag() -> None:
    found = options("--emit-endpoint-scores", "--disable-endpoint-subset-filter", "--endpoint", "h:1")
    assert found.emit_endpoint_scores
    assert found.disable_endpoint_subset_filter
    assert found.endpoints == ("h:1",)


def test_target_ports() -> None:
    found = options("--endpoint-selector=app in (a,b),!c", "--endpoint-target-ports=8000,8001", "-endpoint-target-ports", "8001,7000")
    assert found.endpoint_selector == "app in (a,b),!c"
    assert found.endpoint_target_ports == (8000, 8001, 7000)


def test_several_pools() -> None:
    found = options("--pool-name=a", "-pool-name", "b", "--pool-name=a", "--pool-name=")
    assert found.pool_names == ("a", "b")
    assert clashes(*[f"--pool-name=p{number}" for number in range(65)]) == ["--pool-name: at most 64 pools, not 65"]


def test_a_cluster() -> None:
    found = options("--kubeconfig=k", "--kube-context=c", "--ha-enable-leader-election", "--metrics-endpoint-auth", "--metrics-cert-dir=d")
    assert (found.kubeconfig, found.kube_context, found.ha_enable_leader_election) == ("k", "c", True)
    assert (found.metrics_endpoint_auth, found.metrics_cert_dir) == (True, "d")
    assert options().metrics_endpoint_auth is None
    assert options("--metrics-endpoint-auth=false").metrics_endpoint_auth is False


def test_our_own_flags() -> None:
    found = options("--resources-file=r.yaml", "--debug-decisions=0", "--config-reload=false", "--enable-debug-endpoints=false")
    assert found.resources_file == "r.yaml"
    assert found.debug_decisions == 0
    assert not found.config_reload
    assert not found.enable_debug_endpoints


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("64Mi", 64 * MEBIBYTE), ("1GB", 10**9), ("2GiB", 2 << 30), ("1.5Ki", 1536), ("1e3", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert options("--max-body-bytes", text).max_body_bytes == size


@pytest.mark.parametrize(
    ("flag", "text", "hint"),
    [
        ("--max-body-bytes", "0", "write 65536, 64Mi or 1G"),
        ("--max-body-bytes", "many", "write 65536, 64Mi or 1G"),
        ("--max-body-bytes", "=-5", "write 65536, 64Mi or 1G"),
        ("--grpc-max-recv-msg-size", "10Mx", "write 65536, 64Mi or 1G"),
        ("--grpc-max-send-msg-size", "=-1", "write 65536, 64Mi or 1G"),
        ("--drain-timeout", "30", "write 50ms, 2s or 1m30s"),
        ("--drain-timeout", "=-30s", "is negative"),
        ("--refresh-prometheus-metrics-interval", "5", "write 50ms, 2s or 1m30s"),
        ("--grpc-port", "70000", "is not a port"),
        ("--endpoint-target-ports", "8000;8001", "is not a port"),
        ("--endpoint-target-ports", "0", "can't be connected to"),
        ("--debug-decisions", "=-1", "at least 0"),
        ("--max-streams", "0", "at least 1"),
        ("--tracing", "=maybe", "is not true or false"),
        ("--zap-log-level", "loud", "write debug, info, error, panic or a number"),
        ("--tls-min-version", "TLS1.2", "VersionTLS12"),
        ("--no-such-flag", "=1", "unrecognized arguments: --no-such-flag=1"),
    ],
)
def test_what_does_not_fit_says_how_to_write_it(capsys: pytest.CaptureFixture[str], flag: str, text: str, hint: str) -> None:
    error = refused(capsys, flag + text if text.startswith("=") else f"{flag}={text}")
    assert hint in error
    assert error.count("\n") == 2  # a line of usage, not a page


@pytest.mark.parametrize("flag", REMOVED)
def test_metric_names_are_not_flags_any_more(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    for argv in ([f"{flag}=vllm:x"], [flag, "vllm:x"], [f"-{flag.lstrip('-')}=vllm:x"]):
        assert "core-metrics-extractor" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("argument", "plain"),
    [
        ("--tracing", "--tracing=false"),
        ("--enable-pprof", "--enable-pprof=false"),
        ("--enable-grpc-stream-metrics", "--enable-grpc-stream-metrics=0"),
        ("--zap-devel", "--zap-devel=false"),
        ("--zap-stacktrace-level=error", ""),
        ("--zap-time-encoding=epoch", "--zap-time-encoding=rfc3339"),
        ("--tls-min-version=VersionTLS13", "--tls-min-version=VersionTLS12"),
        ("--tls-cipher-suites=TLS_AES_128_GCM_SHA256", "--tls-cipher-suites="),
        ("--refresh-prometheus-metrics-interval=5s", ""),
        ("--grpc-max-recv-msg-size=10MiB", "--grpc-max-recv-msg-size=0"),
        ("--grpc-max-send-msg-size=1k", "--grpc-max-send-msg-size="),
        ("--workers=4", "--workers=1"),
        ("--model-server-metrics-port=8001", "--model-server-metrics-port=0"),
        ("--model-server-metrics-path=/m", "--model-server-metrics-path=/metrics"),
        ("--model-server-metrics-scheme=https", "--model-server-metrics-scheme=http"),
        ("--model-server-metrics-https-insecure-skip-verify=false", "--model-server-metrics-https-insecure-skip-verify"),
    ],
)
def test_flags_without_effect_are_accepted_and_said(argument: str, plain: str) -> None:
    options(argument)
    assert ignored(argument) == [argument.partition("=")[0]]
    if plain:
        assert ignored(plain) == []


def test_a_warning_says_why() -> None:
    (warning,) = ignored_flags(parser().parse_args(["--tracing"]))
    assert warning == "--tracing has no effect: no traces are emitted"


@pytest.mark.parametrize(
    ("argv", "problems"),
    [
        (["--pool-name=p", "--endpoint-selector=a=b", "--endpoint-target-ports=1"], ["--pool-name: can't be used together with --endpoint-selector"]),
        (["--endpoint-selector=a=b"], ["--endpoint-selector: needs --endpoint-target-ports"]),
        (["--endpoint-target-ports=1,2,3,4,5,6,7,8,9"], ["--endpoint-target-ports: at most 8 ports, not 9"]),
        (["--grpc-port=7000", "--grpc-health-port=7000"], ["--grpc-health-port: 7000 is taken by --grpc-port"]),
        (["--metrics-port=9003"], ["--metrics-port: 9003 is taken by --grpc-health-port"]),
        (["--metrics-client-ca-file=ca"], ["--metrics-client-ca-file: needs --metrics-cert-dir"]),
        (["--metrics-cert-dir=d", "--metrics-endpoint-auth=false"], ["--metrics-cert-dir: needs --metrics-client-ca-file or --metrics-endpoint-auth"]),
    ],
)  # fmt: skip
def test_flags_that_clash(argv: list[str], problems: list[str]) -> None:
    assert clashes(*argv) == problems


def test_any_free_port_may_be_asked_for_three_times() -> None:
    assert options("--grpc-port=0", "--grpc-health-port=0", "--metrics-port=0").metrics_port == 0


def test_eight_different_ports_may_be_named_twice() -> None:
    assert len(options("--endpoint-target-ports=1,2,3,4,5,6,7,8", "--endpoint-target-ports=8,1").endpoint_target_ports) == 8


def test_metrics_tls_that_is_whole_is_accepted() -> None:
    options("--metrics-cert-dir=d", "--metrics-client-ca-file=ca", "--metrics-endpoint-auth=false")
    options("--metrics-cert-dir=d")


def test_help_says_something_of_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    serve = parser()
    flags = [action for action in serve._actions if action.help != argparse.SUPPRESS]
    assert all(action.help for action in flags)
    assert all(action.option_strings[-1] in text for action in flags)
    assert not [flag for flag in REMOVED if flag in text]
