"""Errors a user can act on: one line that says where, what was found and what to do.

Owns the exception types that the command line prints without a traceback. Bugs stay ordinary exceptions.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a condition the user can mend; printed as one line, never with a traceback.

    Args:
        where: the recipe key, file or component concerned, e.g. `stages[2].rollout.max_tokens`.
        found: what is wrong, in plain words and with the offending value.
        fix: what to do about it.
    """

    def __init__(self, where: str, found: str, fix: str = "") -> None:
        super().__init__(where, found, fix)  # the arguments as given, so that it pickles between Ray processes
        self.where, self.found, self.fix = where, found, fix

    def __str__(self) -> str:
        line = f"{self.where}: {self.found}" if self.where else self.found
        return " ".join((f"{line}; {self.fix}" if self.fix else line).split())


class RecipeError(UserError):
    """The recipe is malformed or contradicts itself."""


class DataError(UserError):
    """A data source, a row of it or a model folder cannot be used as given."""


class RewardError(UserError):
    """A reward plugin cannot be loaded, or failed where the recipe says `on_failure: stop`."""


class GateError(UserError):
    """A stage used up its steps before its gate passed."""


class ParityError(UserError):
    """Learner and rollout engine disagree on the log-probabilities of sampled tokens."""


class ClusterError(UserError):
    """A worker could not be started, died, or missed its deadline."""
