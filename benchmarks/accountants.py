"""The official accountant beside two others, on random schedules in the ranges that people use.

PLD (dp-accounting, the official figure, always an upper bound) against the PRV accountant of Opacus, which composes the
same losses in another way, and against RDP, which bounds both from above. A schedule is a number of rows (1e3 to 1e9),
a batch, a noise multiplier (0.35 to 20) and a number of steps (1 to 20,000), with an epsilon of 0.2 to 20 at the
default delta. PRV gets a tolerance of 0.3 % of epsilon; it adds its tolerance to what it returns.

Where they part, it is for a known reason, and the last rows show it: PRV at its default tolerance of 0.01 is far off
below epsilon 1, refuses very small delta, and asks for gigabytes where tiny rates meet many steps; PLD on its grid of
1e-4 over-counts many steps that each lose less than that, which is safe, and a finer grid brings it back to PRV.
"""

import argparse
import math
import time
import warnings
from typing import Any, NamedTuple

import numpy as np
from dp_accounting import dp_event
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

from benchmarks.report import write_report
from hf_spectral_dp.privacy.budget import PrivacyBudget, default_delta, epsilon_of

BAR = 0.01  # largest relative difference
MESH = 2**24  # points; each takes some hundred bytes
FINE = 1e-5  # grid for schedules whose steps are too small for the official one


class Schedule(NamedTuple):
    """Poisson batches of `num_examples` rows at `sampling_rate`, `steps` times, with `noise_multiplier`."""

    num_examples: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    delta: float

    def pld(self, **grid: float) -> float:
        """The official epsilon."""
        step = dp_event.PoissonSampledDpEvent(self.sampling_rate, dp_event.GaussianDpEvent(self.noise_multiplier))
        return epsilon_of(dp_event.SelfComposedDpEvent(step, self.steps), self.delta, **grid)

    def prv(self, tolerance: float) -> float:
        """Opacus's PRV epsilon: its upper bound, which is its estimate plus `tolerance`.

        NaN where it gives none, or would ask for a mesh of more than `MESH` points: its size is not bounded.
        """
        accountant = PRVAccountant()
        accountant.history = [(self.noise_multiplier, self.sampling_rate, self.steps)]
        single = PoissonSubsampledGaussianPRV(self.sampling_rate, self.noise_multiplier)
        errors = {"eps_error": tolerance, "delta_error": self.delta / 1000}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if accountant._get_domain(prvs=[single], num_self_compositions=[self.steps], **errors).size > MESH:
                    return math.nan
                return float(accountant.get_epsilon(self.delta, eps_error=tolerance))
        except (ValueError, RuntimeError):
            return math.nan

    def rdp(self) -> float:
        """Opacus's RDP epsilon, over its default orders."""
        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, self.sampling_rate, self.steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(self.delta))


def random_schedule(generator: np.random.Generator) -> Schedule:
    """A schedule of the ranges above."""
    while True:
        num_examples = round(10 ** generator.uniform(3, 9))
        batch = 10 ** generator.uniform(1.5, min(math.log10(num_examples / 2), 5.5))
        steps = round(10 ** generator.uniform(0, math.log10(20_000)))
        noise = 10 ** generator.uniform(math.log10(0.35), math.log10(20))
        schedule = Schedule(num_examples, batch / num_examples, noise, steps, default_delta(num_examples))
        if 0.5 < schedule.rdp() < 20:
            return schedule


