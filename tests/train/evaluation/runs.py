"""List what the tests of disc-eval ask, and read what it has written."""

import json
from pathlib import Path

CHOICES = ["Merin.", "the spring.", "red stone."]
QUESTIONS = ["Where is the quarry?", "When did it open?", "What are the towers built of?", "Was it ever closed?"]


def read_run(folder: Path) -> dict:
    """Read the evaluation.json of a run."""
    return json.loads((folder / "evaluation.json").read_text())


def read_values(folder: Path) -> dict[tuple[str, str], float]:
    """Read the values of a run by row and measure."""
    return {(each["row"], each["measure"]): each["value"] for each in read_run(folder)["summary"]}
