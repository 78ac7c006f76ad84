"""Text from a language model, piece by piece as it is written."""

import inspect
import threading
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
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
    # Gemma 3 sees by them where an image is; others get them from their tokenizer, and were not trained with them.
    asked = inspect.signature(model.get_base_model().forward if isinstance(model, PeftModel) else model.forward)
    takes_types = words is not tokenizer and "token_type_ids" in asked.parameters
    inputs = {k: value.to(model.device) for k, value in inputs.items() if k != "token_type_ids" or takes_types}
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
