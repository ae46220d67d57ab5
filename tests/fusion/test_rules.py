"""The table of rules: what each looks at, and options that are refused before anything is read."""

import typing
from dataclasses import fields, replace

import pytest
import torch

from kifmerge.fusion.rules import RULES, FusionOptions, RuleName
from kifmerge.tensor import kif as kif_module
from kifmerge.tensor import mask_weights
from kifmerge.training.presets import KifOptions, RecurrentOptions, Rule

every_rule = pytest.mark.parametrize("name", RULES)
# Another value of each option than its default.
OTHER = {
    "important_fraction": 0.37,
    "scope": "tensor",
    "shared_weights": (0.25, 0.75),
    "redundant": "drop",
    "temperature": 1.5,
    "unit": "layer",
    "weights": (0.7, 1.9),
    "normalise": False,
    "scale": 0.6,
    "density": 0.77,
}
# What becomes of these is decided where masks, units and scores are made.
OF_EVIDENCE = {"important_fraction", "scope", "unit", "density"}


def fuse(options, plant=lambda tensors: None, parents=None):
    """The rule over random models, with masks and scores that bring all its cases about.

    Task vectors are differences between tensors, where the parents of the models are told.
    """
    generator = torch.Generator().manual_seed(3)
    base, *vectors = (torch.randn(64, generator=generator) for _ in range(3))
    plant([base, *vectors])
    if parents is not None:
        vectors = [
            v - (base if p is None else vectors[p]) for v, p in zip(vectors, parents, strict=True)
        ]
    masks = [torch.rand(64, generator=generator) < 0.5 for _ in range(2)]
    scores = [torch.rand(64, generator=generator) for _ in range(2)]
    shown = scores if "scores" in options.needs else masks
    shown = [] if options.needs == "nothing" else shown
    rule = RULES[options.rule]
    if rule.fuse_vectors is not None:
        return rule.fuse_vectors(base, vectors, shown, options)
    return rule.fuse_weights(vectors, shown, options)


# Options under which what a model holds counts for next to nothing, or for nothing.
INSIGNIFICANT = {
    "weights": [(1.0, 1e-30)],
    "scale": [0.0],
    "redundant": ["drop"],
    "shared_weights": [(1.0, 0.0)],
    "temperature": [1e-3],
}
INSIGNIFICANT_TO = {"linear": [(1.0, 0.0)], "task-arithmetic": [(0.0, 1.0)], "ties": [(1.0, 0.0)]}


class TestNonfinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @every_rule
    def test_rules_carry_it_on_as_they_say(self, name, value):
        rule = RULES[name]
        choices = [{}]
        for option in rule.options:
            choices += [{option: other} for other in INSIGNIFICANT.get(option, ())]
        choices += [{"weights": weights} for weights in INSIGNIFICANT_TO.get(name, ())]
        for place in (0, 1, 2) if rule.needs_base else (1, 2):
            for options in choices:
                for parents in ((None, None), (None, 0)) if rule.needs_base else (None,):
                    fused = fuse(
                        FusionOptions(rule=name, **options),
                        lambda tensors, place=place: tensors[place].fill_(value),
                        parents,
                    )
                    is_lost = bool(fused.isfinite().any())
                    assert is_lost != rule.carries_nonfinite, (place, options, parents)


