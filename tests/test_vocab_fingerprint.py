"""A tokenizer's fingerprint changes with anything that changes ids or their meaning."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kd.vocab import fingerprint_differences, tokenizer_fingerprint


def tokenizer(
    split_digits=False, roles=("<user>", "<think>"), template="{{ messages }}", **options
):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "12"])}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", extra_special_tokens=list(roles), **options
    )
    made.chat_template = template
    return made


def test_the_same_tokenizer_has_the_same_fingerprint(tmp_path):
    made = tokenizer()
    made.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(made) == tokenizer_fingerprint(again)
    again("text", padding="max_length", max_length=9, truncation=True) if again.pad_token else None
    assert tokenizer_fingerprint(made) == tokenizer_fingerprint(again)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        # One vocabulary, cut differently: a hash of the vocabulary sees nothing.
        (tokenizer(split_digits=True), "is tokenised differently"),
        # One size, special tokens with each other's ids.
        (tokenizer(roles=("<think>", "<user>")), "special token <think>: id 259 and 258"),
        (tokenizer(template="{{ other }}"), "template"),
        (tokenizer(roles=("<user>", "<think>", "<more>")), "size: 260 and 261"),
        (tokenizer(pad_token="<eos>"), "special token pad: id None and 257"),
    ],
)
def test_a_difference_is_noticed_and_named(other, words):
    first, second = tokenizer_fingerprint(tokenizer()), tokenizer_fingerprint(other)
    assert first["fingerprint"] != second["fingerprint"]
    assert any(words in line for line in fingerprint_differences(first, second))


def test_the_vocabulary_alone_does_not_tell_them_apart():
    first = tokenizer_fingerprint(tokenizer())
    second = tokenizer_fingerprint(tokenizer(split_digits=True))
    assert first["vocab"] == second["vocab"] and first["special"] == second["special"]
    assert first["probes"] != second["probes"]


def test_a_tokenizer_of_ones_own():
    class Characters:
        def get_vocab(self):
            return {"a": 0, "b": 1}

        def encode(self, text):
            return [self.get_vocab()[character] for character in text]

    found = tokenizer_fingerprint(Characters())
    assert found["size"] == 2 and len(found["fingerprint"]) == 16
