"""Two small samples of applications, from the Python on this machine, in the shape of LongBench.

    python -m experiments.python_tasks runs/python-tasks

writes `questions.jsonl` (a question over several topics of the language reference) and `modules.jsonl` (a module
without its docstring, which is the summary). What they hold depends on the Python version.
"""

import argparse
import ast
import json
from pathlib import Path

import numpy as np

from skipwise.data.builtin import python_documents
from skipwise.utils.files import write_text

# Topic of the reference that answers it, question, answers.
QUESTIONS = (
    ("nonlocal", "Which statement makes names refer to variables of the nearest enclosing scope?", ["nonlocal"]),
    ("pass", "Which statement is a null operation?", ["pass"]),
    ("imaginary", "Which letter ends an imaginary literal?", ["j", "J", "j or J"]),
    ("assert", "Which command line option makes the variable __debug__ False?", ["-O"]),
    ("break", "Which optional clause of a loop does a break skip?", ["else", "the else clause"]),
    ("shifting", "Which kind of arguments do the shifting operators accept?", ["integers", "integers as arguments"]),
    ("raise", "Which exception is raised by a raise when no exception is active?", ["RuntimeError"]),
    ("del", "In which order does the deletion of a target list delete its targets?", ["from left to right"]),
    ("debugger", "What is the prompt of the debugger?", ["(Pdb)"]),
    ("with", "Which method of a context manager is invoked when a with statement begins?", ["__enter__"]),
    ("power", "Which is evaluated first in an unparenthesized sequence, the power operator or a unary operator to its "
     "left?", ["the power operator", "power"]),
    ("lambda", "What does a lambda expression yield?", ["a function object", "an anonymous function"]),
)  # fmt: skip
# Other topics around the one that holds the answer.
OTHERS = 7
LONGEST_TOPIC = 8_000
MODULES, SHORTEST_MODULE, LONGEST_MODULE, SHORTEST_SUMMARY = 8, 12_000, 40_000, 150


def questions() -> list[dict[str, object]]:
    """A record per question: documents in a random order, question, answers."""
    topics = {name.removeprefix("topics/"): text for name, text in python_documents() if name.startswith("topics/")}
    names = sorted(name for name, text in topics.items() if len(text) <= LONGEST_TOPIC)
    records: list[dict[str, object]] = []
    for number, (topic, question, answers) in enumerate(QUESTIONS):
        rng = np.random.default_rng(number)
        others = [str(name) for name in rng.permutation(names) if name != topic][:OTHERS]
        shown = [str(name) for name in rng.permutation([topic, *others])]
        context = "\n\n".join(
            f"Document {place}:\n{topics[name][:LONGEST_TOPIC]}" for place, name in enumerate(shown, 1)
        )
        records.append({"context": context, "input": question, "answers": answers})
    return records


def modules() -> list[dict[str, object]]:
    """A record per module: its source without the docstring, and the docstring."""
    records: list[dict[str, object]] = []
    for name, text in python_documents():
        if name.endswith(".py") and SHORTEST_MODULE <= len(text) <= LONGEST_MODULE and len(records) < MODULES:
            first = ast.parse(text).body[0]
            summary = ast.get_docstring(ast.parse(text))
            if summary and len(summary) >= SHORTEST_SUMMARY:
                lines = text.splitlines(keepends=True)
                rest = "".join(lines[: first.lineno - 1] + lines[first.end_lineno :])
                records.append({"context": rest, "input": "", "answers": [summary]})
    return records


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    for name, records in (("questions", questions()), ("modules", modules())):
        write_text(output / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        print(f"{output / name}.jsonl: {len(records)} records")


if __name__ == "__main__":
    main()
