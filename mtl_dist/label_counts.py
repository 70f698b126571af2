"""How many rows of a set carry which labels."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS


class LabelCounts(BaseModel):
    """How many rows of a set carry which labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    va: int
    expr: int
    au: list[int] = Field(min_length=NUM_AUS, max_length=NUM_AUS)  # rows where this AU is labelled
    expr_classes: list[int] = Field(min_length=NUM_EXPRESSIONS, max_length=NUM_EXPRESSIONS)
    au_positives: list[int] = Field(min_length=NUM_AUS, max_length=NUM_AUS)
    unlabelled: int  # rows without any label

    def plus(self, other: LabelCounts) -> LabelCounts:
        """Return the counts of both sets together."""
        mine, theirs = self.model_dump(), other.model_dump()
        added = {
            name: [a + b for a, b in zip(value, theirs[name])] if isinstance(value, list) else value + theirs[name]
            for name, value in mine.items()
        }
        return LabelCounts(**added)

    def of_tasks(self) -> dict[str, int]:
        """Rows with labels of each task; of AU as many as the unit has that most have, which is at most too few."""
        return {"va": self.va, "expr": self.expr, "au": max(self.au)}

    def missing_tasks(self) -> list[str]:
        """Tasks without a single label."""
        return [task for task, count in self.of_tasks().items() if not count]
