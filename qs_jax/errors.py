"""The exceptions users can catch; each message says what was wrong and what to do."""


class QuickSilverError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(QuickSilverError, ValueError):
    """A configuration is invalid, contradictory or not supported."""


class InputError(QuickSilverError, ValueError):
    """Tokens, lengths or masks given to an entry point cannot be used."""


class CheckpointError(QuickSilverError):
    """A checkpoint folder is missing, incomplete or damaged."""


class NonFiniteError(QuickSilverError, FloatingPointError):
    """Weights or logits hold NaN or infinity."""


class InternalError(QuickSilverError):
    """Something the library promises did not hold: a defect of ours, please report it."""
