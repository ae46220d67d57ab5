"""What each fusion rule computes, as its model card says it: text that needs no formatting.

Options stand under their names; a card lists their values below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kifmerge.fusion.rules import RuleName

_VECTORS = """\
v[i] = model[i] - base; where historical_parent is new, v[historical] = historical - new"""

_IMPORTANT = """\
important: a score above the (n - ceil(f * (n - 1)))-th smallest of the n scores, with
f = important_fraction; n counts the whole model (scope: global) or one tensor (scope: tensor)"""

_UNITS = """\
importance is that of skill units (unit), min-max normalised over all units of a model"""

_TWO_SIDED = f"""\
merged = base + a * v[new] + b * v[historical]

  important to new   important to historical   a                   b
  yes                yes                       shared_weights[0]   shared_weights[1]
  yes                no                        1                   0
  no                 yes                       0                   1
  no                 no                        1/2                 1/2    redundant: average
                                               0                   0      redundant: drop

{_VECTORS}
{_IMPORTANT}"""

_WEIGHTED = f"""\
merged = base + sum over i of a[i] * v[i]

a[i] = weights[i] / (sum of weights[j] over the models j that find the element important)
       for a model that finds it important, 0 for the others
       where none does: 1/N of N models (redundant: average), or 0 (redundant: drop)
{_VECTORS}
{_IMPORTANT}"""

EQUATIONS: Mapping[RuleName, str] = {
    "recurrent-kif": _TWO_SIDED,
    "recurrent-kif-adaptive": f"""\
merged = base + sum over i of a[i] * v[i]

a = softmax(I[1] / temperature, ..., I[N] / temperature), element by element
I[i] = the scores of model i, min-max normalised over the whole model
{_VECTORS}""",
    "average": f"""\
merged = base + (v[1] + ... + v[N]) / N

{_VECTORS}""",
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
merged = sum over i of weights[i] * model[i], by default with equal weights
         divided by the sum of weights[i] (normalise: true)""",
    "task-arithmetic": f"""\
merged = base + scale * (sum over i of weights[i] * v[i]), by default with weights of 1

{_VECTORS}""",
    "ties": f"""\
merged = base + scale * (sum of t[i]) / (sum of |weights[i]|)
         both over the models whose t[i] has the elected sign; the base where there is none

t[i] = weights[i] * v[i] where v[i] is among the largest `density` part of that model's, over the
       whole model (scope: global) or the tensor (scope: tensor), else 0; by default weights of 1
elected sign = that of the sum of all t[i], plus where it is 0
{_VECTORS}""",
    "magmax": f"""\
merged = base + scale * v

v = of all v[i] the one that is largest in magnitude, element by element
{_VECTORS}""",
}


def equation(options: Mapping[str, Any]) -> str:
    """What a rule computes, in the form that its options ask for.

    Args:
        options: as recorded of a merge: ``rule``, and what it depends on.

    >>> print(equation({"rule": "average"}).splitlines()[0])
    merged = base + (v[1] + ... + v[N]) / N
    """
    rule: RuleName = options["rule"]
    if rule == "recurrent-kif" and options.get("weights") is not None:
        return _WEIGHTED
    return EQUATIONS[rule]
