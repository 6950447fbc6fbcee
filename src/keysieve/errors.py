"""Every error keysieve raises on purpose; each message says what was wrong, where, and what to do."""


class KeySieveError(Exception):
    """Base of all errors that keysieve raises on purpose."""


class ConfigError(KeySieveError):
    """An option, or a combination of options, cannot work."""


class CaptureError(KeySieveError):
    """The model could not be loaded or captured as a graph."""


class MatchError(KeySieveError):
    """No RoPE attention was found, or one that was found cannot be rewritten."""


class StatisticsError(KeySieveError):
    """A statistics file is unreadable, damaged, or belongs to another model."""


class ExportError(KeySieveError):
    """The rewritten graph could not be written as a file of the target format."""


class BundleError(KeySieveError):
    """A bundle is incomplete, altered, or of another version."""


class EngineError(KeySieveError):
    """A request that the loaded engine cannot serve, such as a prompt that does not fit."""
