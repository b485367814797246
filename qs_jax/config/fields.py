"""Types of fields, checked by pydantic, and the base class of every configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, dataclass_transform, get_args, no_type_check

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from qs_jax.errors import ConfigError


def _from_numpy(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("nan", "Input should be a number")
    return value


def _threshold(value: Any) -> Any:
    return TypeAdapter(Number if np.ndim(value) == 0 else Numbers).validate_python(value)


def _function(value: Any) -> Any:
    """A hashable object of the caller's own, or the one that "module:name" stands for."""
    if not isinstance(value, str):
        if not isinstance(value, Hashable):
            raise ConfigError(f"{value!r} must be hashable: a function, or a frozen dataclass.")
        return value
    module, _, name = value.partition(":")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        return found() if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{value!r} cannot be imported as module:name: {error}.") from error


def name_of(value: Any) -> str:
    """The "module:name" of a function, or of an object that its class makes without arguments.

    A string is its own name.
    """
    if isinstance(value, str):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


def _reference(value: Any) -> str:
    """What JSON holds of it: `name_of` where that is read as an equal one, else its `repr`.

    The latter is refused where it is read.
    """
    with contextlib.suppress(ConfigError):
        if _function(name_of(value)) == value:
            return name_of(value)
    return repr(value)


_NumPy = BeforeValidator(_from_numpy)
ONE_OR_MORE = BeforeValidator(lambda v: (v,) if isinstance(v, str | int | np.integer) else v)
Flag = Annotated[bool, _NumPy, Strict()]
Integer = Annotated[int, _NumPy, Strict()]
Count = Annotated[Integer, Field(ge=0)]
Positive = Annotated[Integer, Field(ge=1)]
Several = Annotated[Integer, Field(ge=2)]
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]
Integers = Annotated[tuple[Integer, ...], _NumPy]
Number = Annotated[float, _NumPy, AfterValidator(_not_nan)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[Number, Field(gt=0, le=1)]
Ratio = Annotated[Number, Field(ge=0, le=1)]
Percentile = Annotated[Number, Field(ge=0, le=100)]
Share = Annotated[Number, Field(gt=0, lt=1)]
Numbers = Annotated[tuple[Number, ...], _NumPy]
# A function or an object with methods, which a user writes; JSON has its "module:name".
Function = Annotated[Any, PlainValidator(_function)]


def named_or_own(names: Any) -> PlainValidator:
    """Validator of a field that takes one of a Literal's names, or a `Function`."""

    def check(value: Any) -> Any:
        named = isinstance(value, str) and (value in get_args(names) or ":" not in value)
        return TypeAdapter(names if named else Function).validate_python(value)

    return PlainValidator(check)


# One number, or one for each layer.
Threshold = Annotated[float | tuple[float, ...], PlainValidator(_threshold)]


@contextlib.contextmanager
def _config_errors(path: str, names: Sequence[str] = ()) -> Iterator[None]:
    """Turn pydantic's errors into a `ConfigError` that names fields by their path.

    `names` are the object's fields, in the order of positional arguments.
    """
    try:
        yield
    except ValidationError as error:
        raise ConfigError(
            " ".join(_message(path, names, each) for each in error.errors(include_url=False))
        ) from error


def _message(path: str, names: Sequence[str], error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":  # a ConfigError
        return str(error["ctx"]["error"])
    first, *rest = error["loc"] or ("",)
    first = names[first] if isinstance(first, int) and names else first
    if str(path).startswith("--"):  # an option takes its values as they come
        first, rest = "", ()
    name = ".".join(str(part) for part in (path, first, *rest) if part != "")
    if error["type"] in ("missing", "missing_argument", "unexpected_keyword_argument"):
        return f"{name} is {'missing' if 'missing' in error['type'] else 'unknown'}."
    _, should, rule = error["msg"].partition(" should ")
    rule = rule.replace("greater than or equal to", "at least")
    rule = rule.replace("less than or equal to", "at most")
    return f"{name} must {rule}, got {error['input']!r}." if should else f"{name}: {error['msg']}."


def parse(name: str, value: Any, kind: Any) -> Any:
    """Check one value, an argument called `name`, against one of the types above."""
    with _config_errors(name):
        return TypeAdapter(kind).validate_python(value)


@no_type_check  # it converts lists and NumPy's numbers itself
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class that makes its subclasses frozen dataclasses, checked when they are made."""

    def __init_subclass__(cls, path: str = "") -> None:
        dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
        validate = cls.__init__

        @functools.wraps(validate)
        def init(self: Any, *args: Any, **fields: Any) -> None:
            with _config_errors(path, tuple(cls.__dataclass_fields__)):
                validate(self, *args, **fields)

        cls.__init__ = init

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes` applied and checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, infinite numbers as "inf" and "-inf"; `from_dict` is the inverse."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: _to_json(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; ConfigError for unknown or missing fields, or wrong values."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"settings must be an object, got {fields!r}.")
        return cls(**fields)


def _to_json(value: Any) -> Any:
    value = _from_numpy(value)
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return str(value) if math.isinf(value) else value
    return _reference(value)
