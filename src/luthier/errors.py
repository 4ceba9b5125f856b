"""Errors a user can put right."""


class LuthierError(ValueError):
    """Something the user can put right. The message says where, what was found, what is accepted and what to do."""


class Incompatible(LuthierError):
    """Two choices that cannot go together, or a choice this model cannot take."""


class ConfigError(LuthierError):
    """A run file, an override or a setting that cannot be read."""


class Interrupted(Exception):
    """The user stopped a run. Everything is saved, and the message says how to go on. Exit code 130."""
