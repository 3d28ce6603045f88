"""The report of a distillation: the tables on the console and the page of the result directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from raycloud.report.console import console
from raycloud.report.page import Page
from raycloud.report.plots import curves, grouped_bars
from raycloud.results import write_atomically

Summary = dict[str, Any]


def _share(value: float | None) -> str:
    return "no gap" if value is None else f"{100 * value:.1f} %"


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f} M"


def _models(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Of one cohort: the teacher and the student before and after."""
    header = ["", "teacher", "student before", "student after"]
    rows = [
        ["perplexity", *(f"{summary[key]:.1f}" for key in ("teacher_ppl", "student_ppl_before", "student_ppl_after"))],
        ["gap closed", "", "", _share(summary["gap_closed"])],
        ["agreement with teacher", "", _share(summary["agreement_before"]), _share(summary["agreement_after"])],
        ["KL from teacher, nats per token", "", f"{summary['kl_before']:.3f}", f"{summary['kl_after']:.3f}"],
    ]
    if summary["rouge_l_after"] is not None:
        kinds = ("teacher_rouge_l", "rouge_l_before", "rouge_l_after")
        rows.append(["ROUGE-L of answers", *(f"{summary[kind]:.1f}" for kind in kinds)])
    rows += [
        ["parameters", _millions(summary["teacher_params"]), *[_millions(summary["student_params"])] * 2],
        ["tokens/s, generating", f"{summary['teacher_tok_s']:.1f}", "", f"{summary['student_tok_s']:.1f}"],
    ]
    return header, rows


