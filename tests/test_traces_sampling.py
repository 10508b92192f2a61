"""What is drawn is what was asked for: a model's own generation_config and a server's defaults
change nothing, and what was asked for is recorded."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from traces_cases import CHATML_QWEN, byte_tokenizer, tiny_model
from transformers import GenerationConfig

from kd.cli.main import main
from kd.evaluation import generate
from kd.serving import ServerError
from kd.traces import DropCounts, Sampling, Server, Trace, complete, generate_local, overridden
from kd.traces.sampling import INERT, NEUTRAL, STATED
from kd.traces.server import generate_server
from kd.traces.verifiers.judge import Judge

# A value of each field that would change what is drawn (or stop the run), for a model's own file.
BITING = {
    "top_k": 1, "top_p": 0.1, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1,
    "epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "temperature": 0.05, "repetition_penalty": 1.9,
    "encoder_repetition_penalty": 1.9, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[7]], "suppress_tokens": [7],
    "begin_suppress_tokens": [7], "forced_bos_token_id": 9, "forced_eos_token_id": 9,
    "sequence_bias": [[[7], -50.0]], "guidance_scale": 3.0,
    "exponential_decay_length_penalty": (1, 9.0), "remove_invalid_values": True,
    "renormalize_logits": True, "num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 1.0,
    "length_penalty": 5.0, "early_stopping": True, "penalty_alpha": 0.6, "dola_layers": "low",
    "token_healing": True, "min_length": 4, "min_new_tokens": 4, "max_time": 1e-9,
    "stop_strings": ["a"], "num_return_sequences": 1, "force_words_ids": [[9]],
    "constraints": ["x"],
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0, "seeding_scheme": "lefthash"},
}  # fmt: skip


class Fixed(torch.nn.Module):
    """The logits of every next token, whatever came before."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


def model_of(logits, **own):
    """A tiny model that says these logits, with fields of a generation_config of its own."""
    model = tiny_model(len(logits))
    model.lm_head = Fixed(torch.as_tensor(logits))
    model.generation_config = GenerationConfig()
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    return model


def two_tokens(first=1.0, second=0.0):
    """Logits of two tokens, 7 and 8, and of no other."""
    logits = torch.full((320,), -50.0)
    logits[7], logits[8] = first, second
    return logits


def drawn(model, sampling, count=4000):
    tokenizer = byte_tokenizer(CHATML_QWEN)
    ids = complete(model, tokenizer, [[7, 9]] * count, sampling, sampling.seed)
    return [row[0] if row else None for row, _ in ids]


def test_every_field_of_transformers_is_classified():
    """A field that a newer transformers adds has to be looked at: does it change what is drawn?"""
    fields = set(vars(GenerationConfig()))
    assert fields - set(NEUTRAL) - STATED - INERT == set()
    assert not set(NEUTRAL) & STATED and not set(NEUTRAL) & INERT and not STATED & INERT
    assert set(BITING) == set(NEUTRAL)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_softmax(temperature):
    sampling = Sampling(temperature, 1.0, max_new_tokens=1)
    found = drawn(model_of(two_tokens(), **BITING), sampling)
    share = found.count(7) / len(found)
    wanted = float(torch.sigmoid(torch.tensor(1.0 / temperature)))
    error = (wanted * (1 - wanted) / len(found)) ** 0.5
    assert abs(share - wanted) < 4 * error and set(found) == {7, 8}


@pytest.mark.parametrize("name", BITING)
def test_no_field_of_the_models_own_changes_what_is_drawn(name):
    """Sampled: the same draws with and without; greedy: the argmax, three times over."""
    logits = two_tokens()
    logits[9] = 0.9
    plain, own = model_of(logits), model_of(logits, **{name: BITING[name]})
    before = vars(own.generation_config).copy()
    sampled = Sampling(1.0, 1.0, max_new_tokens=3)
    assert drawn(own, sampled, 40) == drawn(plain, sampled, 40)
    tokenizer = byte_tokenizer(CHATML_QWEN)
    greedy = Sampling(0, max_new_tokens=3)
    assert complete(own, tokenizer, [[7, 8]] * 2, greedy, 0) == [([7, 7, 7], "length")] * 2
    assert vars(own.generation_config) == before  # the model is left as it was
    asked = overridden(own, sampled)
    assert set(asked) == ({name} if BITING[name] != NEUTRAL[name] else set())


