"""An output ends at the first token that completes a stop, and its text never shows one."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.request import SamplingParams
from pipeline.stopping import Decoder, StopCheck
from tests.pipeline.toys import ToyDecoder

EOS, SPECIAL = 256, 257


def check(max_new_tokens: int = 10_000, decoder: Decoder | None = None, **params: object) -> StopCheck:
    return StopCheck(SamplingParams(**params), max_new_tokens, [EOS], decoder or ToyDecoder())  # type: ignore[arg-type]


def generate(stop: StopCheck, tokens: Sequence[int]) -> tuple[list[int], str | None]:
    """The output when the model would go on with `tokens`, and why it ended."""
    for length in range(1, len(tokens) + 1):
        output = np.array(tokens[:length], np.int32)
        _, reason = stop(output)
        if reason is not None:
            return list(tokens[:length]), reason
    return list(tokens), None


def first_end(tokens: Sequence[int], stops: Sequence[str]) -> int | None:
    """Tokens until the decoded text contains a stop, by decoding every prefix whole."""
    for length in range(1, len(tokens) + 1):
        text = ToyDecoder().decode(list(tokens[:length]), skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return length
    return None


@settings(deadline=None)
@given(st.lists(st.sampled_from([*b"ab", EOS, SPECIAL]), min_size=1, max_size=12), st.integers(1, 8), st.booleans())
def test_tokens_that_come_together_end_an_output_where_they_would_one_by_one(
    tokens: list[int], longest: int, with_stop: bool
) -> None:
    stop = check(longest, stop=("ab",) if with_stop else ())
    output, reason = generate(stop, tokens)
    for num_new in range(1, len(output) + 1):
        before = len(output) - num_new
        assert stop(np.array(tokens, np.int32), len(tokens) - before) == (num_new, reason)


# Pieces that split and repeat: plain letters, characters of two to four bytes, special tokens.
pieces = st.sampled_from([b"a", b"b", b"ab", "é".encode(), "日".encode(), "🙂".encode(), b"\n"])
texts = st.lists(pieces, max_size=25).map(b"".join)
stop_strings = st.lists(
    st.sampled_from(["ab", "aab", "é", "日é", "🙂", "a🙂b", "\n\n", "bb", "babab"]), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=200)
@given(texts, stop_strings, st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3)), max_size=4))
def test_an_output_ends_with_the_token_that_completes_a_stop_string(
    text: bytes, stops: list[str], specials: list[tuple[int, int]]
) -> None:
    """One byte a token, a few special tokens anywhere: against decoding every prefix whole."""
    tokens = list(text)
    for place, count in specials:
        tokens[place:place] = [SPECIAL] * count
    output, reason = generate(check(stop=tuple(stops)), tokens)
    end = first_end(tokens, stops)
    assert len(output) == (end if end is not None else len(tokens))
    assert reason == ("stop" if end is not None else None)


@settings(deadline=None, max_examples=200)
@given(texts, stop_strings)
def test_text_is_cut_before_the_first_stop_string(text: bytes, stops: list[str]) -> None:
    stop = check(stop=tuple(stops))
    output, _ = generate(stop, list(text))
    if not output:
        return
    shown = stop.text(np.array(output, np.int32))
    whole = bytes(output).decode(errors="replace")
    assert not any(string in shown for string in stops)
    assert whole.startswith(shown)
    assert shown == whole or any(whole[len(shown) :].startswith(string) for string in stops)


def test_a_stop_string_may_span_many_special_tokens() -> None:
    """With `ignore_eos` a model may say end-of-sequence for long before it goes on."""
    tokens = [*b"x EN", *[EOS] * 40, *b"D more"]
    output, reason = generate(check(stop=("END",), ignore_eos=True), tokens)
    assert (len(output), reason) == (45, "stop")


def test_a_stop_string_may_be_long_or_come_late() -> None:
    long = "stop here, please, it is really enough now"
    output, reason = generate(check(stop=(long,)), [*b"y" * 3000, *long.encode(), *b" and on"])
    assert (len(output), reason) == (3000 + len(long), "stop")


@pytest.mark.parametrize(("stops", "shown"), [(("two", "one"), "zero "), (("o", "zero"), ""), (("nothing",), None)])
def test_the_earliest_of_several_stops_cuts(stops: tuple[str, ...], shown: str | None) -> None:
    """Looked at as a whole, as when one token carries several of them."""
    text = "zero one two"
    assert check(stop=stops).text(np.array(list(text.encode()), np.int32)) == (text if shown is None else shown)


def test_a_token_that_brings_a_stop_and_more_is_cut_inside() -> None:
    class Words:
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str | list[str]:
            return "".join(["Say ", "it.\nUser: and", " more"][token] for token in token_ids)

    stop = check(decoder=Words(), stop=("\nUser:",))
    output, reason = generate(stop, [0, 1, 2])
    assert (output, reason, stop.text(np.array(output, np.int32))) == ([0, 1], "stop", "Say it.")


def test_an_unfinished_character_is_not_a_stop_and_the_finished_one_is() -> None:
    tokens = list("a🙂".encode())
    output, reason = generate(check(stop=("🙂",)), [*tokens, *b"zz"])
    assert (output, reason) == (tokens, "stop")


def test_end_of_sequence_and_stop_tokens() -> None:
    assert generate(check(), [65, EOS, 66]) == ([65, EOS], "stop")
    assert generate(check(ignore_eos=True), [65, EOS, 66]) == ([65, EOS, 66], None)
    assert generate(check(stop_token_ids=(66,)), [65, 66, 67]) == ([65, 66], "stop")
    assert generate(check(stop_token_ids=(EOS,), ignore_eos=True), [65, EOS, 66]) == ([65, EOS], "stop")


def test_length_is_the_last_reason() -> None:
    assert generate(check(max_new_tokens=2), [65, 66, 67]) == ([65, 66], "length")
    assert generate(check(max_new_tokens=2), [65, EOS]) == ([65, EOS], "stop")
    assert generate(check(max_new_tokens=2, stop=("AB",)), [65, 66]) == ([65, 66], "stop")
    assert generate(check(max_new_tokens=1), [65]) == ([65], "length")


@pytest.mark.parametrize("stop", ["\n\n", "the", " river", "é", "日本", "🙂", "def f(x):\n    return"])
def test_a_real_tokenizer_stops_at_the_same_token(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], stop: str
) -> None:
    tokenizer = smollm2[1]
    text = "A pâté by a river, 日本語 and 🙂🙂.\n\nThen the code: def f(x):\n    return x\n\nBy the river the end é."
    ids = tokenizer(text)["input_ids"]
    checker = StopCheck(SamplingParams(stop=(stop,)), 10_000, [], tokenizer)
    output, reason = generate(checker, ids)
    ends = (n for n in range(1, len(ids) + 1) if stop in str(tokenizer.decode(ids[:n], skip_special_tokens=True)))
    assert reason == "stop"
    assert len(output) == next(ends)
    assert checker.text(np.array(output, np.int32)) == text[: text.index(stop)]
