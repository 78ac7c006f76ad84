"""Text from a language model, piece by piece as it is written."""

import threading
from collections.abc import Iterator
from typing import Any

from transformers import TextIteratorStreamer

from loraloom.training.tasks.base import AnswerOptions


def generate(model: Any, tokenizer: Any, row: Any, options: AnswerOptions) -> Iterator[str]:
    """The continuation of a prompt, in pieces.

    Args:
        model: a causal or encoder-decoder language model.
        tokenizer: its tokenizer.
        row: a text, or a list of messages; a chat template, if there is one and the row is a list, is applied.
        options: how long and how random.
    """
    model.eval()
    if isinstance(row, str):
        inputs = tokenizer(row, return_tensors="pt", truncation=True, max_length=options.max_length)
    else:
        inputs = tokenizer.apply_chat_template(
            row, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
        )
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True
    )
    failed: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(
                **inputs,
                **sampling,
                streamer=streamer,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        except BaseException as error:  # raised in the reading thread, which would wait for ever otherwise
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failed:
        raise failed[0]