def test_the_fields_would_have_changed_it():
    """The tests above can fail: transformers applies them where nobody says otherwise."""
    for name in ("repetition_penalty", "suppress_tokens", "sequence_bias", "no_repeat_ngram_size"):
        own = model_of(two_tokens(1.0, 0.9), **{name: BITING[name]})
        out = own.generate(
            torch.tensor([[7]]), max_new_tokens=1, do_sample=False, attention_mask=torch.ones(1, 1)
        )
        assert out[0, -1] == 8


@pytest.mark.parametrize(
    "asked, kept",
    [
        ({"top_k": 1}, {7}),
        ({"top_k": 2}, {7, 8}),
        ({"min_p": 0.9}, {7}),
        ({"top_p": 0.3}, {7}),
        ({"repetition_penalty": 99.0}, {8}),
        ({}, {7, 8}),
    ],
)
def test_what_is_asked_for_is_done(asked, kept):
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, **asked})
    logits = two_tokens(30.0, 10.0) if "repetition_penalty" in asked else two_tokens()
    assert set(drawn(model_of(logits), sampling, 200)) == kept
    assert {name: sampling.stated()[name] for name in asked} == asked


def test_end_tokens_of_the_models_own_still_end():
    model = model_of(two_tokens(), eos_token_id=[7])
    (row,) = complete(model, byte_tokenizer(CHATML_QWEN), [[9]], Sampling(0, max_new_tokens=5), 0)
    assert row == ([], "stop") and overridden(model, Sampling(0)) == {}


def test_wrapped_models_draw_the_same_and_are_left_as_they_were():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.generation_config.repetition_penalty = 5.0
    own = model.generation_config
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    sampling = Sampling(0, max_new_tokens=6)
    tokenizer = byte_tokenizer(CHATML_QWEN)
    found = complete(wrapped, tokenizer, [[9, 9, 9]], sampling, 0)
    plain = tiny_model()
    assert found == complete(plain, tokenizer, [[9, 9, 9]], sampling, 0)
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_traces_evaluation_and_the_command_say_and_do_the_same(tmp_path, capsys):
    tokenizer, model = byte_tokenizer(CHATML_QWEN), tiny_model()
    (plain,) = generate_local(model, tokenizer, ["q"], sampling=Sampling(0, max_new_tokens=6))
    texts = generate(model, tokenizer, ["q"], max_new_tokens=6, chat=True)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.top_k = 3
    (again,) = generate_local(model, tokenizer, ["q"], sampling=Sampling(0, max_new_tokens=6))
    assert again == plain and again.metadata["sampling"]["repetition_penalty"] == 1.0
    assert generate(model, tokenizer, ["q"], max_new_tokens=6, chat=True) == texts
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"question": "q"}\n')
    arguments = ["traces", "generate", tmp_path / "p.jsonl", "-o", tmp_path / "out.jsonl"]
    arguments += ["--model", tmp_path / "model", "--max-new-tokens", 4, "--temperature", 0]
    assert main([*map(str, arguments), "--report", str(tmp_path / "n.json")]) == 0
    assert "not applied, of the model's own generation_config" in (shown := capsys.readouterr().out)
    assert "repetition_penalty=1.3" in shown and "top_k=3" in shown
    notes = json.loads((tmp_path / "n.json").read_text())["generate"]["notes"]
    assert notes["not applied"]["repetition_penalty"] == "1.3"
    assert notes["sampling"]["temperature"] == 0


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}]
    + [{"repetition_penalty": 0}, {"max_new_tokens": 0}],
)  # fmt: skip
def test_settings_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Sampling: {next(iter(wrong))} must"):
        Sampling(**wrong)


# --- served ---------------------------------------------------------------------------------------

REFUSALS = {
    "openai": (400, {"error": {"message": "Unrecognized request argument supplied: top_k"}}),
    "pydantic": (
        422,
        {"detail": [{"loc": ["body", "min_p"], "msg": "Extra inputs are not permitted"}]},
    ),
    "strict": (400, {"message": "Unknown parameter: 'repetition_penalty'."}),
    "schema": (400, {"error": "additional properties are not allowed"}),
}
UNKNOWN = {"top_k", "min_p", "repetition_penalty"}


