"""What an API call can come to, as far as the operator has to tell cases apart."""

from __future__ import annotations


class KubeError(Exception):
    """An API call did not succeed. `message` is the server's own sentence where it said one."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        """HTTP status; 0: no answer."""
        self.reason = reason
        """metav1.Status reason, such as AlreadyExists."""


class NotFound(KubeError):
    """The object is not there. `ApiAbsent` where not even its API is."""


class ApiAbsent(NotFound):
    """The server does not serve this group, version or resource."""


class Conflict(KubeError):
    """Somebody else wrote first, or the object is of another uid: read again."""


class AlreadyExists(KubeError):
    """An object of that name is there."""


class Refused(KubeError):
    """The request itself is not acceptable: invalid, forbidden, over quota, or denied by admission. Trying again helps
    only after somebody has changed something."""


class Withheld(KubeError):
    """Not sent: we may not lead any more, and a creation carries nothing by which the server could tell."""


class Unavailable(KubeError):
    """No answer, or one that says later (5xx, 429). Nothing is known about the objects."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message, code=code, reason=reason)
        self.retry_after = retry_after
        """Seconds the server asked to wait; 0 where it did not."""
