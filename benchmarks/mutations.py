"""The bugs that `benchmarks.mutants` puts into the package: each has been found in some DP training code, or nearly."""

from dataclasses import dataclass

AUDIT = "mechanism audit"


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: what is wrong.
        replaced: (file of the package, fragment that occurs once, what takes its place).
        appended: (file of the package, lines put at its end); they must fail where what they change is gone.
        killers: `AUDIT`, or names below tests/, that ought to notice.
        quick: part of the short form.
    """

    name: str
    replaced: tuple[tuple[str, str, str], ...] = ()
    appended: tuple[tuple[str, str], ...] = ()
    killers: tuple[str, ...] = (AUDIT,)
    quick: bool = False


MECHANISM, CLIPPING, SAMPLING = "privacy/mechanism.py", "privacy/clipping.py", "privacy/sampling.py"
NOISE, TRAINER, BUDGET, BOOK = "privacy/noise.py", "trainer.py", "privacy/budget.py", "privacy/book.py"

# The clipper's mutants use its public methods only: an example is weighted through its loss, with a clipping norm so
# large that the real code leaves it alone. What is not finite stays the business of the real code.
_WEIGHTED = """
_real_init, _real_add, _real_take = PerExampleClipper.__init__, PerExampleClipper.add, PerExampleClipper.take
_real_norms = PerExampleClipper.per_example_norms


def _init(self, model, clipping_norm, *args, **kwargs):
    _real_init(self, model, clipping_norm, *args, **kwargs)
    self.mutant_model = model


PerExampleClipper.__init__ = _init


def _add_weighted_by(self, losses, batch_size, norms):
    "Clips by these norms in place of the examples' own."
    coefficients = self.clipping_norm / norms.clamp_min(self.clipping_norm)
    coefficients = torch.where(norms.isfinite(), coefficients, 1.0)
    clipping_norm, self.clipping_norm = self.clipping_norm, 1e30

    def weighted():
        values = losses()
        return values * coefficients.to(values.dtype)

    try:
        _real_add(self, weighted, batch_size)
    finally:
        self.clipping_norm = clipping_norm


def _only(self, names):
    "A clipper of these parameters alone; all others are frozen until `_thaw`."
    for name, parameter in self.parameters.items():
        parameter.requires_grad_(name in names)
    other = object.__new__(PerExampleClipper)
    _real_init(other, self.mutant_model, self.clipping_norm)
    return other


def _thaw(self):
    for parameter in self.parameters.values():
        parameter.requires_grad_(True)


def _norms_of(self, losses, batch_size, names):
    try:
        return _real_norms(_only(self, names), losses, batch_size)
    finally:
        _thaw(self)
"""


def _clipped_by(lines: str) -> tuple[tuple[str, str], ...]:
    """A clipper that clips by the norms that `lines` define, from self, losses and batch_size."""
    body = "\n".join("    " + line for line in lines.strip().splitlines())
    add = f"""

def _add(self, losses, batch_size, padding=0):
    if not batch_size:
        return _real_add(self, losses, batch_size)
    norms = _real_norms(self, losses, batch_size)
{body}
    _add_weighted_by(self, losses, batch_size, norms)


PerExampleClipper.add = _add
"""
    return ((CLIPPING, _WEIGHTED + add),)


_UNTIED = """
seen, swapped = set(), []
for module in self.mutant_model.modules():
    weight = module._parameters.get("weight")
    if weight is not None and weight in seen:
        module._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        swapped.append((module, weight))
    seen.add(weight)
assert swapped or not hasattr(self.mutant_model, "tied"), "nothing is tied"
other = object.__new__(PerExampleClipper)
_real_init(other, self.mutant_model, 1.0)
norms = _real_norms(other, losses, batch_size)
for module, weight in swapped:
    module._parameters["weight"] = weight
"""

_AFTER_SUM = """

def _take(self):
    sums = _real_take(self)
    norm = torch.sqrt(sum(total.double().square().sum() for total in sums.values()))
    return {name: total * min(1.0, self.clipping_norm / max(float(norm), 1e-30)) for name, total in sums.items()}


PerExampleClipper.take = _take
"""

_PER_LAYER = """

def _add(self, losses, batch_size, padding=0):
    for name in self.parameters if batch_size else ():
        try:
            other = _only(self, [name])
            _real_add(other, losses, batch_size)
            part = _real_take(other)[name]
        finally:
            _thaw(self)
        parts = self.__dict__.setdefault("mutant_parts", {})
        parts[name] = parts.get(name, 0) + part


