"""The importance command on a model that gives no finite loss for some rows, for torchrun."""

from __future__ import annotations

from typing import Any

from transformers import LlamaForCausalLM

from kifmerge.cli import main

# Whatever the byte "~" is to the tokenizer of the test.
BAD_TOKEN = 96


def with_spoilt_losses(forward: Any) -> Any:
    """The same, but the loss of a batch with such a token is NaN."""

    def spoilt(self: Any, *args: Any, **inputs: Any) -> Any:
        found = forward(self, *args, **inputs)
        if (inputs["input_ids"] == BAD_TOKEN).any():
            found.loss = found.loss * float("nan")
        return found

    return spoilt


if __name__ == "__main__":
    LlamaForCausalLM.forward = with_spoilt_losses(  # type: ignore[method-assign]
        LlamaForCausalLM.forward
    )
    main()
