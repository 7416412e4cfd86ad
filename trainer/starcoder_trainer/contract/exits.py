"""Exit codes of a worker process. Negative codes (signals) are the kernel's."""

OK = 0
"""Trained to the last iteration, last checkpoint written locally."""
USER_ERROR = 78
"""Configuration, data or import error that another try would meet again (EX_CONFIG of sysexits.h)."""
STORAGE = 74
"""Storage gave up after retries (EX_IOERR)."""
PEER_LOST = 75
"""A collective failed because another rank's connection broke (EX_TEMPFAIL)."""
FORMATION = 76
"""The process group did not form in time (EX_PROTOCOL)."""
CRASH = 70
"""Any other exception (EX_SOFTWARE)."""
