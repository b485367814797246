"""The one error of this package, and how several problems become one readable report."""

from __future__ import annotations

from qs_jax.errors import QuickSilverError


class ConversionError(QuickSilverError):
    """A checkpoint cannot be converted; nothing was written."""


class Problems:
    """Collects what is wrong under headings, so that all of it is reported together."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, heading: str, detail: str) -> None:
        """Note one problem."""
        self._found.setdefault(heading, []).append(detail)

    def raise_if_any(self, subject: str, limit: int = 20) -> None:
        """Raise one error with every heading and up to `limit` details under each.

        Raises:
          ConversionError: Something was noted.
        """
        if not self._found:
            return
        lines = [f"{subject} cannot be converted:"]
        for heading, details in self._found.items():
            lines.append(f"  {heading} ({len(details)}):")
            lines += [f"    - {detail}" for detail in details[:limit]]
            if len(details) > limit:
                lines.append(f"    - ... and {len(details) - limit} more")
        raise ConversionError("\n".join(lines))
