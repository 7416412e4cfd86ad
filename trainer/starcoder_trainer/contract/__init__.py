"""What operator and trainer both speak: names, assignment, report, training configuration, ledger, exit codes.

Standard library only, so that either side can import it without the other's dependencies. Every type here is a
frozen dataclass with `to_json()` / `from_json()` (see `codec`); JSON keys are camelCase, unknown keys are ignored,
so that an older side can read what a newer one wrote.
"""
