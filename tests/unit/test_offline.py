"""`epp check`, `epp config print`, `epp plugins`: what they print, and their exit codes. Nothing is started."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from epp import cli
from epp.clock import VirtualClock
from epp.config.load import load
from epp.plugins.registry import BUILT_IN, Registry
from epp.scheduling.build import build

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
VALID = f"""{HEAD}
plugins:
- type: queue-scorer
- type: decode-filter
schedulingProfiles:
- name: default
  plugins: [{{pluginRef: decode-filter}}, {{pluginRef: queue-scorer, weight: 2}}]
"""
FAULTY = """
apiVersion: llm-d.ai/v1
kind: EndpointPicker
featureGate: []
featureGates: [flowcontrol]
plugins:
- type: queue-scorr
- type: load-aware-scorer
  parameters: {treshold: 3}
- type: prefix-cache-scorer
  parameters: {matchLengthWeight: 2}
- type: max-score-picker
- {type: random-picker, name: max-score-picker}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: load-aware-scorer, weight: heavy}, {pluginRef: queue-scorer}]
requestHandler:
  parsers: [{pluginRef: load-aware-scorer}]
"""


class Ran:
    """One run of the command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *argv: str) -> None:
        self.code = cli.main(list(argv))
        captured = capsys.readouterr()
        self.out, self.err = captured.out, captured.err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def given(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# epp check


def test_a_valid_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(VALID)
    ran = Ran(capsys, "check", str(file))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{file}: valid: 7 plugins; profiles: default (3 plugins)\n"


def test_every_fault_is_listed_with_its_path_and_what_was_meant(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(FAULTY)
    ran = Ran(capsys, "check", str(file))
    assert (ran.code, ran.out) == (2, "")
    head, *faults = ran.err.splitlines()
    assert head == f"epp: {file}: {len(faults)} problems"
    assert [fault.strip() for fault in faults] == [
        "featureGate: unknown field; did you mean featureGates?",
        "apiVersion: 'llm-d.ai/v1' is not llm-d.ai/v1alpha1 or inference.networking.x-k8s.io/v1alpha1",
        "kind: 'EndpointPicker' is not EndpointPickerConfig",
        "featureGates[0]: unknown feature gate 'flowcontrol'; did you mean flowControl?",
        "plugins[0].type: unknown plugin type 'queue-scorr'; did you mean queue-scorer?",
        "plugins[1].parameters.treshold: unknown parameter; did you mean threshold?",
        "plugins[2].parameters.matchLengthWeight: Expected `float` <= 1.0",
        "plugins[4].name: the name 'max-score-picker' is taken by plugins[3]; give each instance a name of its own",
        "schedulingProfiles[0].plugins[0].weight: must be a number, not a string",
        "schedulingProfiles[0].plugins[1].pluginRef: no plugin is named 'queue-scorer'; did you mean queue-scorr?",
        "requestHandler.parsers[0].pluginRef: 'load-aware-scorer' is a scorer, not a parser",
    ]


def test_what_only_plugins_can_see_is_a_fault_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(f"{HEAD}plugins: [{{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: nobody}}}}]\n")
    ran = Ran(capsys, "check", str(file))
    assert ran.code == 2
    assert "plugins[0].parameters: prefixMatchInfoProducerName: no plugin is named 'nobody'" in ran.err


def test_from_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given(monkeypatch, VALID)
    ran = Ran(capsys, "check", "-")
    assert (ran.code, ran.out.partition(":")[0]) == (0, "standard input")
    given(monkeypatch, FAULTY)
    assert Ran(capsys, "check", "-").code == 2


def test_a_file_that_is_not_there_or_can_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "check", str(tmp_path / "none.yaml"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"epp: {tmp_path}/none.yaml: 1 problem\n  can't be read: No such file or directory\n"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    ran = Ran(capsys, "check", str(tmp_path / "binary"))
    assert ran.code == 2
    assert "can't be read" in ran.err
    (tmp_path / "empty").write_text(" \n")
    ran = Ran(capsys, "check", str(tmp_path / "empty"))
    assert ran.code == 2
    assert "is empty" in ran.err


def test_warnings_are_said_and_are_no_fault(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(VALID.replace("llm-d.ai", "inference.networking.x-k8s.io") + "featureGates: [dataLayer]\n")
    ran = Ran(capsys, "check", str(file))
    assert ran.code == 0
    said = [line.removeprefix(f"{file}: warning: ") for line in ran.err.splitlines()]
    assert [line.partition(":")[0] for line in said] == ["apiVersion", "featureGates[0]"]


def test_alpha_plugins_have_to_be_allowed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(f"{HEAD}plugins: [{{type: topology-affinity-scorer}}]\n")
    ran = Ran(capsys, "check", str(file))
    assert ran.code == 2
    assert "--allow-experimental-plugins" in ran.err
    assert Ran(capsys, "check", "--allow-experimental-plugins", str(file)).code == 0


# epp config print


def same_again(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is a configuration that prints as itself, and that builds what it was printed from."""
    given(monkeypatch, text)
    again = Ran(capsys, "config", "print", "--allow-experimental-plugins", "-")
    assert (again.code, again.err, again.out) == (0, "", text)


def test_the_default_configuration_printed_is_a_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "config", "print")
    assert (ran.code, ran.err) == (0, "")
    document = yaml.safe_load(ran.out)
    (profile,) = document["schedulingProfiles"]
    assert [(each["pluginRef"], each.get("weight")) for each in profile["plugins"]] == [
        ("cost-aware-scorer", 1),
        ("max-score-picker", None),
    ]
    assert "approx-prefix-cache-producer" in [each["type"] for each in document["plugins"]], "what is added by itself is shown"
    same_again(ran.out, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("gates", "says"),
    [("", "# Flow control has its safe form, "), ("flowControl=false", "# Flow control is off, "), ("flowControl", "apiVersion: ")],
)
def test_the_form_of_flow_control_is_printed(gates: str, says: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(f"{HEAD}featureGates: [{gates}]\n")
    assert Ran(capsys, "config", "print", str(file)).out.startswith(says)


def test_a_password_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.yaml"
    kept = {"kvBlockIndexConfig": {"valkeyConfig": {"address": "valkeys://user:never-said@10.0.0.9:6379/0"}}}
    plugins = [{"type": "precise-prefix-cache-producer", "parameters": {"indexerConfig": kept}}, {"type": "prefix-cache-scorer"}]
    profiles = [{"name": "default", "plugins": [{"pluginRef": "prefix-cache-scorer"}]}]
    head = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig"}
    file.write_text(yaml.safe_dump({**head, "plugins": plugins, "schedulingProfiles": profiles}))
    ran = Ran(capsys, "config", "print", str(file))
    assert (ran.code, ran.err) == (0, "")
    assert "never-said" not in ran.out
    assert "valkeys://***@10.0.0.9:6379/0" in ran.out
    wrong = {"vllm": {"url": "ftp://user:never-said@x"}, "modelName": "m"}
    file.write_text(yaml.safe_dump({**head, "plugins": [{"type": "token-producer", "parameters": wrong}], "schedulingProfiles": []}))
    ran = Ran(capsys, "check", str(file))
    assert ran.code == 2
    assert "ftp://***@x" in ran.err
    assert "never-said" not in ran.err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_printed_means_the_same(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "config", "print", "--allow-experimental-plugins", str(path))
    assert ran.code == 0
    if "deprecated" not in path.stem and "headers-handler" not in ran.out and "- flowControl=true" not in ran.out:
        same_again(ran.out, monkeypatch, capsys)
    registry = Registry()

    def made(text: str) -> dict[str, object]:
        config = load(text, source="test", catalogue=registry, allow_experimental=True)
        built = build(config, registry, random.Random(1), VirtualClock())
        config = msgspec.structs.replace(built.config, api_version="", warnings=())
        return msgspec.to_builtins(config)

    assert made(ran.out) == made(path.read_text())


def test_a_faulty_configuration_is_not_printed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(FAULTY)
    ran = Ran(capsys, "config", "print", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert "did you mean" in ran.err


# epp plugins


def test_the_list_has_every_type_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "plugins", "list")
    assert (ran.code, ran.err) == (0, "")
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert lines.keys() >= set(BUILT_IN)
    registry = Registry()
    for type_, line in lines.items():
        assert line.split()[1] == "+".join(sorted(registry.role(type_))), line
        assert len(line.split(maxsplit=2)[2]) > 15, f"nothing is said of {type_}"
        assert ("(alpha)" in line) is (registry.stability(type_) == "alpha")
    assert lines["tokenizer"].endswith("deprecated: use token-producer")
    assert "max - q" in lines["queue-scorer"]
    assert list(lines) == sorted(lines)


@pytest.mark.parametrize("type_", sorted(BUILT_IN))
def test_every_type_can_be_shown(type_: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "plugins", "show", type_)
    assert (ran.code, ran.err) == (0, "")
    cls = Registry().load(type_)
    assert ran.out.startswith(f"{type_}  (")
    formula = (cls.__doc__ or "").strip().splitlines()[0]
    assert formula in ran.out
    fields = msgspec.structs.fields(cls)
    shown = [line.strip() for line in ran.out.partition("parameters:")[2].splitlines()]
    for each in fields:
        (line,) = [line for line in shown if line.startswith(f"{each.encode_name}: ")][:1]
        assert line.endswith("(required)") is each.required
    assert fields or "parameters: none" in ran.out
    for of_python in ("Annotated", "Union", "NoneType", "epp.plugins.scorers", "msgspec", "<class"):
        assert of_python not in ran.out.partition("parameters:")[2]


def test_parameters_are_shown_with_limits_defaults_and_what_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Ran(capsys, "plugins", "show", "prefix-cache-scorer").out
    assert "  matchLengthWeight: float, at least 0, at most 1 = 0.0\n  matchLengthScaleTokens: int, above 0 = 8192\n" in shown
    assert "requires: prefix-match\n" in shown
    shown = Ran(capsys, "plugins", "show", "endpoint-attribute-filter").out
    assert (
        "  algorithm: mapping (required)\n    type: threshold (required)\n    threshold: mapping (required)\n"
        "      operator: LessThan | LessThanOrEqual | GreaterThan | GreaterThanOrEqual | Equal | NotEqual (required)\n"
        "      value: float = 0.0\n"
    ) in shown
    shown = Ran(capsys, "plugins", "show", "token-producer").out
    assert '  backend: "" | estimate | vllm | uds | local | engine = ""\n  estimate: mapping | null = null\n' in shown
    assert "  conditions: list of mapping (required)\n    metric: " in Ran(capsys, "plugins", "show", "utilization-filter").out
    assert '  timeout: duration = "5s"\n' in Ran(capsys, "plugins", "show", "token-producer").out
    assert "deprecated: use disagg-profile-handler\n" in Ran(capsys, "plugins", "show", "pd-profile-handler").out


def test_defaults_that_are_shown_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands after `=` can be written in a configuration as it is."""
    registry = Registry()
    for type_ in BUILT_IN:
        shown = Ran(capsys, "plugins", "show", type_).out.partition("parameters:")[2].splitlines()
        outer = [line[2:].rpartition(" = ") for line in shown if line.startswith("  ") and line[2] != " " and " = " in line]
        parameters = {name.partition(":")[0]: json.loads(value) for name, _, value in outer}
        assert registry.problems(type_, parameters, "") == registry.problems(type_, {}, ""), type_


def test_a_class_written_as_a_type_and_a_type_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "plugins", "show", "epp.plugins.scorers.queue:QueueScorer")
    assert ran.code == 0
    assert "(max - q) / (max - min)" in ran.out
    ran = Ran(capsys, "plugins", "show", "queue-scorr")
    assert (ran.code, ran.out) == (2, "")
    assert "unknown plugin type 'queue-scorr'; did you mean queue-scorer?" in ran.err


BROKEN_MODULES = {
    "absent:X": (None, "'absent:X' can't be loaded: No module named 'absent'"),
    "unfinished:X": ("class X(", "SyntaxError: '(' was never closed"),
    "failing:X": ("1 / 0", "ZeroDivisionError: division by zero ({}/failing.py:1)"),
    "empty:X": ("", "'empty:X' can't be loaded: module 'empty' has no attribute 'X'"),
}


@pytest.mark.parametrize("type_", BROKEN_MODULES)
def test_a_module_that_can_not_be_loaded_is_a_fault_and_no_stack(
    type_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = BROKEN_MODULES[type_]
    monkeypatch.syspath_prepend(tmp_path)
    name = type_.partition(":")[0]
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code)
    file = tmp_path / "config.yaml"
    file.write_text(f"{HEAD}plugins: [{{type: '{type_}'}}]\n")
    for argv in (["check", str(file)], ["config", "print", str(file)], ["plugins", "show", type_]):
        ran = Ran(capsys, *argv)
        assert (ran.code, ran.out) == (2, "")
        assert said.format(tmp_path) in ran.err
        assert "Traceback" not in ran.err
    sys.modules.pop(name, None)


def test_what_only_this_machine_lacks_is_a_warning(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "m", "path": str(tmp_path / "none")}
    file.write_text(HEAD + yaml.safe_dump({"plugins": [{"type": "token-producer", "parameters": {"local": {"models": [model]}}}]}))
    ran = Ran(capsys, "check", str(file))
    assert ran.code == 0
    why = f"token-producer: local: {tmp_path}/none: can't be read: No such file or directory"
    assert ran.err == f"{file}: warning: plugins: a picker would not start here: {why}\n"
    assert ran.out.startswith(f"{file}: valid: ")


def test_several_files_are_checked_and_one_fault_decides_the_exit_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n")
    bad.write_text("kind: EndpointPickerConfig\n")
    ran = Ran(capsys, "check", str(bad), str(good))
    assert ran.code == 2
    assert f"{bad}: 1 problem" in ran.err
    assert f"{good}: valid" in ran.out