def _take(self):
    return {**_real_take(self), **self.__dict__.pop("mutant_parts", {})}


PerExampleClipper.add, PerExampleClipper.take = _add, _take
"""

_POISONED = """

def _add(self, losses, batch_size, padding=0):
    _real_add(self, losses, batch_size)
    if batch_size and not _real_norms(self, losses, batch_size).isfinite().all():
        self.mutant_poisoned = True


def _take(self):
    factor = float("nan") if self.__dict__.pop("mutant_poisoned", False) else 1.0
    return {name: total * factor for name, total in _real_take(self).items()}


PerExampleClipper.add, PerExampleClipper.take = _add, _take
"""

_TWICE = """

def _add(self, losses, batch_size, padding=0):
    _real_add(self, losses, batch_size)
    _real_add(self, losses, batch_size)


PerExampleClipper.add = _add
"""

_STALE = """
norms, self.mutant_norms = getattr(self, "mutant_norms", norms), norms
if len(norms) != batch_size:
    norms = self.mutant_norms
"""

# The real norms, but for a layer whose norm is a sum over positions: as if positions were orthogonal.
_NO_CROSS_TERMS = """
wide = [name for name in self.parameters if name.startswith("wide.")]
if wide:
    norms = (norms.square() - _norms_of(self, losses, batch_size, wide).square() / 2).sqrt()
"""

_CLIPPED = ("test_clipping.py::test_every_share_stays_below_the_clipping_norm",)
_EQUALS = ("test_clipping.py::test_single_precision_within_a_millionth",)
_MEAN = ("test_trainer.py::test_without_noise_the_step_is_the_clipped_mean",)

_SHUFFLED = """

def _next_batch(self):
    size = max(1, round(self._owned * self.sampling_rate))
    if len(getattr(self, "mutant_order", ())) < size:
        self.mutant_order = self._generator.permutation(self._owned)
    batch, self.mutant_order = self.mutant_order[:size], self.mutant_order[size:]
    return np.sort(batch.astype(np.int64)) * self.world_size + self.rank


PoissonSampler.next_batch = _next_batch
"""

_NEVER_EMPTY = """
_real_next = PoissonSampler.next_batch


def _next_batch(self):
    batch = _real_next(self)
    return batch if len(batch) else self.next_batch()


PoissonSampler.next_batch = _next_batch
"""

_CHARGED_LATE = """
_real_step, _real_charge = DPTrainer.training_step, DPTrainer._charge


def _training_step(self, model, inputs, num_items_in_batch=None):
    self._charge = lambda: None
    try:
        result = _real_step(self, model, inputs, num_items_in_batch)
    finally:
        del self._charge
    self._charge()
    return result


DPTrainer.training_step = _training_step
"""

_EMPTY_IS_FREE = """
_real_step, _real_charge = DPTrainer.training_step, DPTrainer._charge


def _training_step(self, model, inputs, num_items_in_batch=None):
    if len(inputs["input_ids"]) == 0:
        self._charge = lambda: None
    try:
        return _real_step(self, model, inputs, num_items_in_batch)
    finally:
        self.__dict__.pop("_charge", None)


DPTrainer.training_step = _training_step
"""


def _seeded(generator: str) -> tuple[tuple[str, str], ...]:
    lines = f"""
_real_init = GaussianNoise.__init__


def _init(self, *args, **kwargs):
    _real_init(self, *args, **kwargs)
    self._generator = {generator}


assert hasattr(GaussianNoise(1.0), "_generator")
GaussianNoise.__init__ = _init
"""
    return ((NOISE, lines),)


_REUSED = """
_real_add_ = GaussianNoise.add_


def _add_(self, tensors):
    tensors = list(tensors)
    if not hasattr(self, "mutant_noise"):
        self.mutant_noise = [torch.zeros_like(tensor) for tensor in tensors]
        _real_add_(self, self.mutant_noise)
    for tensor, noise in zip(tensors, self.mutant_noise):
        tensor += noise


GaussianNoise.add_ = _add_
"""

_OPTIMISTIC = """
_real_event = PrivacyPlan.event


def _event(self, steps=None):
    return _real_event(dataclasses.replace(self, noise_multiplier=1.02 * self.noise_multiplier), steps)