def _beside(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """The students of several cohorts beside each other."""
    header = ["student", "parameters", "tokens trained", "perplexity before", "after", "agreement", "KL"]
    return header, [
        [
            name,
            _millions(student["student_params"]),
            str(student["student_tokens"]),
            f"{student['student_ppl_before']:.1f}",
            f"{student['student_ppl_after']:.1f}",
            _share(student["agreement_after"]),
            f"{student['kl_after']:.3f}",
        ]
        for name, student in summary["students"].items()
    ]


def _students(summary: Summary) -> list[tuple[str, Summary]]:
    """Each cohort's headlines with what the run has in common; a cohort that is alone has no name."""
    students = summary["students"]
    return [("" if len(students) == 1 else name, {**summary, **student}) for name, student in students.items()]


def _groups(summary: Summary) -> tuple[list[str], list[list[str]]]:
    singles = list(next(iter(summary["groups"].values()))["single_ppl"])
    header = [
        "perplexity on",
        "teacher",
        "before",
        "after",
        "gap closed",
        *(f"{name} before averaging" for name in singles),
    ]
    return header, [
        [
            name,
            *(f"{group[key]:.1f}" for key in ("teacher_ppl", "student_ppl_before", "student_ppl_after")),
            _share(group["gap_closed"]),
            *(f"{group['single_ppl'][single]:.1f}" for single in singles),
        ]
        for name, group in summary["groups"].items()
    ]


def _link(summary: Summary) -> tuple[list[str], list[list[str]]]:
    rows = [[kind.replace("_", " "), f"{size / 1e6:.2f} MB"] for kind, size in summary["wire_bytes"].items()]
    return ["crossed the link", "payload"], [
        *rows,
        ["ids and signals per token", f"{summary['wire_bytes_per_token']:.0f} B"],
    ]


_DATA: dict[str, tuple[str, Callable[[Any], str]]] = {
    "samples": ("samples", str),
    "dropped_empty": ("rows dropped, no token to learn", str),
    "dropped_long": ("rows dropped, prompt too long", str),
    "shortened_prompts": ("prompts shortened", _share),
    "unlike_prompts": ("prompts that the templates write differently", _share),
    "exact_partners": ("tokens with an exact partner", _share),
    "shared_boundaries": ("token boundaries shared", _share),
    "student_words": ("student's words that the teacher's stand for", _share),
    "teacher_words": ("teacher's words that stand for the student's", _share),
    "shared_words": ("words shared exactly", str),
    "eos_mapped": ("end of text mapped", lambda mapped: "yes" if mapped else "no"),
    "student_specials": ("special tokens of the student only", " ".join),
    "teacher_specials": ("special tokens of the teacher only", " ".join),
}
"""What is said of an edge's data, and how it is written."""


def _health(summary: Summary) -> tuple[list[str], list[list[str]]]:
    edges = summary["health"].values()
    terms = dict.fromkeys(term for edge in edges for term in edge["shares"])

    def told(value: float | None, written: Callable[[float], str]) -> str:
        return "" if value is None else written(value)

    return ["", *summary["health"]], [
        *([title, *(write(edge["data"][key]) for edge in edges)] for key, (title, write) in _DATA.items()),
        ["teacher's entropy", *(told(edge["entropy"], "{:.2f} nats".format) for edge in edges)],
        *([f"gradient from {term}", *(told(edge["shares"].get(term), _share) for edge in edges)] for term in terms),
    ]


def _warnings(summary: Summary) -> list[list[str]]:
    return [[name, sentence] for name, edge in summary["health"].items() for sentence in edge["warnings"]]


def print_summary(summary: Summary) -> None:
    """The tables of a finished run, and the prompts as both models complete them."""
    students = _students(summary)
    if len(students) > 1:
        _print(*_beside(summary))
    for name, student in students:
        if name:
            console.print(f"\nstudent '{name}'", style="bold")
        _print(*_models(student))
        _print(*_groups(student))
        for one in student["completions"]:
            console.print(f"\n{_plain(one['prompt'])}", style="bold")
            console.print(f"  teacher: {_plain(one['teacher'])}")
            console.print(f"  student: {_plain(one['student'])}")
    _print(*_link(summary))
    for name, sentence in _warnings(summary):
        console.print(f"warning: {name}: {sentence}", style="yellow")
    console.print(f"\n{summary['rounds']} rounds, {summary['trained_tokens']} tokens, {summary['seconds']:.0f} s")


def _print(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _plain(text: str) -> str:
    return " ".join(text.split())


def write_page(folder: Path, summary: Summary, metrics: Sequence[dict[str, Any]], recipe: str) -> None:
    """Write ``report.html`` into a result directory."""
    page = Page("Distillation", f"{folder.name}: {summary['rounds']} rounds in {summary['seconds']:.0f} s")
    students = _students(summary)
    page.table(*(_beside(summary) if len(students) > 1 else _models(students[0][1])))
    page.heading("Loss")
    steps = [record for record in metrics if record["kind"] == "step"]
    names = list(dict.fromkeys(record["student"] for record in steps))
    lines = {name: [(r["step"], r["loss"]) for r in steps if r["student"] == name] for name in names}
    starts = {record["round"]: record["step"] for record in reversed(steps)}
    page.picture(curves(lines, "step", "loss per token", marks=sorted(starts.values())[1:]), "loss curves")
    page.text("Dotted lines are averages of the students.")
    for name, student in students:
        page.heading(f"Held-out text, student '{name}'" if name else "Held-out text")
        if name:
            page.table(*_models(student))
        page.table(*_groups(student))
        groups = student["groups"]
        page.picture(
            grouped_bars(
                list(groups),
                {
                    "before": [group["student_ppl_before"] for group in groups.values()],
                    "after": [group["student_ppl_after"] for group in groups.values()],
                    "teacher": [group["teacher_ppl"] for group in groups.values()],
                },
                "perplexity",
            ),
            "perplexity by group",
        )
        completions = [list(one.values()) for one in student["completions"]]
        page.table(["prompt", "teacher", "student"], completions, prose=True)
    page.heading("Health")
    page.table(*_health(summary))
    measured = [record for record in metrics if record["kind"] == "health" and record.get("shares")]
    shares = {
        f"{student}: {term}": [(r["step"], r["shares"][term]) for r in measured if r["student"] == student]
        for student, term in dict.fromkeys((r["student"], term) for r in measured for term in r["shares"])
    }
    if shares:
        page.picture(curves(shares, "step", "share of the gradient"), "gradient shares")
        page.text("The norm of each term's gradient in the student's final rows, over the sum of these norms.")
    if warnings := _warnings(summary):
        page.table(["student", "warning"], warnings, prose=True)
    page.heading("Link")
    page.table(*_link(summary))
    page.text("Ids and signals grow with the text; weights cross once a round, the head once a run, to every edge.")
    missed = [record for record in metrics if record["kind"] == "missed"]
    if missed:
        page.heading("Rounds without a student")
        page.table(
            ["round", "student", "why"], [[str(r["round"] + 1), r["student"], r["why"]] for r in missed], prose=True
        )
    page.heading("Recipe")
    page.preformatted(recipe)
    write_atomically(folder / "report.html", page.html())
