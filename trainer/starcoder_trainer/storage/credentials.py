"""Credentials of S3 from the files of a mounted Secret, taken up anew whenever the files change.

kubelet swaps the files of a mounted Secret in place, so that a missing or wrong Secret can be mended while the Pod
waits; environment variables could not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from starcoder_trainer.contract.names import CREDENTIALS_KEYS

from .store import CredentialsMissing

SESSION_TOKEN = "AWS_SESSION_TOKEN"  # noqa: S105 - a file's name, not a token


@dataclass(frozen=True)
class Keys:
    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


def fingerprint(folder: Path | None) -> tuple[tuple[int, int, int], ...]:
    """Changes when a file of the Secret does; costs one stat() a file."""
    if folder is None:
        return ()
    found = []
    for name in (*CREDENTIALS_KEYS, SESSION_TOKEN):
        try:
            st = (folder / name).stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((st.st_ino, st.st_mtime_ns, st.st_size))
    return tuple(found)


def read_keys(folder: Path | None) -> Keys | None:
    """Keys in `folder`; None where it holds none of them, so that the SDK's default chain is asked.

    Raises:
        CredentialsMissing: one key is there and the other is not, or one is empty.
    """
    if folder is None:
        return None
    values = {name: _read(folder / name) for name in (*CREDENTIALS_KEYS, SESSION_TOKEN)}
    id_name, secret_name = CREDENTIALS_KEYS
    if values[id_name] is None and values[secret_name] is None:
        return None
    missing = [name for name in CREDENTIALS_KEYS if not values[name]]
    if missing:
        raise CredentialsMissing(
            f"S3 credentials in {folder}: {' and '.join(missing)} missing or empty; the Secret named by "
            f"storage.credentialsSecret needs both keys {' and '.join(CREDENTIALS_KEYS)}"
        )
    return Keys(values[id_name] or "", values[secret_name] or "", values[SESSION_TOKEN] or None)


def _read(path: Path) -> str | None:
    try:
        # A key pasted with a line end is the most common wrong Secret.
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
