"""The errors a user can cause: one message that says what was expected, what was found, and what to do."""


class UserError(Exception):
    """A mistake in a user's input or files, told without a traceback.

    title: one line, no trailing period.  expected / found: the two facts that disagree.  hint: what to do next, ideally a
    command. exit_code: the process exit status (1 failed, 2 usage, 3 diagnostics in the source, 4 verification mismatch,
    5 no device or not enough memory).
    """

    def __init__(self, title, *, expected=None, found=None, hint=None, exit_code=1):
        self.title, self.expected, self.found, self.hint, self.exit_code = title, expected, found, hint, exit_code
        super().__init__(str(self))

    def __str__(self):
        lines = [f"error: {self.title}"]
        lines += [f"  expected: {self.expected}"] if self.expected is not None else []
        lines += [f"  found: {self.found}"] if self.found is not None else []
        lines += [f"hint: {self.hint}"] if self.hint is not None else []
        return "\n".join(lines)


class UsageError(UserError):
    """A flag or argument that cannot be taken (exit status 2)."""

    def __init__(self, title, **details):
        super().__init__(title, exit_code=2, **details)


class DeviceError(UserError):
    """A device is missing, or too small for what was asked (exit status 5)."""

    def __init__(self, title, **details):
        super().__init__(title, exit_code=5, **details)
