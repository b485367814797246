"""Calibration to a quality budget: a search on one text, verified on another."""

from qs_jax.calibration.climb import Point
from qs_jax.calibration.fit_maps import fit_kv_maps
from qs_jax.calibration.observe import Observed, observe
from qs_jax.calibration.search import Calibration, calibrate, search

__all__ = ["Calibration", "Observed", "Point", "calibrate", "fit_kv_maps", "observe", "search"]
