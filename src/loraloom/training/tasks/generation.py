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
        tokenizer: its tokenizer, or its processor of texts and images.
        row: a text, or a list of messages; a chat template, if there is one and the row is a list, is applied.
        options: how long and how random.
    """
    model.eval()
    words = getattr(tokenizer, "tokenizer", tokenizer)
    if isinstance(row, str):
        inputs = words(row, return_tensors="pt", truncation=True, max_length=options.max_length)
    else:
        inputs = tokenizer.apply_chat_template(
            row, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
        )
    inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "token_type_ids"}
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    skips = not getattr(model.config, "is_encoder_decoder", False)
    streamer = TextIteratorStreamer(words, skip_prompt=skips, skip_special_tokens=True)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(
                **inputs,
                **sampling,
                streamer=streamer,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=words.pad_token_id,
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
