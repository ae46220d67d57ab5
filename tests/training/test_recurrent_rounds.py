"""The rounds over live parameters, without a Trainer: threads, accumulators, memory."""

import pytest
import tiny
import torch

from kifmerge import ImportanceOptions, RecurrentRounds, importance_threshold, trained_parameters
from kifmerge.checkpoint.scores import open_scores
from kifmerge.fusion.selection import ScoreStream
from kifmerge.training import threads
from kifmerge.training.importance import write_accumulator
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.threads import training_workers

RULES = ["recurrent-kif", "recurrent-kif-adaptive", "average"]


def after_one_round(*, before_fusion=lambda rounds: None, fuses=True, **options):
    """Rounds, model and what the round did; gradients drawn at random."""
    model = tiny.llama()
    parameters = trained_parameters(model)
    rounds = RecurrentRounds(parameters, RecurrentOptions(**options), fuses=fuses)
    generator = torch.Generator().manual_seed(0)

    def step(role):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.sub_(parameter.grad, alpha=0.01)
        rounds.observe(role)

    for _ in range(3):
        step("new")
    rounds.begin_outer()
    for _ in range(2):
        step("historical")
    before_fusion(rounds)
    return rounds, model, rounds.fuse(inner_steps=3, outer_steps=2, outer_loss=0.0)


@pytest.fixture
def two_threads(monkeypatch):
    """Torch with two threads, and nothing too small for a worker."""
    monkeypatch.setattr(threads, "_WORTH_NUMEL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rule", RULES)
def test_threads_change_no_bit(monkeypatch, two_threads, rule):
    nums = []
    pool = threads.worker_pool
    monkeypatch.setattr(threads, "worker_pool", lambda num: nums.append(num) or pool(num))
    together, model, done = after_one_round(rule=rule)
    assert {*nums} == {2}
    monkeypatch.setattr(threads, "_WORTH_NUMEL", 1 << 40)
    nums.clear()
    alone, same_model, same_done = after_one_round(rule=rule)
    assert {*nums} == {0}
    assert done == same_done
    assert tiny.same(tiny.trained(model), tiny.trained(same_model))
    assert tiny.same(together.state_dict(), alone.state_dict())


def test_workers_have_one_torch_thread_and_leave_torch_its_own(two_threads):
    with training_workers([torch.ones(10)]) as workers:
        assert workers.num == 2
        assert {*workers.map(lambda _: torch.get_num_threads(), range(4))} == {1}
    assert torch.get_num_threads() == 2


def test_accelerators_do_not_need_workers(two_threads):
    with training_workers([torch.ones(10, device="meta")]) as workers:
        assert workers.num == 0
        assert torch.get_num_threads() == 2


def test_rounds_that_are_fused_elsewhere_leave_weights_alone():
    rounds, model, done = after_one_round(fuses=False)
    _, unfused, _ = after_one_round(rule="none")
    _, fused, _ = after_one_round()
    assert tiny.same(tiny.trained(model), tiny.trained(unfused))
    assert not tiny.same(tiny.trained(model), tiny.trained(fused))
    assert done.new_threshold is None
    assert rounds.accumulators.keys() == {"new", "historical"}
    assert not [value for value in vars(rounds).values() if is_copy(value)]


def test_rounds_that_are_fused_here_keep_two_copies():
    rounds, model, _ = after_one_round()
    copies = [value for value in vars(rounds).values() if is_copy(value)]
    assert [len(copy) for copy in copies] == [len(tiny.trained(model))] * 2


def is_copy(value):
    """Whether a field holds tensors that are no parameters."""
    if not isinstance(value, dict):
        return False
    return any(type(tensor) is torch.Tensor for tensor in value.values())


@pytest.mark.parametrize("role", ["new", "historical"])
def test_snapshot_of_bfloat16_accumulators_tells_the_round_s_threshold(tmp_path, role):
    """What train, replay and merge find on the disk is what the loop finds in memory."""
    written = []

    def write(rounds):
        write_accumulator(tmp_path, rounds.accumulators[role], tiny.llama(), {})
        written.append(rounds.accumulators[role].sensitivity["lm_head.weight"].dtype)

    _, _, done = after_one_round(accumulator_dtype="bfloat16", before_fusion=write)
    assert written == [torch.bfloat16]
    found = importance_threshold(ScoreStream(open_scores(tmp_path)), 0.2)
    assert found.value == getattr(done, f"{role}_threshold")
    share = done.both + (done.new_only if role == "new" else done.historical_only)
    assert share == pytest.approx(0.2, abs=1e-3)


def test_accumulators_elsewhere_make_the_same_round():
    beside, elsewhere = after_one_round(), after_one_round(accumulator_device="cpu")
    assert beside[2] == elsewhere[2]
    assert tiny.same(tiny.trained(beside[1]), tiny.trained(elsewhere[1]))


def test_options_of_accumulators_reach_both_sides():
    options = RecurrentOptions(accumulator_dtype="bfloat16", accumulator_device="cpu")
    for role in ("new", "historical"):
        assert options.importance(role) == ImportanceOptions(
            accumulator_dtype="bfloat16", accumulator_device="cpu"
        )
    with pytest.raises(ValueError, match=r"betas must not exceed 0\.95"):
        RecurrentOptions(accumulator_dtype="bfloat16", historical_betas=(0.97, 0.5))
