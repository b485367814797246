"""What was made from parameters last, kept as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any


class LastMade:
    """Remembers one result, with weak references to the arrays it was made from."""

    def __init__(self) -> None:
        self._sources: list[weakref.ref] = []
        self._made: Any = None

    def __bool__(self) -> bool:
        return bool(self._sources)

    def get(self, sources: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave for these very arrays."""
        held = self._sources
        if len(held) == len(sources) and all(h() is s for h, s in zip(held, sources, strict=True)):
            return self._made
        self._forget()
        made = make()
        self._sources = [weakref.ref(source, self._forget) for source in sources]
        self._made = made
        return made

    def _forget(self, _: Any = None) -> None:
        self._sources, self._made = [], None