def agreement(tried: int, seed: int = 0, seconds: float = math.inf) -> list[dict[str, Any]]:
    """Compares the accountants on random schedules, `tried` of them or as many as end within `seconds`."""
    generator, start = np.random.default_rng(seed), time.perf_counter()
    differences, fine, unanswered, above_rdp, worst_fine = [], 0, 0, 0, 0.0
    while len(differences) < tried and time.perf_counter() - start < seconds:
        schedule = random_schedule(generator)
        official = schedule.pld()
        if not 0.2 <= official <= 20:
            continue
        other = schedule.prv(0.003 * official)
        difference = other / official - 1
        above_rdp += official > schedule.rdp() * (1 + 1e-4)
        unanswered += math.isnan(other)
        if difference < -BAR:  # PLD is higher: because of its grid?
            fine += 1
            difference = other / schedule.pld(grid=FINE) - 1
            worst_fine = max(worst_fine, abs(difference))
        differences.append(difference)
    tried = len(differences)
    failed = sum(abs(difference) > BAR for difference in differences)
    largest = float(np.nanmax(np.abs(differences)))
    return [
        {
            "check": "PLD and PRV agree within 1 %",
            "tried": tried - unanswered,
            "failed": failed,
            "largest_difference": largest,
        },
        {"check": f"PRV answers, with a mesh of at most {MESH} points", "tried": tried, "failed": unanswered},
        {
            "check": f"of these, where PLD's grid over-counts by more than 1 %: agreement on a grid of {FINE:g}",
            "tried": fine,
            "failed": int(worst_fine > BAR),
            "largest_difference": worst_fine,
        },
        {"check": "PLD is at most RDP", "tried": tried, "failed": above_rdp},
    ]


def within_budget(tried: int, seed: int = 0, seconds: float = math.inf) -> dict[str, Any]:
    """Calibrates random budgets, one in three per way of forming batches, and looks at the epsilon of prefixes."""
    generator, start = np.random.default_rng(seed), time.perf_counter()
    done, failed, lowest = 0, 0, 1.0
    while done < tried and time.perf_counter() - start < seconds:
        num_examples = round(10 ** generator.uniform(3, 7))
        batch = round(10 ** generator.uniform(1.5, math.log10(num_examples / 2)))
        sampling = ("poisson", "truncated_poisson", "single_pass")[done % 3]
        steps = round(10 ** generator.uniform(0, math.log10(20_000)))
        target = float(10 ** generator.uniform(math.log10(0.2), 1))
        plan = PrivacyBudget(target).calibrate(
            num_examples=num_examples,
            sampling_rate=batch / num_examples,
            steps=steps,
            sampling=sampling,
            max_batch_size=math.ceil(batch + 6 * math.sqrt(batch)) if sampling == "truncated_poisson" else None,
        )
        prefixes = {1, steps, *generator.integers(1, steps + 1, 2).tolist()}
        failed += any(plan.epsilon(prefix) > target for prefix in prefixes)
        lowest = min(lowest, plan.epsilon() / target)
        done += 1
    return {
        "check": "no prefix of a calibrated plan is over its budget",
        "tried": done,
        "failed": failed,
        "least_of_budget_used": lowest,
    }


KNOWN = {
    "PRV at its default tolerance of 0.01, small epsilon": (Schedule(10**5, 0.01, 2.0, 100, 1e-6), 0.01),
    "the same at 0.3 % of epsilon": (Schedule(10**5, 0.01, 2.0, 100, 1e-6), 0.0007),
    "PRV at delta 1e-14, where it refuses (no figure)": (Schedule(10**9, 0.01, 1.0, 1000, 1e-14), 0.01),
    "PLD on its grid of 1e-4, 10^5 small steps": (Schedule(10**6, 1e-3, 5.0, 10**5, 1e-6), 0.0007),
}


def known_gaps() -> list[dict[str, Any]]:
    """Schedules on which one of the two is off, and which."""
    rows = []
    for name, (schedule, tolerance) in KNOWN.items():
        official, other = schedule.pld(), schedule.prv(tolerance)
        row: dict[str, Any] = {"check": f"known: {name}", "pld": official}
        if not math.isnan(other):
            row |= {"prv": round(other, 4), "largest_difference": abs(other / official - 1)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few schedules; ends within 50 seconds on two cores")
    parser.add_argument("--schedules", type=int, default=1000, help="random schedules (default 1000, half an hour)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedules; there is no other randomness")
    parser.add_argument("--out", help="file for the JSON report")
    arguments = parser.parse_args()
    seconds = 15 if arguments.quick else math.inf
    rows = agreement(arguments.schedules, arguments.seed, seconds)
    rows += [within_budget(arguments.schedules // 10, arguments.seed, seconds), *known_gaps()]
    command = "python -m benchmarks.accountants" + " --quick" * arguments.quick
    if not arguments.quick:
        command += f" --schedules {arguments.schedules} --seed {arguments.seed}"
    write_report(command, rows, arguments.out)


if __name__ == "__main__":
    main()
