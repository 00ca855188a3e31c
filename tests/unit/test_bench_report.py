"""Rows as a table and as a document."""

import json

import epp
from bench.report import Column, document, machine, table, versions, write_json

COLUMNS = (Column("size", "size"), Column("cost", "cost us", ".1f"), Column("met", "met"))


def test_table_is_aligned_to_the_right():
    rows = [{"size": 1, "cost": 56.04, "met": True}, {"size": 128, "cost": 1200.0, "met": False}, {"size": 16}]
    assert table(rows, COLUMNS).splitlines() == [
        "size  cost us   met",
        "----  -------  ----",
        "   1     56.0  PASS",
        " 128   1200.0  MISS",
        "  16        -     -",
    ]


def test_table_without_rows_is_its_header():
    assert table([], COLUMNS).splitlines() == ["size  cost us  met", "----  -------  ---"]


def test_machine_names_the_processor(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Model: 9 @ 2 GHz\nprocessor\t: 1\nmodel name\t: Model: 9 @ 2 GHz\n")
    found = machine(cpuinfo)
    assert found["cpu"] == "Model: 9 @ 2 GHz"
    assert found["cores"] >= 1
    assert found["python"].startswith(("CPython 3.", "PyPy 3."))
    assert found["kernel"]


def test_machine_without_a_model_name_still_says_something(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor: 0\n")
    assert machine(tmp_path / "cpuinfo")["cpu"]


def test_versions_leave_out_what_is_not_installed():
    found = versions(["ngh2", "no-such-distribution"])
    assert found["epp"] == epp.__version__
    assert found["ngh2"]
    assert "no-such-distribution" not in found


def test_the_document_keeps_types(tmp_path):
    path = tmp_path / "deeper" / "out.json"
    write_json(path, document([{"size": 1, "cost": 1.5, "met": True}], ["ngh2"], {"rounds": 9}))
    content = json.loads(path.read_text())
    assert content["rows"] == [{"size": 1, "cost": 1.5, "met": True}]
    assert content["notes"] == {"rounds": 9}
    assert set(content) == {"rows", "machine", "versions", "notes"}
