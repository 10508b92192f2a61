"""What a chat template does to a conversation is noticed: drops, changes, dates, dice, thoughts."""

import json

import pytest
from traces_cases import CHATML_QWEN, QWEN3, byte_tokenizer

from kd.traces import CHATML, SKY_T1, DropCounts, Renderer, RenderError, Tags, Trace, render_stream
from kd.traces.templates import ChatTemplate

HISTORY = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Reply."}]
TRACE = Trace("What is 2+2?", "Two and two.", "It is 4.")
FULL = TRACE.replace(system="Be brief.", metadata={"history": HISTORY})


def renderer(template, **options):
    return Renderer(byte_tokenizer(template), **options)


def text_of(made, trace):
    return made.tokenizer.decode(made(trace).input_ids)


LOSSES = {
    "the system": [
        CHATML.replace("{% for message in messages %}", "{% for message in messages if "
                       "message['role'] != 'system' %}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] if message['role'] != "
                       "'system' else 'You are helpful.' }}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'][:4] if message['role'] "
                       "== 'system' else message['content'] }}"),
    ],
    "an earlier turn": [
        CHATML.replace("in messages %}", "in messages if loop is undefined %}", 0)
        .replace("{% for message in messages %}", "{% for message in messages[:1] + messages[-1:] "
                 "%}"),
        CHATML.replace("{{ message['content'] }}", "{{ '' if message['role'] == 'assistant' and "
                       "not loop.last else message['content'] }}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('.')[0] }}"),
    ],
    "the prompt": [
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] | lower }}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] | "
                       "truncate(9, True, '', 0) }}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] | replace('2', 'two') "
                       "}}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] | title }}"),
        CHATML.replace("{{ message['content'] }}", "{{ message['content'] | wordwrap(8) }}"),
    ],
}  # fmt: skip
CASES = [(name, template) for name, templates in LOSSES.items() for template in templates]


@pytest.mark.parametrize(
    "what, template", CASES, ids=[f"{w}-{i}" for i, (w, _) in enumerate(CASES)]
)
def test_a_message_that_the_template_loses_is_named(what, template):
    if "split('.')" in template:
        trace = TRACE.replace(metadata={"history": HISTORY})
    elif what == "the prompt":
        trace = TRACE
    else:
        trace = FULL
    made = renderer(template)
    with pytest.raises(RenderError, match="must be shown by the chat template as it is") as caught:
        made(trace)
    assert caught.value.reason == f"chat template loses {what}"
    report = DropCounts()
    assert list(render_stream([trace], made, report=report)) == []
    assert report["render"].dropped == {f"chat template loses {what}": 1}


def test_what_the_template_does_not_touch_is_rendered_all_the_same():
    """The loss is of this conversation: another one passes through the same template."""
    lower = renderer(LOSSES["the prompt"][0])
    assert "what is 2+2?" in text_of(lower, TRACE.replace(prompt="what is 2+2?"))
    deaf = renderer(LOSSES["the system"][0])
    assert "What is 2+2?" in text_of(deaf, TRACE)


@pytest.mark.parametrize("content", ["1", "is", "user", "2", "What", ""])
def test_a_dropped_turn_is_seen_however_short_it_is(content):
    """Such texts stand elsewhere in the prompt as well."""
    trace = FULL.replace(metadata={"history": [{**turn, "content": content} for turn in HISTORY]})
    with pytest.raises(RenderError, match="leaves it out"):
        renderer(LOSSES["an earlier turn"][0])(trace)
    assert text_of(renderer(CHATML), trace).count("<|im_start|>") == 5


@pytest.mark.parametrize(
    "order, how",
    [
        ("messages[:1] + messages[1:-1] | reverse | list + messages[-1:]", "moves it"),
        ("messages | reverse", "moves it"),
        ("messages + messages[-1:]", "writes it twice"),
    ],
)
def test_turns_in_another_order_or_twice_are_named(order, how):
    template = CHATML.replace("in messages %}", f"in {order} %}}", 1)
    with pytest.raises(RenderError, match=how):
        renderer(template)(TRACE.replace(metadata={"history": HISTORY * 2}))
    # the system message may stand where the template likes: Mistral has it in the last question
    last = CHATML.replace("in messages %}", "in messages[1:] + messages[:1] %}", 1)
    assert renderer(last)(FULL.replace(metadata={}))


@pytest.mark.parametrize("history", [["text"], [{"role": "user"}], [{"content": "x"}], [None]])
def test_a_history_that_is_none_is_counted(history):
    with pytest.raises(RenderError, match=r"history\[0\] must be") as caught:
        renderer(CHATML)(TRACE.replace(metadata={"history": history}))
    assert caught.value.reason == "earlier turn without role or content"


