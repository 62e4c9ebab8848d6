"""Text in and out of a model: tokenizer, chat template, incremental decoding, parsers. Imports no numpy."""

from sagellm_core.text.chat_model import TextChatModel
from sagellm_core.text.load import load_chat_model, load_tokenizer

__all__ = ["TextChatModel", "load_chat_model", "load_tokenizer"]
