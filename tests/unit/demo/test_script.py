"""The scripted model says nothing that the sandbox did not tell it."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podflare.demo.script import Call, Turn, next_turn
from podflare.demo.task import ORDERS_PATH, SUMMARY_PATH, orders_csv

ANSWER = (
    "West earned the most: 85,898.20 EUR, 2,103.90 EUR ahead of South. "
    "The best month over all regions was 2024-06 with 31,547.30 EUR."
)


def _converse(folder: Path, change: Callable[[int, Call], Call] = lambda number, call: call) -> list[Turn]:
    """Play the whole conversation; this process stands in for the sandbox, `change` for a liar between the two."""
    (folder / "orders.csv").write_text(orders_csv())
    variables: dict[str, Any] = {}
    results: list[Call] = []
    turns = [next_turn(results)]
    while turns[-1].code:
        assert len(turns) < 20, "the script comes to no end"
        code = turns[-1].code.replace(ORDERS_PATH, f"{folder}/orders.csv").replace(SUMMARY_PATH, f"{folder}/summary.md")
        results.append(change(len(results), _run(code, variables, folder)))
        turns.append(next_turn(results))
    return turns


def _run(code: str, variables: dict[str, Any], folder: Path) -> Call:
    output, error = io.StringIO(), ""
    with contextlib.redirect_stdout(output):
        try:
            exec(code, variables)
        except Exception:  # noqa: BLE001 - a sandbox reports whatever its cell raised
            error = traceback.format_exc()
    text = f"stdout:\n{output.getvalue()}\nstderr:\n{error}\nexit_code: {int(bool(error))}"
    return Call(text.replace(f"{folder}/", "/root/"), bool(error))


def test_the_honest_conversation_ends_with_the_right_answer(tmp_path: Path) -> None:
    """Five programs, one of which fails on purpose, lead to the answer and to the file that holds it."""
    turns = _converse(tmp_path)
    assert [bool(turn.code) for turn in turns] == [True] * 5 + [False]
    assert turns[-1].says == ANSWER
    assert (tmp_path / "summary.md").read_text() == ANSWER + "\n"


@pytest.mark.parametrize("number", range(5))
def test_a_missing_result_stops_it_at_that_turn(tmp_path: Path, number: int) -> None:
    """Whichever result is withheld, the model says what it did not get and claims no answer."""
    turns = _converse(tmp_path, lambda at, call: Call("exit_code: 0", False) if at == number else call)
    assert len(turns) == number + 2
    assert turns[-1].says.startswith("I cannot answer the question") and "West" not in turns[-1].says


def test_a_wrong_number_changes_what_it_says(tmp_path: Path) -> None:
    """A count that was tampered with is the count that the model repeats."""
    turns = _converse(tmp_path, lambda at, call: Call(call.text.replace("rows: 618", "rows: 7"), call.failed))
    assert turns[1].says.startswith("7 rows.")


def test_wrong_sums_are_refuted_by_the_sandbox(tmp_path: Path) -> None:
    """Sums that make another region the winner do not survive the check against the sandbox's own variables."""
    turns = _converse(
        tmp_path, lambda at, call: Call(call.text.replace('"North": 83215.7', '"North": 99999.9'), call.failed)
    )
    assert "the sums say ['West'" in turns[-1].says and turns[-1].says != ANSWER


def test_another_culprit_gets_another_repair(tmp_path: Path) -> None:
    """The repaired program is made from the price that the traceback shows, not from one known beforehand."""
    turns = _converse(tmp_path, lambda at, call: Call(call.text.replace(" EUR'", " CHF'"), call.failed))
    assert "CHF" in turns[2].says and "'CHF'" in turns[2].code
    assert turns[-1].says.startswith("I cannot answer")
