"""The table of scores is the one place that a score is written in."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPO

# In a process of its own: who reads the table may do so once, when it is imported.
MADE_UP = """
import numpy as np
from mtl_dist.objective import scores as table
made_up = table.Score("mae_up", "MADE UP", "made up", "expr", lambda sums: sums.confusion[..., 0].sum(-1), sign=-1)
named = table.Score("named", "N", "named", "expr", lambda sums: sums.confusion.sum(-1), names=table.EXPRESSIONS)
table.SCORES += (made_up, named)

from mtl_dist.report.classes import draw_f1
from mtl_dist.report.drawing import method_styles
from mtl_dist.report.intervals import bootstrap
from mtl_dist.report.tables import classes_tables, differences_tables, more_table
from mtl_dist.runs.checkpoint import Checkpoint
from mtl_dist.sections import CheckpointConfig
from mtl_dist.training.saving import plan_retention
from mtl_dist.training.tracking import render_scores
from tests.test_report import count_labels, make_methods

methods = make_methods()
scored, floor = (methods[place].results[0].scores for place in (1, 0))
assert scored["mae_up"] == methods[1].results[0].sums().confusion[:, 0].sum()
assert floor["mae_up"] is not None
text = render_scores({"one": scored, "constant predictor": floor})
assert "MADE UP" in text and f"{scored['mae_up']:.4f}" in text, text
assert table.flat_scores(scored)["mae_up"] == scored["mae_up"]
drawn = bootstrap(methods, np.arange(60) // 6, num_draws=20, seed=0)
assert drawn.interval("baseline", "mae_up").high > 0
more = more_table(methods, drawn)
assert "MADE UP" in more.columns and "MADE UP" in more.lower
assert "MADE UP" in differences_tables(methods, drawn)[1].columns
counts = count_labels(methods[0].results[0].predicted.targets)
assert [each.name for each in classes_tables(methods, counts)][-1] == "n_expressions"
assert [figure.name for figure in draw_f1(methods, method_styles(methods), counts)][-1] == "n_expressions"
saved = [Checkpoint(f"run/{n}", n, {"mae_up": value}, n, {}) for n, value in enumerate((3.0, 1.0, 2.0, 9.0))]
deleted = plan_retention(saved, CheckpointConfig(keep_last=1, best_of=("mae_up",)))
assert [checkpoint.step for checkpoint in deleted] == [0, 2]
"""


@pytest.mark.whole
def test_a_score_that_is_added_to_the_table_is_in_console_report_intervals_and_retention():
    done = subprocess.run([sys.executable, "-c", MADE_UP], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
