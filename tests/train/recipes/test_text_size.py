"""Network and training by the number of training tokens."""

import itertools

import pytest

from train.data import chunks
from train.recipes import language_model, text_size

KINDS = list(itertools.product(("lstm", "qrnn"), language_model.RECIPES))


def test_the_size_of_known_texts():
    assert text_size.choose_size(language_model.WIKITEXT2_TOKENS[0]) == "large"
    assert text_size.choose_size(60_235) == "small"  # Python's documentation
    assert text_size.choose_size(999_999) == "small"
    assert text_size.choose_size(1_000_000) == "large"


@pytest.mark.parametrize(("model", "recipe"), KINDS)
def test_few_tokens_get_more_dropout_and_more_steps(model, recipe):
    """Python's documentation has the settings of its published runs."""
    some = language_model.defaults(model, recipe)
    assert some == language_model.defaults(model, recipe, tokens=60_235)
    few = language_model.defaults(model, recipe, tokens=12_000)
    language_model.check(few)
    for name in ("words", "input", "hidden", "output", "weight"):
        assert getattr(few, f"{name}_dropout") > getattr(some, f"{name}_dropout")
    assert (few.learning_rate, few.l2) == (some.learning_rate, some.l2)

    def steps(config, tokens):
        rows = tokens // config.batch_size
        table = chunks.chunk_table(rows, config.bptt, 0, 0, config.chunks)
        return len(table), int(table[:, 1].sum()), rows

    # as many steps as a text of five times its size, and nothing left out
    number, covered, rows = steps(few, 12_000)
    assert few.epochs * number > 2 * some.epochs * steps(some, 12_000)[0]
    assert rows - 3 <= covered < rows


@pytest.mark.parametrize("tokens", [400, 1_000, 39_999, 40_000, 999_999])
def test_texts_of_all_sizes_have_chunks(tokens):
    """From the shortest that is split."""
    for model, recipe in KINDS:
        config = language_model.defaults(model, recipe, tokens=tokens)
        rows = tokens // config.batch_size
        assert len(chunks.chunk_table(rows, config.bptt, 0, 0, config.chunks))


def test_large_by_name():
    """The article's settings, whatever the text."""
    config = language_model.defaults(small=False, tokens=12_000)
    assert config == language_model.Config()
