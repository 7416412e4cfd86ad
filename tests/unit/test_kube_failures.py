"""What an answer of the API server means to the operator."""

import json

import pytest

from starcoder_operator.adapters.errors import AlreadyExists, ApiAbsent, Conflict, NotFound, Refused, Unavailable
from starcoder_operator.adapters.kube import failure

WEBHOOK = 'Internal error occurred: failed calling webhook "pods.example.com": connection refused'


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (404, {"details": {"name": "a"}}, NotFound),
        (404, {}, ApiAbsent),
        (409, {"reason": "AlreadyExists"}, AlreadyExists),
        (409, {"reason": "Conflict"}, Conflict),
        (401, {}, Unavailable),
        (403, {"reason": "Forbidden"}, Refused),
        (422, {"reason": "Invalid"}, Refused),
        (429, {}, Unavailable),
        (500, {"reason": "InternalError", "message": "etcdserver: request timed out"}, Unavailable),
        (500, {"reason": "InternalError", "message": WEBHOOK}, Refused),
        (503, {}, Unavailable),
    ],
)
def test_an_answer_is_told_apart_by_who_can_mend_it(code, status, kind):
    found = failure(code, json.dumps(status), what="create pods")
    assert type(found) is kind
    assert found.code == code
    assert status.get("message", "") in found.message


def test_an_answer_that_is_no_status_is_told_as_it_is():
    assert failure(502, "<html>bad gateway</html>", what="get x").message == "get x: <html>bad gateway</html>"
