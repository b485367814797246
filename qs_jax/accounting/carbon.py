"""Energy and emissions of a call, by CodeCarbon's offline tracker (extra `carbon`).

Where the machine has energy counters they are read; elsewhere CodeCarbon estimates from the CPU's
model. `Meter.method` says which it was: an estimate is no measurement. Source: QuickSilver F.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from qs_jax.errors import InputError

_JOULES = 3.6e6  # of a kWh
_COUNTERS = {
    "intel_rapl": "measured with RAPL counters, whole machine",
    "windows_emi": "measured with the Windows energy meter, whole machine",
    "intel_power_gadget": "measured with Intel Power Gadget, whole machine",
}


@dataclasses.dataclass(frozen=True)
class Energy:
    """What a call took.

    Attributes:
      seconds: Wall time.
      joules: Of all parts.
      cpu_joules: Of the processor.
      gpu_joules: Of accelerators; 0 where CodeCarbon sees none.
      ram_joules: Of the memory, which CodeCarbon estimates from its size everywhere.
      grams_co2: Emissions equivalent, at the country's mean carbon intensity.
    """

    seconds: float
    joules: float
    cpu_joules: float
    gpu_joules: float
    ram_joules: float
    grams_co2: float


class Meter:
    """Measures calls, one at a time; nothing is written or sent.

    Args:
      country: ISO 3166 code of three letters, whose mean carbon intensity counts.
      cpu_watts: Power of the processor at full load, where it is known; None takes counters, or
        CodeCarbon's table of CPU models.

    Raises:
      InputError: CodeCarbon is not installed, or does not know the country.
    """

    def __init__(self, country: str = "USA", *, cpu_watts: int | None = None) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
            from codecarbon.input import DataSource
        except ImportError as error:
            raise InputError(
                "energy is measured with CodeCarbon: install qs-jax[carbon]."
            ) from error
        logging.getLogger("codecarbon").setLevel(logging.ERROR)  # the import sets another
        known = DataSource().get_global_energy_mix_data()
        if country not in known:
            raise InputError(
                f"CodeCarbon knows no country {country!r}: give a code of three letters, like USA."
            )
        self.country = country
        # The process's share of the machine, where there is no counter: others may be at work.
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code=country,
            tracking_mode="process",
            force_cpu_power=cpu_watts,
            force_mode_cpu_load=cpu_watts is not None,
            output_methods=[],
            allow_multiple_runs=True,
            log_level="error",
        )
        self._given = cpu_watts is not None

    def measure(self, call: Callable[[], Any]) -> Energy:
        """Energy of one call, which must wait for its results.

        A few seconds at least: an estimate samples the processor's load about once a second.
        """
        self._tracker.start_task()
        try:
            call()
        finally:
            found = self._tracker.stop_task()
        if found is None:
            raise InputError("CodeCarbon could not start: is another tracker running?")
        return Energy(
            seconds=float(found.duration),
            joules=float(found.energy_consumed) * _JOULES,
            cpu_joules=float(found.cpu_energy) * _JOULES,
            gpu_joules=float(found.gpu_energy) * _JOULES,
            ram_joules=float(found.ram_energy) * _JOULES,
            grams_co2=float(found.emissions) * 1e3,
        )

    @property
    def method(self) -> dict[str, str]:
        """How each part is known, in words: "cpu", "ram", and "gpu" where there is one.

        Detecting the hardware takes a second or two, once.
        """
        about = self._tracker.get_detected_hardware()
        found = {"ram": "estimated by CodeCarbon from the memory's size"}
        for part in self._tracker._hardware:  # the tracker tells it nowhere else
            kind, mode = type(part).__name__, getattr(part, "_mode", None)
            if kind == "GPU":
                found["gpu"] = f"measured with the device's own counters: {about['gpu_model']}"
            elif kind == "CPU":
                found["cpu"] = _COUNTERS.get(str(mode)) or self._estimated(part, mode, about)
        return found

    def _estimated(self, part: Any, mode: str | None, about: dict[str, Any]) -> str:
        watts = getattr(part, "_tdp", None)
        source = "given" if self._given else f"CodeCarbon's figure for {about['cpu_model']!r}"
        if mode == "cpu_load":
            return (
                f"estimated, no counters: the share of the processor that this process kept busy, "
                f"of {watts} W ({source})"
            )
        return f"estimated, no counters: {watts} W ({source}), however busy"