def test_a_tool_or_a_call_that_is_left_out_is_named():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    tools = "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    calls = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "{{ call | tojson }}{% endfor %}",
    )
    trace = TRACE.replace(metadata={"tools": [tool]})
    with pytest.raises(RenderError, match="tool add must be shown") as caught:
        renderer(CHATML)(trace)
    assert caught.value.reason == "chat template loses the tool"
    assert json.dumps(tool) in text_of(renderer(tools + CHATML), trace)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = [HISTORY[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    said.append({"role": "tool", "name": "add", "content": "3"})
    trace = TRACE.replace(metadata={"history": said})
    with pytest.raises(RenderError, match="tool add must be shown"):
        renderer(CHATML)(trace)
    assert '"add"' in text_of(renderer(calls), trace)


@pytest.mark.parametrize("tools", ["search, add", ["add"], {"name": "add"}, [1], "[1]", '{"a": 1}'])
def test_tools_that_are_none_are_counted(tools):
    with pytest.raises(RenderError, match="must be a list of functions") as caught:
        renderer(CHATML)(TRACE.replace(metadata={"tools": tools}))
    assert caught.value.reason == "tools that are no functions"


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_no_tools(tools):
    assert renderer(CHATML)(TRACE.replace(metadata={"tools": tools})) == renderer(CHATML)(TRACE)


def test_tools_may_be_stored_as_text():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    made = renderer("{% for t in tools or [] %}{{ t.function.name }}! {% endfor %}" + CHATML)
    for tools in ([tool], json.dumps([tool])):
        assert text_of(made, TRACE.replace(metadata={"tools": tools})).startswith("add! ")


def test_white_space_and_default_prompts_are_counted_and_said():
    trims = renderer(CHATML.replace("['content'] }}", "['content'] | trim }}"))
    traces = [TRACE, TRACE.replace(prompt="  indented\n"), TRACE.replace(system="s ")]
    assert all(not isinstance(made, RenderError) for _, made in trims.render_all(traces))
    assert trims.seen == {"trimmed messages": 2, "thoughts": 3}
    assert "white space" in trims.remarks()[0] and "2 traces" in trims.remarks()[0]
    for template, words in (
        (CHATML_QWEN, "You are a helpful assistant."),
        (
            "{% if messages[0]['role'] != 'system' %}[You are Q.] {% endif %}" + CHATML,
            "[You are Q.]",
        ),
        (
            "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else 'Be kind!' "
            "%}<s>{{ s }}</s>{% for message in messages if message['role'] != 'system' %}"
            "{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}",
            "Be kind!",
        ),
    ):
        told = renderer(template)
        assert told.facts()["default_system"] == words
        list(told.render_all([TRACE, TRACE.replace(system="Mine."), TRACE]))
        assert told.seen == {"default system prompt": 2, "thoughts": 3}
        assert repr(words) in told.remarks()[0]
    assert renderer(CHATML).facts()["default_system"] == ""


def test_the_header_is_found_where_the_generation_prompt_is_ignored():
    template = CHATML.partition("{% if add_generation_prompt %}")[0]
    assert text_of(renderer(template), FULL) == text_of(renderer(CHATML), FULL)
    # Llama 2: nothing but a space comes before an answer, and the answer starts with it
    llama = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
        "{{ message['content'] }} [/INST]{% else %} {{ message['content'] }} {{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    made = renderer(llama)
    prompt, completion = made.texts(Trace("q", "", "a"))
    assert (prompt, completion) == ("[INST] q [/INST]", " a <|im_end|>")
    ids, labels = made(Trace("q", "", "a"))
    assert made.tokenizer.decode([i for i in labels if i != -100]) == completion
    # R1's answers follow the question at once
    assert renderer("{% for m in messages %}{{ m['content'] }}|{% endfor %}").texts(
        Trace("q", "", "a")
    ) == ("q|", "a|<|im_end|>")


def test_what_answers_begin_with_is_written_as_the_template_writes_it():
    """Vicuna's space, and the channel of an answer, which no generation prompt has."""
    vicuna = (
        "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
        "{{ m['content'] }}{{ ' ' if m['role'] == 'user' else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    assert renderer(vicuna).texts(Trace("q", "", "a")) == ("USER: q ASSISTANT:", " a<|im_end|>")
    assert renderer(vicuna)(TRACE)
    harmony = (
        "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
        "<|channel|>final{% endif %}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    made = renderer(harmony)
    assert text_of(made, Trace("q", "", "a")).endswith(
        "<|start|>assistant<|channel|>final<|message|>a<|end|><|im_end|>"
    )
    with pytest.raises(RenderError, match="middle ends with it") as caught:
        made(TRACE)
    assert caught.value.reason.startswith("chat template marks the answer")
    tags = Tags(
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    )
    assert text_of(renderer(harmony, tags=tags), TRACE).endswith(
        "<|start|>assistant<|channel|>analysis<|message|>Two and two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|end|><|im_end|>"
    )


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|eos|>"])
@pytest.mark.parametrize("template", [CHATML, CHATML_QWEN])
def test_a_header_that_is_always_written_ends_no_answer(eos, template):
    always = template.replace("{% if add_generation_prompt %}", "{% if true %}")
    made, plain = (Renderer(byte_tokenizer(text, eos=eos)) for text in (always, template))
    assert made.turn_end == plain.turn_end
    for trace in (TRACE, TRACE.replace(system="s")):
        assert made(trace) == plain(trace)


def test_same_roles_in_a_row_may_be_merged_but_not_lost():
    merging = (
        "{% for message in messages %}{% if loop.index0 == 0 or message['role'] != "
        "messages[loop.index0 - 1]['role'] %}{% if loop.index0 %}<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% else %} / {% endif %}{{ message['content'] }}"
        "{% endfor %}<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    trace = TRACE.replace(metadata={"history": [{"role": "user", "content": "Listen."}]})
    assert "<|im_start|>user\nListen. / What is 2+2?<|im_end|>" in text_of(renderer(merging), trace)
    last = (
        CHATML.replace("in messages %}", "in messages if loop is defined %}")
        .replace(
            "{% for message in messages if loop is defined %}",
            "{% for message in messages %}{% if loop.last or messages[loop.index]['role'] != "
            "message['role'] %}",
        )
        .replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")
    )
    with pytest.raises(RenderError, match="leaves it out"):
        renderer(last)(trace)


# --- dates and dice -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, shown",
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Nov 2026"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-11-26"),
        ("{{ strftime_now('%A, %-d %B %y, day %j') }}", "Thursday, 26 November 26, day 330"),
        ("{{ strftime_now('%H:%M:%S') }}", "00:00:00"),
        ("{% set d = strftime_now('%Y-%m-%d').split('-') %}{{ d[2] }}/{{ d[1] }}", "26/11"),
        (
            "{% if not date_string is defined %}{% if strftime_now is defined %}"
            "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
            "{{ date_string }}",
            "26 Nov 2026",
        ),
        ("{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{{ day() }}", "26"),
    ],
)
def test_dates_are_pinned_and_recorded(written, shown):
    made = renderer(f"Today: {written}.\n" + CHATML, date="2026-11-26")
    assert text_of(made, TRACE).startswith(f"Today: {shown}.\n<|im_start|>")
    assert made.facts()["date"] == "2026-11-26"
    other = renderer(f"Today: {written}.\n" + CHATML)
    assert other.facts()["date"] == "2026-01-01"
    assert other.remarks() == [] and other(TRACE)
    assert "told 2026-01-01" in other.remarks()[0]
    assert renderer(CHATML, date="2026-11-26").facts()["date"] is None


@pytest.mark.parametrize("start", ["\n", "  {% if true %}x{% endif %}\n", "\n\n  ", ""])
def test_pinning_changes_nothing_else(start):
    """Jinja trims line ends after blocks and blanks before them; ours must not move either."""
    template = start + CHATML + "{# strftime_now #}"
    tokenizer = byte_tokenizer(template)
    said = [{"role": "user", "content": "q"}]
    plain = tokenizer.apply_chat_template(said, tokenize=False)
    assert ChatTemplate(tokenizer).apply(said, generation=False) == plain


@pytest.mark.parametrize(
    "dice", ["{{ ['a', 'b'] | random }}", "{{ range(9)|random }}", "{{ lipsum() }}"]
)
@pytest.mark.parametrize("always", [True, False])
def test_a_template_that_draws_is_refused(dice, always):
    """Also where it does so for some conversations alone."""
    written = dice if always else "{% if messages | length > 7 %}" + dice + "{% endif %}"
    with pytest.raises(ValueError, match="must give one text for one conversation"):
        renderer(written + CHATML)


def test_a_clock_of_the_tokenizers_own_is_noticed():
    tokenizer = byte_tokenizer(CHATML)
    ticks = iter(range(1000))
    real = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *a, **o: f"{next(ticks)} {real(*a, **o)}"
    with pytest.raises(ValueError, match="reads a clock"):
        Renderer(tokenizer)


# --- thoughts -------------------------------------------------------------------------------------


GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}<think>"
    "{{ (m.reasoning_content or '').strip() }}</think>\n{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ opened }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    "{% if m.reasoning_content %}<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>"
    "<|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    "template, options",
    [
        (GLM, {}),
        (GLM, {"opened": "<think>"}),
        (GLM.replace("<|assistant|>\n{{ opened }}", "<|assistant|>"), {}),
        (CHANNELS, {}),
    ],
    ids=["glm", "glm-opened", "glm-lead", "channels"],
)
def test_a_thought_can_be_written_as_the_template_writes_it(template, options):
    """Independent of us: the template's own text of a thought that it is given as one."""
    made = renderer(template, tags=None, template_options=options)
    said = {"role": "assistant", "content": TRACE.answer, "reasoning_content": TRACE.think}
    whole = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": TRACE.prompt}, said], tokenize=False
    )
    assert text_of(made, TRACE) == whole + "<|im_end|>" and made.own_tags is None
    assert not [remark for remark in made.remarks() if "itself writes" in remark]
    if template != CHANNELS:
        other = renderer(template, template_options=options)
        assert other(TRACE) and "itself writes a thought as '<think>'" in other.remarks()[0]
        assert Tags(*other.facts()["tags"]) == other.tags


