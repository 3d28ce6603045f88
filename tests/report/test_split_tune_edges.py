"""Summary of a run with several edges, from its records."""

from __future__ import annotations

from typing import Any

from raycloud.report.split_tune_edges import summarise


def evaluation(edge: str, what: str, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "edge": edge, "what": what, "accuracy": accuracy, **more}


def round_record(edge: str, number: int, members: list[str], missed: dict[str, str]) -> dict[str, Any]:
    outcome = {"round": number, "counted": edge in members, "members": members, "missed": missed}
    return {"kind": "round", "edge": edge, **outcome, "waited_s": 0.1, "sent": 10, "received": 20}


RECORDS = [
    evaluation("a", "before", 0.5, train_texts=7, held_out_texts=3),
    evaluation("b", "before", 0.7, train_texts=8, held_out_texts=4),
    evaluation("a", "alone", 0.6, bytes_per_step=100.0),
    round_record("a", 0, ["a", "b"], {}),
    round_record("a", 1, ["a", "b"], {}),
    {"kind": "died", "edge": "b", "detail": "killed"},
    round_record("a", 2, ["a"], {"b": "absent"}),
    round_record("b", 2, ["a"], {"b": "absent"}),
    round_record("a", 3, ["a"], {"b": "late"}),
    round_record("a", 4, ["a", "b"], {}),
    evaluation("a", "together", 0.9, bytes_per_step=100.0),
]


def test_rounds_are_told_once_and_who_died_did_not_just_stay_away() -> None:
    assert summarise("run", ["b", "a"], RECORDS)["rounds"] == [
        {"round": 1, "members": ["a", "b"], "missed": {}},
        {"round": 2, "members": ["a"], "missed": {"b": "died"}},
        {"round": 3, "members": ["a"], "missed": {"b": "late"}},
        {"round": 4, "members": ["a", "b"], "missed": {}},
    ]


def test_an_edge_that_was_never_evaluated_has_none_and_is_in_no_mean() -> None:
    summary = summarise("run", ["b", "a"], RECORDS)
    assert list(summary["edges"]) == ["b", "a"]
    assert summary["edges"]["b"]["together"] is None and summary["edges"]["b"]["alone"] is None
    assert summary["edges"]["a"]["alone"] == {"accuracy": 0.6}
    assert (summary["accuracy_before"], summary["accuracy_alone"], summary["accuracy"]) == (0.6, 0.6, 0.9)
    assert summary["edges"]["a"]["bytes_per_round"] == 30
    assert summary["edges"]["b"]["train_texts"] == 8
