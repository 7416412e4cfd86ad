"""What `helm test` runs, in the operator's image, under its ServiceAccount: the operator is ready, runs are served."""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def ask(url: str, headers: dict[str, str], trust: ssl.SSLContext | None, seconds: float = 60.0) -> bytes:
    """Body of the answer; tries again until `seconds` have passed, then exits with what was found last."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=5, context=trust
            ) as answer:
                return answer.read()
        except urllib.error.HTTPError as e:
            found = f"{e.code}: {e.read().decode(errors='replace').strip()}"
        except OSError as e:
            found = str(e)
        if time.monotonic() > give_up:
            sys.exit(f"FAILED: {url}: found {found}, expected 200")
        time.sleep(1)


ready = ask(os.environ["READY_URL"], {}, None)
print("the operator is ready:", ready.decode().strip())

host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
host = f"[{host}]" if ":" in host else host
namespace = os.environ["RUNS_NAMESPACE"]
path = f"namespaces/{namespace}/starcoderruns" if namespace else "starcoderruns"
runs = ask(
    f"https://{host}:{port}/apis/starcoder.dev/v1alpha1/{path}?limit=1",
    {"Authorization": "Bearer " + (ACCOUNT / "token").read_text(), "Accept": "application/json"},
    ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")),
)
kind = json.loads(runs)["kind"]
if kind != "StarCoderRunList":
    sys.exit(f"FAILED: found kind {kind}, expected StarCoderRunList")
print("the API server serves StarCoderRuns, and the operator's ServiceAccount may list them")
