"""The 64 special tokens at ids 0..63, reserved from the first day.

A model trained without chat can be tuned for it later without growing its embedding: the slots
are there. The names of chat and tool tokens are those that ChatML and Qwen use.
"""

NUM_SPECIAL = 64

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_NAMED = (
    BOS,
    EOS,
    PAD,
    TURN_START,
    TURN_END,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)

SPECIAL_TOKENS = _NAMED + tuple(f"<|reserved_{n}|>" for n in range(NUM_SPECIAL - len(_NAMED)))
"""Their texts, in the order of their ids."""
