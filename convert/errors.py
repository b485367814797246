"""The one error of this package, and the report that gathers several problems."""

from __future__ import annotations

from collections import defaultdict

from qs_jax.errors import CheckpointError

_SHOWN = 20  # of each heading


class ConversionError(CheckpointError):
    """A checkpoint cannot be converted; nothing was written."""


class Problems(defaultdict[str, list[str]]):
    """Problems under headings, to be reported all together."""

    def __init__(self) -> None:
        super().__init__(list)

    def add(self, heading: str, *details: str) -> None:
        """Note problems."""
        self[heading] += details

    def raise_if_any(self, subject: str) -> None:
        """Raise one ConversionError with everything that was noted about `subject`."""
        lines = [f"{subject} cannot be converted:"]
        for heading, details in self.items():
            shown = details[:_SHOWN]
            if len(details) > _SHOWN:
                shown.append(f"... and {len(details) - _SHOWN} more")
            if details:
                lines += [f"  {heading} ({len(details)}):", *(f"    - {each}" for each in shown)]
        if len(lines) > 1:
            raise ConversionError("\n".join(lines))
