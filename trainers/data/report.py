"""What became of the rows of data files: how many came in, how many went out, and what was wrong with the others."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Problem(NamedTuple):
    """A row that cannot be used.

    Attributes:
        file: The file, as it was given.
        line: 1-based line in it where the row begins; of a table without lines, the number of the row.
        reason: What is wrong and what to do.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRowError(ValueError):
    """A row that cannot be used, where bad rows shall stop everything.

    Args:
        problem: The row and what is wrong with it.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass
class DataReport:
    """Counts of one reading of data files; `num_in == num_out + len(problems)` holds at every moment.

    Attributes:
        formats: Format of each file that was opened.
        counts: Number of usable rows of each file.
        problems: The rows that were left out, in the order in which they were met.
        lost: What a conversion could not express without making the row wrong, and in how many rows.
    """

    formats: dict[str, str] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    lost: Counter = field(default_factory=Counter)

    @property
    def num_out(self) -> int:
        """Number of rows that can be used."""
        return sum(self.counts.values())

    @property
    def num_in(self) -> int:
        """Number of rows that were read."""
        return self.num_out + len(self.problems)

    def begin(self, file: str) -> None:
        """Forget what is known of a file, since it is read once more: a stream is read in every epoch.

        Args:
            file: The file.
        """
        self.counts[file] = 0
        self.problems[:] = [problem for problem in self.problems if problem.file != file]

    def summary(self, *, most: int = 5) -> str:
        """Say the counts and the first problems.

        Args:
            most: Number of problems to name.

        Returns:
            One line, and one for every named problem.
        """
        lines = [f"{self.num_in} rows in, {self.num_out} rows out, {len(self.problems)} with problems"]
        lines += [f"  {problem}" for problem in self.problems[:most]]
        if len(self.problems) > most:
            lines.append(f"  and {len(self.problems) - most} more")
        return "\n".join(lines)