class Chat(BaseHTTPRequestHandler):
    """Knows OpenAI's fields alone where it is told to, and says what it was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, said = 200, {"choices": [{"message": {"content": "VERDICT: CORRECT"}}]}
        refuses = self.server.refuses
        if refuses == "always":
            status, said = 400, {"error": "context length exceeded"}
        elif refuses == "bare" and {"presence_penalty", *UNKNOWN} & set(body):
            name = min({"presence_penalty", *UNKNOWN} & set(body))
            status, said = 400, {"error": {"message": f"Unsupported parameter: '{name}'"}}
        elif refuses in REFUSALS and UNKNOWN & set(body):
            status, said = REFUSALS[refuses]
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def chat():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.asked, server.refuses = [], ""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.client = Server(
        f"http://127.0.0.1:{server.server_address[1]}/v1", "m", concurrency=1, timeout=5, wait=0.01
    )
    yield server
    server.shutdown()
    server.server_close()


OFF = {"presence_penalty": 0, "frequency_penalty": 0}
BEYOND = {"top_k": -1, "min_p": 0, "repetition_penalty": 1}


def sent(body):
    return {name: value for name, value in body.items() if name not in ("model", "messages")}


def test_a_request_states_everything(chat, tmp_path):
    report, journal = DropCounts(), tmp_path / "journal.jsonl"
    sampling = Sampling(0.7, 0.9, 55, seed=3)
    (trace,) = generate_server(
        chat.client, ["q"], sampling=sampling, report=report, journal=journal
    )
    stated = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 55, "seed": 3, **OFF, **BEYOND}
    assert sent(chat.asked[0]) == stated == trace.metadata["sampling"]
    notes = report["generate"].notes
    assert notes["sampling"] == {k: v for k, v in stated.items() if k != "seed"}
    assert "not stated" not in notes
    assert json.loads(journal.read_text())["answer"]["sampling"] == stated


def test_what_is_asked_for_is_sent(chat):
    sampling = Sampling(1.0, 1.0, 9, top_k=20, min_p=0.1, repetition_penalty=1.2)
    list(generate_server(chat.client, ["q"], sampling=sampling, report=DropCounts()))
    body = chat.asked[0]
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (20, 0.1, 1.2)


def test_a_judge_states_it_too(chat):
    assert Judge(chat.client)(Trace("q", "t", "a", reference="a")).correct
    assert sent(chat.asked[0]) == {"temperature": 0.0, "max_tokens": 1024, **OFF, **BEYOND}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_server_without_these_fields_is_asked_without_and_that_is_recorded(chat, refusal):
    chat.refuses = refusal
    report = DropCounts()
    traces = list(generate_server(chat.client, ["a", "b", "c"], report=report))
    assert len(traces) == 3 and not report["generate"].dropped
    assert len(chat.asked) == 4  # once refused, then as it likes
    for body in chat.asked[1:]:
        assert not set(BEYOND) & set(body) and set(OFF) <= set(body)
    assert report["generate"].notes["not stated"] == "min_p, repetition_penalty, top_k"
    assert all(not set(BEYOND) & set(trace.metadata["sampling"]) for trace in traces)
    assert chat.client.unstated == sorted(BEYOND)


def test_a_server_without_penalties_either_is_asked_without_any(chat):
    chat.refuses = "bare"
    report = DropCounts()
    assert len(list(generate_server(chat.client, ["a", "b"], report=report))) == 2
    assert len(chat.asked) == 4 and set(sent(chat.asked[-1])) == {
        "temperature", "top_p", "max_tokens", "seed",
    }  # fmt: skip
    assert chat.client.unstated == sorted({*OFF, *BEYOND})
    assert "presence_penalty" in report["generate"].notes["not stated"]


def test_what_was_asked_for_is_never_left_out(chat):
    chat.refuses = "openai"
    report = DropCounts()
    asked = Sampling(top_k=20)
    assert not list(generate_server(chat.client, ["a"], sampling=asked, report=report))
    assert report["generate"].dropped == {"teacher failed: HTTP 400": 1}
    assert len(chat.asked) == 1 and chat.client.unstated == []
    chat.client.unstated.append("top_k")  # known from an earlier request
    with pytest.raises(ServerError, match="Unrecognized"):
        chat.client.chat([{"role": "user", "content": "a"}], **asked.served())


def test_other_refusals_are_not_asked_again(chat):
    chat.refuses = "always"
    with pytest.raises(ServerError, match="context length"):
        chat.client.chat([{"role": "user", "content": "a"}], max_tokens=5)
    assert len(chat.asked) == 1 and not chat.client.unstated
