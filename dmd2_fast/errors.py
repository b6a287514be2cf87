"""Errors that say what a user did and what to do about it: the command line prints the message and exits with 2."""


class UserError(Exception):
    """Something the user did or can mend. The message says what was wrong, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be read, has an unknown key or an impossible value, or makes no sense as a whole."""


class DataError(UserError):
    """A data folder or shard that is missing, empty, unreadable or of another shape than the configuration says."""


class RunFolderError(UserError):
    """A run folder that belongs to another configuration, or whose files cannot be read or written."""