def test_a_template_without_thoughts_has_none_of_its_own():
    for template in (CHATML, CHATML_QWEN, QWEN3):
        made = renderer(template, tags=None)
        assert made.own_tags is None and text_of(made, TRACE) == text_of(renderer(template), TRACE)


@pytest.mark.parametrize(
    "close",
    ["<think>\n\n</think>\n\n", "<think></think>", "</think>\n"]
    + ["[THINK][/THINK]", "<|channel>thought\n<channel|>", "Reasoning: none.\n"],
)
def test_a_closed_thought_takes_an_answer_and_refuses_a_thought(close):
    made = renderer(CHATML.replace("assistant\n{% endif %}", "assistant\n" + close + "{% endif %}"))
    with pytest.raises(RenderError, match="enable_thinking") as caught:
        made(TRACE)
    assert caught.value.reason == "chat template closes the thought"
    bare = TRACE.replace(think="")
    assert text_of(made, bare).endswith(f"assistant\n{close}It is 4.<|im_end|>")


def test_qwen3_thinks_or_not_as_its_options_say():
    off = renderer(QWEN3, template_options={"enable_thinking": False})
    with pytest.raises(RenderError, match="lets it think"):
        off(TRACE)
    on = renderer(QWEN3, template_options={"enable_thinking": True})
    assert text_of(on, TRACE).endswith("<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>")
    assert off.facts() != on.facts()


