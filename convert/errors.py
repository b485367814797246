"""The one error of this package, and the report that gathers several problems."""

from __future__ import annotations

from qs_jax.errors import QuickSilverError

_SHOWN = 20  # of each heading


class ConversionError(QuickSilverError):
    """A checkpoint cannot be converted; nothing was written."""


class Problems:
    """Gathers problems under headings, to report all of them together."""

    def __init__(self) -> None:
        self._details: dict[str, list[str]] = {}

    def add(self, heading: str, detail: str) -> None:
        """Note one problem."""
        self._details.setdefault(heading, []).append(detail)

    def raise_if_any(self, subject: str) -> None:
        """Raise one ConversionError with everything that was noted about `subject`."""
        if not self._details:
            return
        lines = [f"{subject} cannot be converted:"]
        for heading, details in self._details.items():
            lines.append(f"  {heading} ({len(details)}):")
            lines += [f"    - {detail}" for detail in details[:_SHOWN]]
            if len(details) > _SHOWN:
                lines.append(f"    - ... and {len(details) - _SHOWN} more")
        raise ConversionError("\n".join(lines))
