"""What each fusion rule computes, as its model card says it: text that needs no formatting.

Numbers stand under the names of their options, whose values a card lists below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kifmerge.phases.rules import RuleName

_IMPORTANT = """\
important: a score above the (n - ceil(f * (n - 1)))-th smallest of the n scores, with
f = important_fraction; n counts the whole model (scope: global) or one tensor (scope: tensor)"""

_TWO_SIDED = f"""\
merged = base + a * (new - base) + b * (historical - start)

  important to new   important to historical   a                   b
  yes                yes                       shared_weights[0]   shared_weights[1]
  yes                no                        1                   0
  no                 yes                       0                   1
  no                 no                        1/2                 1/2    redundant: average
                                               0                   0      redundant: drop

start = new where historical_parent is new, else base
{_IMPORTANT}"""

_OF_MODELS = f"""\
merged = base + sum over i of a[i] * (model[i] - base)

a[i] = weights[i] / (sum of weights[j] over the models j that find the element important)
       for a model that finds it important, 0 for the others
where none does: a[i] = 1/N (redundant: average) or 0 (redundant: drop), of N models
{_IMPORTANT}"""

_UNITS = """\
new and historical importance are those of skill units (unit), min-max normalised over all units"""

_EQUATIONS: Mapping[RuleName, str] = {
    "recurrent-kif": _TWO_SIDED,
    "recurrent-kif-adaptive": """\
merged = base + sum over i of a[i] * (model[i] - start[i])

a = softmax(I[1] / temperature, ..., I[N] / temperature), element by element
I[i] = the scores of model i, min-max normalised over the whole model
start[i] = new for the historical model where historical_parent is new, else base""",
    "average": """\
merged = base + sum over i of (model[i] - start[i]) / N, of N models

start[i] = new for the historical model where historical_parent is new, else base""",
    "kif": f"""\
merged = a * new + (1 - a) * historical

  important to new   important to historical   a
  yes                yes                       shared_weights[0]
  yes                no                        1
  no                 yes                       0
  no                 no                        1/2

{_UNITS}
important: a score above the (1 - important_fraction) quantile of the units' scores""",
    "kif-adaptive": f"""\
merged = a * new + (1 - a) * historical

a = exp(I_new / temperature) / (exp(I_new / temperature) + exp(I_historical / temperature))
{_UNITS}""",
    "linear": """\
merged = sum over i of weights[i] * model[i]
         divided by the sum of weights[i] (normalise: true); without weights all are alike""",
    "task-arithmetic": """\
merged = base + scale * (sum over i of weights[i] * (model[i] - base))
         without weights each is 1""",
    "ties": """\
merged = base + scale * (sum of t[i]) / (sum of |weights[i]|)
         both over the models i whose t[i] has the elected sign; base where there is none

t[i] = weights[i] * (model[i] - base), kept where it is among the largest `density` part of that
       model's changes, over the whole model (scope: global) or the tensor (scope: tensor), else 0
elected sign = the sign of the sum of all t[i], plus where it is 0""",
    "magmax": """\
merged = base + scale * v

v = the one of all (model[i] - base) that is largest in magnitude, element by element""",
}


def equation(options: Mapping[str, Any]) -> str:
    """What a rule computes, in the form that its options ask for.

    Args:
        options: as recorded of a merge: ``rule``, and what it depends on.

    >>> print(equation({"rule": "average"}).splitlines()[0])
    merged = base + sum over i of (model[i] - start[i]) / N, of N models
    """
    rule: RuleName = options["rule"]
    if rule == "recurrent-kif" and options.get("weights") is not None:
        return _OF_MODELS
    return _EQUATIONS[rule]