EMPTY = "<think>\n\n</think>\n\n"
THINKS = (  # Qwen3 and its successors: an answer without a thought has an empty one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opened }}{% endif %}"
)


@pytest.mark.parametrize("opened", ["", "<think>\n", "<think>\n\n", EMPTY])
@pytest.mark.parametrize("history", [[], HISTORY])
def test_an_answer_without_a_thought_is_what_the_template_makes_of_it(opened, history):
    """Independent of us: the template's own text of the whole conversation."""
    made = renderer(THINKS, template_options={"opened": opened})
    bare = TRACE.replace(think="", metadata={"history": history})
    said = [*history, {"role": "user", "content": bare.prompt}]
    said.append({"role": "assistant", "content": bare.answer})
    whole = made.tokenizer.apply_chat_template(said, tokenize=False)
    assert text_of(made, bare) == whole.strip()
    assert made.seen["empty thoughts"] == (0 if opened == EMPTY else 1)
    if opened == EMPTY:
        with pytest.raises(RenderError, match="lets it think"):
            made(TRACE)
    else:
        assert text_of(made, TRACE).count("</think>") == 1


@pytest.mark.parametrize(
    "template", [CHATML, CHATML_QWEN, CHATML.replace("{% if add_gen", "{% if 1 or add_gen")]
)
@pytest.mark.parametrize("trace", [TRACE, FULL, TRACE.replace(system="s")])
def test_what_we_write_is_what_the_template_writes(template, trace):
    made, bare = renderer(template), trace.replace(think="")
    said = [{"role": "system", "content": bare.system}] if bare.system else []
    said += [*bare.metadata.get("history", []), {"role": "user", "content": bare.prompt}]
    said.append({"role": "assistant", "content": bare.answer})
    assert made.tokenizer.apply_chat_template(said, tokenize=False).startswith(text_of(made, bare))


@pytest.mark.parametrize("opened", ["<think>\n", "<think>", "<think>\n\n"])
def test_an_opened_thought_is_opened_once(opened):
    made = renderer(
        CHATML.replace("assistant\n{% endif %}", "assistant\n" + opened + "{% endif %}")
    )
    text = text_of(made, TRACE)
    assert text.count("<think>") == text.count("</think>") == 1
    assert "<think>\n" in text.replace("\n\n", "\n") and "Two and two.\n</think>" in text
    for tags in (SKY_T1, Tags("<thinking>", "</thinking>")):
        with pytest.raises(RenderError, match="of another form|as the chat template does"):
            Renderer(made.tokenizer, tags=tags)(TRACE)
