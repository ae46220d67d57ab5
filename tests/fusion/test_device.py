"""Fusing where a device is named; what needs a CUDA device is in test_cuda.py."""

import merges
import pytest
import torch

from kifmerge.checkpoint.device import find_device, own_stream, send
from kifmerge.fusion.rules import FusionOptions
from kifmerge.phases.merge import Merge


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:4096", "", "cpu:0"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=r"expected cpu, cuda or cuda:NUMBER|this machine has"):
        find_device(name)


def test_the_processor_is_no_device():
    assert find_device("cpu") is None
    values = torch.ones(3)
    assert send(values, None) is values
    assert send(values, values.device) is values
    with own_stream(None), own_stream(values.device):
        pass


@pytest.mark.parametrize("rule", ["recurrent-kif", "linear", "ties"])
def test_what_is_sent_away_and_brought_back_makes_the_same_bytes(tmp_path, rule):
    """The way of a device's tensors, gone with those of the processor."""
    files = merges.Files(tmp_path).write(torch.bfloat16)
    options = FusionOptions(rule=rule)
    files.merge(options, "on-cpu")
    inputs = files.inputs(merges.usual_evidence(options))
    Merge(inputs, options, device=torch.device("cpu"), num_workers=2).run(tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "on-cpu" / name).read_bytes()
