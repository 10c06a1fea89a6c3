"""Everything that does not fit, in one error."""


class Problems:
    """Collects all mismatches, to report them in one error.

    Attributes:
        found: pairs of a location and what is wrong there.
        hints: ways out, which end the message.
    """

    def __init__(self, title: str):
        self.title = title
        self.found: list[tuple[str, str]] = []
        self.hints: list[str] = []

    def add(self, location: str, problem: str) -> None:
        """Adds a line, once."""
        if (location, problem) not in self.found:
            self.found.append((location, problem))

    def hint(self, hint: str) -> None:
        """Adds a way out, once; without any problem it is not shown."""
        if hint not in self.hints:
            self.hints.append(hint)

    def raise_if_any(self) -> None:
        """Raises ValueError if there is a problem."""
        if self.found:
            lines = [f"  {location}: {problem}" for location, problem in self.found]
            raise ValueError("\n".join([self.title, *lines, *self.hints]))
