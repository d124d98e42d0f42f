"""What the shipped model `execution` says of programs that it was not trained on."""

import pandas as pd
import pytest

from codetrace import models
from codetrace.models.lm import LM
from codetrace.tasks.execution_training import draw_evaluation_executions, execution_answers
from codetrace.tasks.state_accuracy import share_over_programs

NO_TRAINING_SEED = 77  # neither of training, nor of what its record was judged on


@pytest.fixture(scope="module")
def taught():
    return models.load("execution")


def changed_values(lm: LM, n: int) -> pd.DataFrame:
    "What a model says of variables after the lines that changed them, in held-out programs as in training."
    answers = execution_answers(lm, draw_evaluation_executions(n, (5, 12), 3, NO_TRAINING_SEED))
    return answers[answers["changed"].astype(bool)]


def test_the_shipped_model_executes(taught):
    changed = changed_values(taught, 8)
    computed = changed[changed["kind"] != "constant"]
    assert len(computed) >= 15
    assert computed["correct"].mean() >= 0.8, computed[~computed["correct"].astype(bool)][["line", "truth", "said"]]


@pytest.mark.slow
def test_it_is_right_beyond_the_rules_where_its_base_is_not(taught):
    for lm, least, most in ((taught, 0.9, 1.0), (models.load("smollm2"), 0.0, 0.4)):
        changed = changed_values(lm, 150)
        beyond = changed[changed["beyond"].astype(bool)]
        share = share_over_programs(beyond["correct"].astype(float), beyond["program"], "said")
        assert len(beyond) >= 200
        assert least <= share["said_low"] and share["said_high"] <= most, (lm.name, share)
