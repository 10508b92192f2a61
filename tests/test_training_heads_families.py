"""Every causal LM family of transformers is exact or refused by name, as docs/families.md says."""

import family_cases as cases
import pytest

# One of each kind: plain, scaled, capped, cut, a multiplier on either side of the lm_head, a head
# transform, a fused or state-space decoder, router losses, unshifted labels, and three refusals.
FEW = (
    *("llama", "granite", "cohere2", "gemma2", "recurrent_gemma", "inkling2_text", "inkling_text"),
    *("falcon_h1", "hyperclovax", "minicpm3", "bert", "gpt2", "mamba", "qwen3_moe", "mixtral"),
    *("llama4_text", "bart", "prophetnet", "musicgen", "gemma3"),
)


def rows_of_page():
    lines = [line for line in cases.PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {row[0]: cases.Verdict(*row) for row in cells}


@pytest.mark.parametrize("family", FEW)
def test_a_family_of_each_kind_is_what_the_page_says(family):
    assert cases.judge(family) == rows_of_page()[family]


def test_the_page_holds_every_family_of_the_installed_transformers():
    import transformers

    assert f"transformers {transformers.__version__}" in cases.PAGE.read_text()
    assert list(rows_of_page()) == cases.names()


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in cases.names() if name not in FEW])
def test_every_other_family_is_what_the_page_says(family):
    assert cases.judge(family) == rows_of_page()[family]


def test_a_wrong_reading_would_be_seen():
    """The comparison fails where the scale, the cap or the router loss is not the model's."""
    import dataclasses

    for family, wrong in (
        ("granite", {"scale": 1.4}),
        ("gemma2", {"softcap": 18.0}),
        ("qwen3_moe", {"takes_labels": False}),
    ):
        model = cases.tiny(family)
        cases.prepare_student(model)
        identity, found = model._kd_reading
        model._kd_reading = identity, dataclasses.replace(found, **wrong)
        with pytest.raises(AssertionError, match="logits: off by|loss: off by"):
            cases.compare(model)
