"""From a prompt or a conversation to token ids, exactly as `generate` users would make them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import BatchEncoding, PreTrainedTokenizerBase

from pipeline.errors import RowError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Token ids of a plain prompt, with the special tokens the tokenizer adds by itself."""
    return tuple(tokenizer(prompt)["input_ids"])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Token ids of a conversation through the chat template, the assistant's turn opened.

    Raises:
        RowError: the model has no chat template, or its template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise RowError(
            "no_chat_template",
            "The row has messages, but the model has no chat template; give a prompt column instead.",
        )
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
        )
    except jinja2.TemplateError as error:
        raise RowError(
            "chat_template",
            f"The model's chat template refuses the messages: {error}. Change the roles or their order.",
        ) from error
    assert isinstance(encoded, BatchEncoding)
    return tuple(encoded["input_ids"])
