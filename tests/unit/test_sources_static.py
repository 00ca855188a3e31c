"""--endpoint values."""

import pytest

from epp.errors import ConfigError
from epp.sources.static import parse_endpoints
from epp.types import Address, EndpointSpec


def test_addresses_with_and_without_names() -> None:
    assert parse_endpoints(["10.0.0.1:8000", "[::1]:8000", "big=10.0.0.2:8001", "six=[2001:db8::1]:80"]) == [
        EndpointSpec("10.0.0.1:8000", Address("10.0.0.1", 8000)),
        EndpointSpec("[::1]:8000", Address("::1", 8000)),
        EndpointSpec("big", Address("10.0.0.2", 8001)),
        EndpointSpec("six", Address("2001:db8::1", 80)),
    ]
    assert parse_endpoints([]) == []


def test_every_fault_is_told() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_endpoints(
            ["a=10.0.0.1:8000", "localhost:8000", "b=10.0.0.1:8000", "a=10.0.0.2:8000", "=10.0.0.3:80", "a b=10.0.0.4:80", "::1:80"]
        )
    assert raised.value.source == "--endpoint"
    assert [str(problem) for problem in raised.value.problems] == [
        "[1]: 'localhost:8000': 'localhost' is not an IP address (the destination header takes no host names)",
        "[4]: '=10.0.0.3:80': the name is empty",
        "[5]: 'a b=10.0.0.4:80': the name has blanks or control characters in it",
        "[6]: '::1:80': write an IPv6 address in brackets, [::1]:8000",
        "[2]: the address 10.0.0.1:8000 is given already at [0]",
        "[3]: the name 'a' is given already at [0]",
    ]


def test_a_name_of_any_length_is_not_taken() -> None:
    with pytest.raises(ConfigError, match="longer than 253"):
        parse_endpoints(["x" * 254 + "=10.0.0.1:80"])