PrivacyPlan.event = _event
"""

MUTANTS = (
    Mutant(
        "noise x 0.95",
        replaced=((MECHANISM, "GaussianNoise(noise_multiplier *", "GaussianNoise(0.95 * noise_multiplier *"),),
        quick=True,
    ),
    Mutant(
        "clip after sum",
        appended=((CLIPPING, _clipped_by("norms = torch.zeros_like(norms)")[0][1] + _AFTER_SUM),),
        killers=(AUDIT, *_EQUALS, *_MEAN),
        quick=True,
    ),
    Mutant(
        "noise missing on one parameter",
        replaced=((MECHANISM, "self.noise.add_(sums.values())", "self.noise.add_(list(sums.values())[1:])"),),
        quick=True,
    ),
    Mutant(
        "noise per micro-batch",
        replaced=(
            (MECHANISM, "sums = self.clipper.take()", "sums = sums or self.clipper.take()"),
            (MECHANISM, "            if self._rank == 0:\n                self.noise.add_(sums.values())\n", ""),
            (
                MECHANISM,
                "                self.clipper.add(partial(losses, some), len(some), padding)\n",
                "                self.clipper.add(partial(losses, some), len(some), padding)\n"
                "                part = self.clipper.take()\n"
                "                self.noise.add_(part.values())\n"
                "                sums = {name: sums[name] + part[name] for name in part} if sums else part\n",
            ),
            (MECHANISM, "        try:\n", "        sums = {}\n        try:\n"),
        ),
        killers=(AUDIT, "test_trainer.py::test_the_noise_has_the_planned_scale"),
        quick=True,
    ),
    Mutant(
        "division by the size of the batch drawn",
        replaced=((MECHANISM, "total / self.divisor", "total / max(1, len(rows))"),),
        quick=True,
    ),
    Mutant(
        "stale norms",
        appended=_clipped_by(_STALE),
        killers=(AUDIT, *_CLIPPED),
        quick=True,
    ),
    Mutant("contributions doubled", appended=((CLIPPING, _WEIGHTED + _TWICE),), killers=(AUDIT, *_CLIPPED), quick=True),
    Mutant(
        "noise from a seed in the code",
        appended=_seeded("np.random.default_rng(42)"),
        killers=(AUDIT, "test_noise.py::test_no_seed_reaches_the_noise"),
    ),
    Mutant(
        "noise from the global seed",
        appended=_seeded("np.random.default_rng(torch.initial_seed())"),
        killers=(AUDIT, "test_noise.py::test_no_seed_reaches_the_noise"),
        quick=True,
    ),
    Mutant("the same noise in every step", appended=((NOISE, _REUSED),)),
    Mutant(
        "norm over one layer only",
        appended=_clipped_by("norms = _norms_of(self, losses, batch_size, list(self.parameters)[:1])"),
        killers=(AUDIT, *_EQUALS),
    ),
    Mutant(
        "each layer clipped on its own to the whole norm",
        appended=((CLIPPING, _WEIGHTED + _PER_LAYER),),
        killers=(AUDIT, *_EQUALS),
    ),
    Mutant("norms 10 % too small", appended=_clipped_by("norms = 0.9 * norms"), killers=(AUDIT, *_CLIPPED)),
    Mutant("ghost norms without cross terms", appended=_clipped_by(_NO_CROSS_TERMS)),
    Mutant(
        "a tied weight counted once",
        appended=_clipped_by(_UNTIED),
        killers=(AUDIT, *_EQUALS),
    ),
    Mutant(
        "an example that is not finite spoils the sum",
        appended=((CLIPPING, _WEIGHTED + _POISONED),),
        killers=(AUDIT, "test_clipping.py::test_an_example_that_is_not_finite_counts_exactly_zero"),
        quick=True,
    ),
    Mutant(
        "an empty batch is skipped",
        replaced=(
            (
                MECHANISM,
                "        if self._rank == 0:\n",
                "        if self._rank == 0 and len(rows):\n",
            ),
        ),
        killers=(AUDIT, "test_trainer.py::test_an_empty_batch_is_still_a_noisy_charged_step"),
        quick=True,
    ),
    Mutant(
        "an empty batch is not charged",
        appended=((TRAINER, _EMPTY_IS_FREE),),
        killers=("test_trainer.py::test_an_empty_batch_is_still_a_noisy_charged_step",),
    ),
    Mutant(
        "the ledger is charged after the noise",
        appended=((TRAINER, _CHARGED_LATE),),
        killers=("test_trainer.py::test_no_noise_is_drawn_unless_it_was_paid_for",),
        quick=True,
    ),
    Mutant(
        "norms in the reduced precision that was asked for",
        replaced=((CLIPPING, "enabled=False), exact_products():", "enabled=False):"),),
        killers=(
            "test_clipping_precision.py::test_norms_and_sums_are_taken_in_full_float32_whatever_was_asked_for",
        ),
    ),
    Mutant(
        "rows of a weight that overlap count as two weights",
        replaced=((BOOK, "if of is weight and start < last and first < end:", "if False:"),),
        killers=("test_book.py::test_rows_that_share_entries_with_another_use_are_refused",),
    ),
    Mutant(
        "masks of dropout follow the public seed",
        replaced=((NOISE, "torch.set_rng_state(_keyed_state(keys))", "pass"),),
        killers=("test_trainer.py::test_what_the_model_draws_at_random_follows_no_public_seed",),
    ),
    Mutant(
        "random augmentation of a data set follows the public seed",
        replaced=(("batches.py", "with secret_coins():  # a data set that augments", "if True:  # a data set"),),
        killers=("test_batches.py::test_what_a_data_set_draws_is_secret",),
    ),
    Mutant(
        "hooks on backward see a private loss",
        replaced=((CLIPPING, "torch.autograd.backward(values, torch.ones_like(values))", "values.sum().backward()"),),
        killers=("test_trainer.py::test_no_hook_on_backward_sees_a_private_loss",),
    ),
    Mutant(
        "rounding errors of the accountant are not counted",
        replaced=((BUDGET, ".get_epsilon(delta - least / 2)", ".get_epsilon(delta)"),),
        killers=("test_budget.py::test_rounding_errors_of_many_sums_are_counted_where_delta_is_tiny",),
    ),
    Mutant(
        "a ledger with more charges than its plan counts as the plan",
        replaced=(("training_args.py", 'if ledger["max_charges"] != plan.steps:', "if False:"),),
        killers=("test_earlier_runs.py::test_ledgers_that_cannot_be_counted_are_refused_and_unused_ones_skipped",),
    ),
    Mutant(
        "weights that are unfrozen later take their gradient as it is",
        replaced=(("privacy/recording.py", "if parameter.requires_grad and parameter not in known:", "if False:"),),
        killers=("test_clipping_refusals.py::test_a_weight_that_is_unfrozen_later_is_refused",),
    ),
    Mutant(
        "a data set may give several rows for one unit",
        replaced=(("batches.py", "if any(len(values) != len(chosen) for values in batch.values()):", "if False:"),),
        killers=("test_batches.py::test_a_data_set_that_gives_more_rows_than_asked_for_is_refused",),
    ),
    Mutant(
        "coins that examples share pass",
        replaced=((CLIPPING, "if both[0] - twice or any(", "if False and any("),),
        killers=("test_clipping_refusals.py::test_a_coin_that_examples_share_is_refused",),
    ),
    Mutant(
        "a wrapper hides the runs of what it holds",
        replaced=(
            ("private_marks.py", 'network.modules() if hasattr(network, "modules") else [network]', "[network]"),
        ),
        killers=("test_private_marks.py::test_a_wrapper_hides_no_mark",),
    ),
    Mutant(
        "batches from a shuffled list",
        appended=((SAMPLING, _SHUFFLED),),
        killers=(
            "test_sampling.py::test_the_batch_size_is_binomial",
            "test_sampling.py::test_batches_are_independent_of_each_other",
        ),
        quick=True,
    ),
    Mutant(
        "empty batches are drawn again",
        appended=((SAMPLING, _NEVER_EMPTY),),
        killers=("test_sampling.py::test_empty_batches_are_given_not_skipped",),
    ),
    Mutant(
        "the accountant is told of 2 % more noise than there is",
        appended=((BUDGET, _OPTIMISTIC),),
        killers=("test_budget.py::test_the_epsilon_of_a_plan_is_that_of_the_noise_it_states",),
    ),
    Mutant(
        "earlier runs on the same data cost nothing",
        replaced=((BUDGET, "        if not self.earlier:\n            return own\n", "        return own\n"),),
        killers=(
            "test_budget.py::test_earlier_runs_cost_what_dp_accounting_says_of_all_events",
            "test_earlier_runs.py::test_two_runs_share_one_budget",
        ),
    ),
)

HARMLESS = Mutant(
    "the clipper wrapped as its mutants are, by the right norms",
    appended=_clipped_by("pass"),
    killers=(AUDIT, *_EQUALS, *_CLIPPED, *_MEAN),
)
"""Nothing may kill it: otherwise it would be the wrapper that dies, not the bug in it."""

__all__ = ["AUDIT", "HARMLESS", "MUTANTS", "Mutant"]
