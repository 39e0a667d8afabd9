"""From a stream of token ids to a stream of text, with no half characters and no half stop strings.

    pieces = Detokenizer(tokenizer)
    stops = StopChecker(["\\n\\n", "User:"])
    for ids in steps:
        text, stopped = stops.add(pieces.add(ids))
"""

from __future__ import annotations

import codecs

REPLACEMENT = "\ufffd"  # what stands for bytes that are no character
CONTEXT = 8  # tokens of the prompt that a window begins with


class Detokenizer:
    """The text of one growing sequence; the pieces put together are the text of all its tokens.

    skip_special_tokens: leave out tokens such as <|im_end|>.  prompt_ids: the tokens before, for vocabularies in which a word's
    first token drops its space at the start of a text only.

    A byte-level vocabulary is decoded byte by byte, and an incomplete UTF-8 character waits for its last byte. Other
    vocabularies (SentencePiece) have no such rule per token: there a window of the last tokens is decoded with and without
    the new ones, and the difference is the new text, unless it ends in the middle of a character.
    """

    def __init__(self, tokenizer, skip_special_tokens=True, prompt_ids=()):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        if tokenizer.byte_level:
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        else:
            self._window = [i for i in prompt_ids if i not in self._skipped][-CONTEXT:]
            self._read = len(self._window)  # of the window's tokens, how many are printed

    def add(self, ids) -> str:
        """The text that became certain with the tokens `ids`."""
        ids = [i for i in ids if i not in self._skipped]
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, ids)))
        self._window += ids
        return self._difference(ended=False)

    def flush(self) -> str:
        """What was held back, at the end of the sequence: bytes that never became a character show as U+FFFD."""
        return self._utf8.decode(b"", True) if self._tokenizer.byte_level else self._difference(ended=True)

    def _difference(self, ended):
        text = self._decode(self._window)
        before = self._decode(self._window[: self._read])
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not ended):
            return ""
        self._window, self._read = self._window[self._read :], len(self._window) - self._read
        return text[len(before) :]

    def _decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class StopChecker:
    """Ends a text at the first of several stop strings, wherever the pieces it comes in are cut.

    The stop string that is complete first counts; of several that end at the same letter, the longest.
    include_stop_str: keep it in the text.  matched: the stop string that was found, or None.
    """

    def __init__(self, stops=(), include_stop_str=False):
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(self._stops):
            raise ValueError("a stop string must not be empty")
        self._include, self._held, self.matched = include_stop_str, "", None

    def add(self, text: str) -> tuple[str, bool]:
        """(text that is safe to print, whether a stop string was found); what may begin a stop string is held back."""
        if self.matched is not None:
            return "", True
        self._held += text
        found = [(start + len(stop), -len(stop), stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            end, _, self.matched = min(found)
            safe, self._held = self._held[: end if self._include else end - len(self.matched)], ""
            return safe, True
        size = len(self._held) - self._possible_start()
        safe, self._held = self._held[:size], self._held[size:]
        return safe, False

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string came."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self):
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
