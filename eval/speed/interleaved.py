"""Repeated measurements of several cases, interleaved, that go on where they stopped.

The first repeats of all cases come before the second ones, so that other load on the machine affects all cases alike.
"""

from collections.abc import Mapping
from dataclasses import asdict

from common.records import Records
from eval.speed.growth import GB, Curve
from eval.speed.measurement import Case, Measurement
from eval.speed.process import run_case


def find_measurement(records: Records, case: Case, repeat: int, environment: str, limit: float) -> Measurement | None:
    """Return a measurement that was made before, or None if there is none that holds.

    Args:
        records: what has been measured.
        case: what was measured.
        repeat: 0, 1, ...
        environment: of `describe_environment`; a measurement of another one does not hold.
        limit: seconds; a process that was stopped after fewer seconds does not hold.
    """
    row = records.find(asdict(case) | {"repeat": repeat})
    if row is None or row["environment"] != environment:
        return None
    measurement = Measurement(**{name: row[name] for name in Measurement.__dataclass_fields__})
    return None if measurement.outcome == "over limit" and row["limit"] < limit else measurement


def measure_interleaved(
    rows: Mapping[str, Mapping[int, Case]], records: Records, environment: str, repeats: int, max_seconds: float
) -> dict[str, dict[int, list[Measurement]]]:
    """Measure the cases that are missing from the records.

    Args:
        rows: name of a row -> length in tokens -> case.
        records: earlier measurements, to which new ones are added.
        environment: of `describe_environment`.
        repeats: measurements of each case, each in a fresh process.
        max_seconds: limit of a process.

    Returns:
        Name of a row -> length -> its measurements, in the order of `rows`.
    """

    def known(name: str) -> dict[int, list[Measurement]]:
        return {
            length: [
                found
                for repeat in range(repeats)
                if (found := find_measurement(records, case, repeat, environment, max_seconds)) is not None
            ]
            for length, case in rows[name].items()
        }

    for repeat in range(repeats):
        for length in sorted({length for cases in rows.values() for length in cases}):
            for name, cases in rows.items():
                if length not in cases or Curve(name, known(name), {}).failure(length):
                    continue
                if find_measurement(records, cases[length], repeat, environment, max_seconds):
                    continue
                measurement = Measurement(**run_case(cases[length], max_seconds))
                records.add(
                    asdict(cases[length]) | {"repeat": repeat},
                    environment=environment,
                    limit=max_seconds,
                    **asdict(measurement),
                )
                print(f"repeat {repeat + 1}, {name}, {length} tokens: {describe(measurement, length)}", flush=True)
    return {name: known(name) for name in rows}


def describe(measurement: Measurement, length: int) -> str:
    """Return the speed and the memory of a measurement of `length` tokens, or why there are none."""
    if measurement.outcome != "measured":
        return measurement.outcome
    return f"{length / measurement.seconds:,.0f} tokens/s, {measurement.peak / GB:.2f} GB"
