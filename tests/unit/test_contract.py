"""What operator and trainer speak survives the wire, and what is no such document is refused with its place."""

import json
import subprocess
import sys

import pytest

from starcoder_trainer.contract import names
from starcoder_trainer.contract.assignment import Assignment, CheckpointRef, Layout, Member, Offer
from starcoder_trainer.contract.codec import ContractError
from starcoder_trainer.contract.ledger import Entry, Head, checkpoint_prefix, digest_of, shard_manifest_key
from starcoder_trainer.contract.report import Failure, Problem, Progress, Report, Verified
from starcoder_trainer.contract.worker import Exited, Start, Step, decode_line, encode_line

REF = CheckpointRef(attempt=2, step=50, digest="sha256:ab")
ASSIGNMENT = Assignment(
    run_uid="u",
    attempt=3,
    phase="run",
    members=(Member(0, "boot-a"), Member(1)),
    gpus_per_member=2,
    layout=Layout(tensor=2, pipeline=1, data=2),
    offer=Offer("198.18.17.5", 4000, REF),
)
REPORT = Report(
    boot_id="boot-a",
    pod="demo-w0-0",
    incarnation=0,
    node="n1",
    attempt=3,
    state="failed",
    progress=Progress(iteration=7, loss=1.5),
    verified=Verified(REF, "s3://b/p/a2/step-00000050", "2026-01-01T00:00:00Z", 12),
    failure=Failure("Crash", "boom", exit_code=-9, rank=1, iteration=7),
    problem=Problem("DataNotFound", "found nothing"),
    fenced_by=9,
)


@pytest.mark.parametrize("document", [ASSIGNMENT, REPORT, Head("u", "demo", 1, "n", "b", (Entry(5, 1, "d", "t", 9),))])
def test_a_document_survives_the_wire(document):
    assert type(document).from_json(document.to_json()) == document


def test_equal_documents_are_equal_bytes():
    again = Assignment.from_dict(dict(reversed(ASSIGNMENT.to_dict().items())))
    assert again.to_json() == ASSIGNMENT.to_json()


def test_keys_are_camel_case():
    assert json.loads(ASSIGNMENT.to_json())["gpusPerMember"] == 2


def test_what_a_newer_side_wrote_is_read_without_the_unknown_fields():
    value = ASSIGNMENT.to_dict() | {"invented": {"later": 1}}
    assert Assignment.from_dict(value) == ASSIGNMENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attempt": "3"}, r"\$\.attempt: found '3', expected int"),
        ({"attempt": True}, r"\$\.attempt: found True, expected int"),
        ({"phase": "dance"}, r"\$\.phase: found 'dance', expected one of hold, run, drain, stop"),
        ({"members": {}}, r"\$\.members: found dict, expected a list"),
        ({"members": [{"bootId": "x"}]}, r"\$\.members\[0\]\.index: missing, expected by Member"),
        ({"layout": None}, r"\$\.layout: found NoneType, expected an object \(Layout\)"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(change, message):
    with pytest.raises(ContractError, match=message):
        Assignment.from_dict(ASSIGNMENT.to_dict() | change)


def test_what_is_no_json_is_refused():
    with pytest.raises(ContractError, match="Report: not JSON"):
        Report.from_json(b"\xff\xfe")


@pytest.mark.parametrize(
    "message",
    [
        Exited(3, 1, -9, Failure("Crash", "killed")),
        Step(3, 0, 7, 56, 1000, 1.25, 3e-4, 0.5, 10.0, {"total": 0.5}),
        Start(3, (0, 1), ASSIGNMENT.layout, "198.18.17.5", 4000, None, {"a": 1}, "/scratch", "198.18.17.5"),
    ],
)
def test_a_message_to_the_fork_server_survives_a_line(message):
    line = encode_line(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_line(line) == message


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"type":"Nobody"}', b"garbage"])
def test_a_line_that_is_no_message_is_refused(line):
    with pytest.raises(ContractError, match="worker channel"):
        decode_line(line)


def test_only_a_listed_boot_id_has_a_place():
    assert ASSIGNMENT.place_of("boot-a") == 0
    assert ASSIGNMENT.place_of("someone") is None
    assert ASSIGNMENT.place_of("") is None, "an empty place belongs to nobody"


def test_names_are_derived_the_same_on_both_sides():
    assert names.pod_name("demo", 3, 2) == "demo-w3-2"
    assert names.lease_name("demo", 3) == "demo-w3"
    assert checkpoint_prefix(2, 50) == "a2/step-00000050"
    assert shard_manifest_key(2, 50, 7) == "a2/step-00000050/shard-00007.json"
    assert digest_of(b"").startswith("sha256:e3b0c442")


def test_the_contract_needs_the_standard_library_only():
    code = (
        "import sys, starcoder_trainer.contract.assignment, starcoder_trainer.contract.report, "
        "starcoder_trainer.contract.worker, starcoder_trainer.contract.config, starcoder_trainer.contract.ledger; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'pydantic', 'numpy', 'boto3', 'kubernetes'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
