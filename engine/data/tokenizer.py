"""A tokenizer: text to token ids and back, with the `tokenizers` library.

A text starts with what the tokenizer puts before it, such as BOS, everywhere: in prompts, in scored texts and in the
documents of training data. What ends a document is the end-of-text token.

A special token that is written in a prompt becomes its id. In a document of training data it stays text: a document
must not be able to end itself.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from peakgpt.engine.data.chat_template import DEFAULT, ChatTemplates
from peakgpt.engine.data.chat_tokens import check_options, model_inputs
from peakgpt.engine.data.clean_up import CleanUp
from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.encoding import CUT, encode_parts
from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.split_tokens import splitting_copy
from peakgpt.engine.data.token_pieces import EMPTY, TokenPieces
from peakgpt.engine.data.tokenizer_files import GENERIC_CLASS, WANTED, read_folder, tokenizer_folder
from peakgpt.engine.data.tokenizer_names import CHAT_TEMPLATE, CHAT_TEMPLATES, CONFIG, TOKENIZER

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Converts text to token ids and back.

    Attributes:
        end_id: the end-of-text id, included in `vocab_size`; None if the tokenizer has none.
        begin_id: the id of the token that the tokenizer names as the beginning of a text; None if it names none.
            `start_ids` says whether a text gets it.
        chat: the chat templates.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, end_of_text: str | None = END_OF_TEXT,
        side_files: Mapping[str, bytes] | None = None, *, begin_of_text: str | None = None,
        clean_up_tokenization_spaces: bool = False, chat: ChatTemplates | None = None,
    ):  # fmt: skip
        """
        Args:
            library: its truncation and padding are turned off.
            end_of_text: the token that ends a text, a word of the library. None: there is none, as in GPT-1's.
            side_files: relative path -> content of the files that `save` writes besides tokenizer.json. None: a
                tokenizer_config.json for GPT-2's class.
            begin_of_text: the token that begins a text, if there is one.
            clean_up_tokenization_spaces: decoded texts have no space before punctuation, as in transformers.
            chat: the chat templates. None: there are none.
        """
        end_id = None if end_of_text is None else library.token_to_id(end_of_text)
        if end_of_text is not None and end_id is None:
            raise ValueError(f"tokenizer: got a vocabulary without {end_of_text!r}, expected it as the end of text")
        self.library, self.end_of_text, self.end_id = library, end_of_text, end_id
        self.begin_id = None if begin_of_text is None else library.token_to_id(begin_of_text)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        names = {"bos_token": begin_of_text or end_of_text, "eos_token": end_of_text}
        self.chat = chat or ChatTemplates({}, {name: text for name, text in names.items() if text is not None})
        self.pieces = TokenPieces(library)
        self._highest = (-1, -1)  # number of tokens, highest id
        self._splitting: tuple[int, tokenizers.Tokenizer | None] = (-1, None)  # number of tokens, `_splitting_library`
        self._side_files = {CONFIG: _gpt2_config(end_of_text)} if side_files is None else dict(side_files)
        library.no_truncation()
        library.no_padding()

    @property
    def vocab_size(self) -> int:
        """The smallest size of a model's vocabulary that holds all ids, which may have gaps."""
        count = self.library.get_vocab_size()
        if self._highest[0] != count:  # the user added tokens
            self._highest = (count, max(self.library.get_vocab().values(), default=-1))
        return max(count, self._highest[1] + 1)

    @cached_property
    def start_ids(self) -> list[int]:
        """The ids that `encode` puts before a text, such as BOS."""
        parts = call(self.library.encode, "a")
        count = len(list(takewhile(lambda sequence: sequence is None, parts.sequence_ids)))
        return parts.ids[:count]

    @property
    def context_ids(self) -> list[int]:
        """The ids that give the first token of a text a context: `start_ids`, else BOS, else the end of text.

        Raises:
            ValueError: the tokenizer has none of them.
        """
        found = self.start_ids or [token for token in (self.begin_id, self.end_id) if token is not None][:1]
        if not found:
            raise ValueError("tokenizer: got none with a token that begins or ends a text, expected one: the first "
                             "token of a text has no context without it")  # fmt: skip
        return found

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text: the end of text, if there is one."""
        return () if self.end_id is None else (self.end_id,)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:  # fmt: skip
        """Encode text.

        Args:
            text: anything that UTF-8 can hold.
            add_special_tokens: add what the tokenizer puts around a text, such as BOS. GPT-2's adds nothing. A
                rendered chat template brings its own, so it is encoded without.
            split_special_tokens: a special token in the text, such as the end-of-text mark, is text like any other,
                as in transformers and in tiktoken's encode_ordinary. False: it becomes its id.
        Raises:
            ValueError: a lone surrogate, or the library fails, such as a regular expression that takes too long.
        """
        # A batch of one: `encode` takes twice as long, because it counts offsets, and holds the GIL all the time.
        options = {"add_special_tokens": add_special_tokens, "split_special_tokens": split_special_tokens}
        return self.encode_batch([text], **options)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[list[int]]:
        """Encode texts on all cores; see `encode`."""
        library = self._splitting_library if split_special_tokens else self.library
        encodings = call(library.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode texts, with nothing around them, as `encode_batch` does with split_special_tokens.

        Returns:
            The ids of each text, and the characters of the text that each token stands for, (start, end).
        """
        encodings = call(self._splitting_library.encode_batch, list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    @property
    def _splitting_library(self) -> tokenizers.Tokenizer:
        """The library with split_special_tokens: a copy, because threads that encode prompts share the library."""
        if self.library.encode_special_tokens:
            return self.library
        count = self.library.get_vocab_size()
        if self._splitting[0] != count:  # the user added tokens
            self._splitting = (count, splitting_copy(self.library))
        return self._splitting[1]

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        tools: Sequence[Mapping[str, Any]] | None = None, documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None, add_generation_prompt: bool = False,
        continue_final_message: bool | str = False, tokenize: bool = True, *, return_tensors: str | None = None,
        return_dict: bool = True, return_assistant_tokens_mask: bool = False, **variables: Any,
    ) -> Any:  # fmt: skip
        """Write a conversation as the model was trained on it. Arguments and results are those of transformers.

        Args:
            conversation: messages, objects such as {"role": "user", "content": "Hello"}; or a list of conversations.
            tools: JSON schemas of functions that the model may call, as in the chat API of OpenAI.
            documents: objects such as {"title": ..., "text": ...} for the model to read.
            chat_template: the name of a template, or Jinja. None: "tool_use" if there are tools and the tokenizer has
                it, else "default".
            add_generation_prompt: end with the beginning of an answer, if the template has one.
            continue_final_message: end inside the final message, for the model to continue it; or the name of the
                field to continue, such as "reasoning_content".
            tokenize: return ids, not text.
            return_tensors: "pt" or "np", (B, T) int64; the chats must have the same number of tokens. None: lists.
            return_dict: return a dict of input_ids and attention_mask, not ids alone.
            return_assistant_tokens_mask: also assistant_masks, 1 for each token of a `{% generation %}` block.
            variables: of the template, such as enable_thinking.
        Returns:
            The text, the ids or the dict of one conversation; of several conversations lists of them.
        Raises:
            ValueError: the template fails on the conversation, an argument has a wrong value, is not supported or is
                not read by the template, or there is no template.
        """
        check_options(variables, return_tensors, return_assistant_tokens_mask, tokenize and return_dict)
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        rendered = [
            self.chat.render(
                messages, tools=tools, documents=documents, chat_template=chat_template, variables=variables,
                add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
            )
            for messages in (conversation if is_batch else [conversation])
        ]  # fmt: skip
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if is_batch else texts[0]
        encodings = call(self.library.encode_batch, texts, add_special_tokens=False)  # with offsets
        inputs = model_inputs(
            list(zip(rendered, encodings, strict=True)), is_batch=is_batch, return_tensors=return_tensors,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )  # fmt: skip
        return inputs if return_dict else inputs["input_ids"]

    def with_chat_template(self, source: str) -> Tokenizer:
        """Return a copy whose only chat template is this Jinja; `save` writes it.

        Raises:
            ValueError: the source is not Jinja.
        """
        copied = copy.copy(self)
        copied.chat = ChatTemplates({DEFAULT: source}, self.chat.special_tokens)
        copied.chat.compile()
        kept = {name: content for name, content in self._side_files.items() if not name.startswith(CHAT_TEMPLATES)}
        copied._side_files = {**kept, CHAT_TEMPLATE: source.encode()}
        return copied

    @property
    def document_marks(self) -> tuple[list[int], list[int]]:
        """The ids before and after each document of training data.

        A document is what the tokenizer puts before a text, the text, and the end of text. A tokenizer that puts the
        end of text itself before a text, such as OPT's, has one of it between two documents, not two.

        Raises:
            ValueError: the tokenizer has no end of text.
        """
        if self.end_id is None:
            raise ValueError("tokenizer: got none with an end-of-text token, expected one: it ends each document of "
                             "training data; name it as eos_token in tokenizer_config.json")  # fmt: skip
        return [] if self.start_ids == [self.end_id] else self.start_ids, [self.end_id]

    @property
    def can_cut(self) -> bool:
        """Return whether a cut between a visible character and a blank changes no token."""
        words, added = self.library.pre_tokenizer, self.library.get_added_tokens_decoder().values()
        is_plain = isinstance(words, pre_tokenizers.ByteLevel) and words.use_regex and not words.add_prefix_space
        return is_plain and not any(token.rstrip or CUT.search(token.content) for token in added)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode documents of training data on all cores, with `document_marks` around each; see `encode_parts`.

        Returns:
            An iterator of int64 arrays; their concatenation is the token stream.
        Raises:
            ValueError: the tokenizer has no end of text.
        """
        parts = (("documents", Document.of("", text)) for text in texts)
        return (piece.ids for piece in encode_parts(parts, self) if piece.ids is not None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a text."""
        # tokenizer.json does not hold this option, which tokenizer_config.json names split_special_tokens.
        option = "\0split_special_tokens" if self.library.encode_special_tokens else ""
        return hashlib.sha256(f"{call(self.library.to_str)}{option}".encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; the end-of-text id becomes its mark, bytes that are not UTF-8 become U+FFFD.

        An id beyond the vocabulary is empty text, as in transformers: many models have more rows than tokens.

        Raises:
            ValueError: an id below 0 or above 2**32 - 1.
        """
        stream = StreamDecoder(self)
        text = b"".join(map(stream.next_bytes, map(int, ids))).decode(errors="replace")
        return CleanUp.apply(text) if self.clean_up_tokenization_spaces else text

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one token adds to a text; none for an id beyond the vocabulary."""
        return self.pieces[int(token)].later

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and its side files, which transformers loads from a checkpoint folder."""
        call(self.library.save, str(Path(folder, TOKENIZER)))
        for name, content in self._side_files.items():
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_bytes(content)

    def extended(self, library: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> Tokenizer:
        """Return a copy with another library, of these words and more, and with further names of special tokens.

        Its files name the class of transformers that takes the library as it is.
        """
        named = {**self.chat.special_tokens, **special_tokens}
        config = {**named, **json.loads(self._side_files.get(CONFIG, b"{}")), **special_tokens}
        content = json.dumps({**config, "tokenizer_class": GENERIC_CLASS}, indent=2) + "\n"
        library.encode_special_tokens = self.library.encode_special_tokens  # not in the text of a library
        return Tokenizer(
            library, self.end_of_text, {**self._side_files, CONFIG: content.encode()},
            begin_of_text=named.get("bos_token"), clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
            chat=ChatTemplates(self.chat.sources, named),
        )  # fmt: skip

    @classmethod
    def load(cls, source: Path | str, *, revision: str | None = None) -> Tokenizer:
        """Read the tokenizer of a model, as transformers' AutoTokenizer does.

        Args:
            source: a name of the Hugging Face hub ("gpt2", "org/name"), of which the tokenizer's files are downloaded;
                or a folder of a model, of a run, of a tokenizer alone or of an adapter, whose base model may have it.
            revision: of a model of the hub: a branch, a tag or a commit.
        Raises:
            ValueError: there is no tokenizer, a file is damaged, or the decoder is not supported.
        """
        folder = tokenizer_folder(locate(source, WANTED, revision))
        files = read_folder(folder)
        named = files.special_tokens
        known = END_OF_TEXT if files.library.token_to_id(END_OF_TEXT) is not None else None
        try:
            return cls(
                files.library, named.get("eos_token") or known, files.side_files,
                begin_of_text=named.get("bos_token"), clean_up_tokenization_spaces=files.clean_up_tokenization_spaces,
                chat=ChatTemplates(files.chat_templates, named),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"tokenizer {Path(folder, files.source)}: {error}") from None


class StreamDecoder:
    """Decodes ids one at a time; the bytes of an incomplete character wait for the next id.

    The results of `feed` and `finish` together are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._pieces, self._is_first, self._tail = tokenizer.pieces, True, b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._clean_up = CleanUp() if tokenizer.clean_up_tokenization_spaces else None

    def feed(self, token: int) -> str:
        """Add one id; return the text that it completes, which may be empty."""
        text = self._utf8.decode(self.next_bytes(token))
        return self._clean_up.feed(text) if self._clean_up else text

    def finish(self) -> str:
        """Return the rest of the text: U+FFFD if the last character is incomplete."""
        text = self._utf8.decode(b"", final=True)
        return self._clean_up.feed(text) + self._clean_up.finish() if self._clean_up else text

    def next_bytes(self, token: int) -> bytes:
        """Add one id; return the bytes that it adds to the text."""
        piece = self._pieces[token]
        if piece is EMPTY:
            return b""
        data = piece.first if self._is_first else self._tail + piece.later
        self._is_first, self._tail = False, piece.tail
        return data


class TokenOffsets(StreamDecoder):
    """Finds where each token begins in the decoded text, in characters (`text_offset` of OpenAI).

    Positions are those before `clean_up_tokenization_spaces`, if the tokenizer has that: whether a space stays depends
    on later tokens. A token that continues a character begins where that character begins. Example, with a token of
    two bytes and one of one byte for the euro sign, and then " cat":

        >>> offsets = TokenOffsets(tokenizer)
        >>> [offsets.locate(token) for token in tokenizer.encode("\u20ac cat")]
        [0, 0, 1]
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0):
        """
        Args:
            start: number of characters before the first token.
        """
        super().__init__(tokenizer)
        self.position = start  # characters that are complete

    def locate(self, token: int) -> int:
        """Add one id; return the position of the character that its first byte belongs to."""
        data = self.next_bytes(token)
        begun = len(self._utf8.decode(data[:1]))
        is_complete = begun and not self._utf8.getstate()[0]  # else the first byte waits for the rest of its character
        offset = self.position + begun - (1 if is_complete else 0)
        self.position += begun + len(self._utf8.decode(data[1:]))
        return offset


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return for each token the position in `tokenizer.decode(ids)` where it begins, in characters."""
    offsets = TokenOffsets(tokenizer)
    return [offsets.locate(token) for token in ids]

def _gpt2_config(end_of_text: str) -> bytes:
    """Return a tokenizer_config.json for GPT-2's class."""
    config = {
        "tokenizer_class": "GPT2TokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(config, indent=2) + "\n").encode()