class TestTable:
    def test_names_are_those_of_the_type(self):
        assert tuple(RULES) == typing.get_args(RuleName)

    @every_rule
    def test_each_rule_has_one_function(self, name):
        rule = RULES[name]
        assert (rule.fuse_vectors is None) != (rule.fuse_weights is None)
        assert rule.needs_base == (rule.fuse_vectors is not None)

    @every_rule
    def test_options_exist(self, name):
        known = {field.name for field in fields(FusionOptions)} - {"rule"}
        assert set(RULES[name].options) <= known
        assert set(OTHER) == known

    @every_rule
    @pytest.mark.parametrize("option", sorted(OTHER.keys() - OF_EVIDENCE))
    def test_rule_looks_at_the_options_that_it_names_and_at_no_others(self, name, option):
        plain = FusionOptions(rule=name)
        changed = replace(plain, **{option: OTHER[option]})
        differs = not torch.equal(fuse(plain), fuse(changed))
        assert differs == (option in RULES[name].options)

    @every_rule
    def test_records_the_rule_and_the_options_that_it_names(self, name):
        recorded = FusionOptions(rule=name).recorded()
        assert list(recorded) == ["rule", *RULES[name].options]
        assert recorded["rule"] == name

    def test_rules_of_the_loop_are_rules(self):
        assert {*typing.get_args(Rule)} - {"none"} <= set(RULES)

    @pytest.mark.parametrize("name", sorted({*typing.get_args(Rule)} - {"none"}))
    def test_loop_hands_on_all_that_its_rule_looks_at(self, name):
        told = {key: OTHER[key] for key in RULES[name].options if key != "weights"}
        assert RecurrentOptions(rule=name, **told).fusion == FusionOptions(rule=name, **told)

    @pytest.mark.parametrize("name", ["kif", "kif-adaptive"])
    def test_kif_hands_on_all_that_its_rule_looks_at(self, name):
        told = {key: OTHER[key] for key in RULES[name].options}
        found = KifOptions(**told).fusion(name)
        assert found.recorded() == FusionOptions(rule=name, **told).recorded()

    def test_defaults_are_those_of_the_loop_and_of_kif(self):
        for options, expected in (
            (RecurrentOptions(), FusionOptions()),
            (KifOptions(), FusionOptions(rule="kif")),
        ):
            for name in RULES[expected.rule].options:
                if name != "weights":
                    assert getattr(options, name) == getattr(expected, name), name

    def test_shared_weights_are_the_rule_s_own_unless_told(self):
        assert FusionOptions().shared_weights == mask_weights.DEFAULT_SHARED_WEIGHTS
        assert FusionOptions(rule="kif").shared_weights == kif_module.DEFAULT_SHARED_WEIGHTS
        told = FusionOptions(rule="kif", shared_weights=(0.5, 0.5))
        assert told.shared_weights == (0.5, 0.5)


class TestRefusals:
    @pytest.mark.parametrize(
        "options",
        [
            {"rule": "recurrent"}, {"scope": "tensors"}, {"redundant": "halve"},
            {"unit": "rank"}, {"important_fraction": 1.5}, {"important_fraction": -0.1},
            {"important_fraction": float("nan")}, {"density": 1.01}, {"density": float("nan")},
            {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")},
            {"shared_weights": (0.4,)}, {"weights": ()},
            {"weights": (1.0, float("inf"))}, {"weights": (float("nan"), 1.0)},
        ],
        ids=str,
    )  # fmt: skip
    def test_numbers_out_of_range_and_choices_that_do_not_exist(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            FusionOptions(**options)

    @pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0)])
    def test_weights_of_a_mean_add_up(self, weights):
        with pytest.raises(ValueError, match="weights must not add up to 0"):
            FusionOptions(rule="linear", weights=weights)
        plain = FusionOptions(rule="linear", weights=weights, normalise=False)
        assert plain.weights == weights
        assert FusionOptions(rule="task-arithmetic", weights=weights).weights == weights

    @pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -0.5)])
    def test_shares_of_models_are_positive(self, weights):
        with pytest.raises(ValueError, match="weights of recurrent-kif must be positive"):
            FusionOptions(weights=weights)
        for rule in ("linear", "task-arithmetic", "ties"):
            assert FusionOptions(rule=rule, weights=weights).weights == weights

    @pytest.mark.parametrize("shared", [(1.0, 1.0), (0.4, 0.7)])
    def test_shared_weights_of_kif_add_up_to_1(self, shared):
        with pytest.raises(ValueError, match=r"shared_weights .* add up to 1"):
            FusionOptions(rule="kif", shared_weights=shared)
        assert FusionOptions(shared_weights=shared).shared_weights == shared

    @pytest.mark.parametrize("option", ["scale", "shared_weights"])
    def test_numbers_that_are_not_finite(self, option):
        value = float("nan") if option == "scale" else (float("nan"), 0.5)
        with pytest.raises(ValueError, match=option):
            FusionOptions(**{option: value})
